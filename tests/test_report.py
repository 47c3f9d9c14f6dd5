"""The whole path at a small size: train, export, compare, draw; and the judge of samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import l2c
from tests.conftest import make_router, randomised, tiny_dit
from train import report
from train.classifier import Classifier
from train.quality import REFERENCE, Judge, frechet_metric, psnr


@pytest.fixture
def judge_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    classifier = randomised(Classifier(channels=3, width=4, num_features=6))
    folder = tmp_path / "judge"
    classifier.save_pretrained(folder)
    metric = frechet_metric(classifier)
    metric.update(torch.rand(64, 3, 8, 8) * 2 - 1, real=True)
    reference = {
        "sum": metric.real_features_sum,
        "products": metric.real_features_cov_sum,
        "count": metric.real_features_num_samples,
    }
    save_file(reference, folder / REFERENCE)
    return folder


def test_report_writes_pictures_figures_and_a_table(
    router: l2c.Router,
    dit_folder: Path,
    judge_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    router.save(tmp_path / "router.safetensors")
    report.main(
        [
            *("--router", str(tmp_path / "router.safetensors")),
            *("--model", str(dit_folder), "--judge", str(judge_folder)),
            *("--out", str(tmp_path / "out"), "--samples", "20", "--batch-size", "8"),
            *("--device", "cpu"),
        ]
    )
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    steps = round(router.plan().share * 6)
    assert list(written["figures"]) == ["uncached", "router", f"{steps} steps"]
    uncached, cached, plain = written["figures"].values()
    assert uncached["share"] == 1
    assert cached["share"] == router.plan().share
    assert cached["predicted_speedup"] == pytest.approx(router.plan().speedup)
    assert plain["share"] == pytest.approx(steps / 6)
    assert uncached["measured_speedup"] == 1
    assert cached["measured_speedup"] > 0
    assert uncached["psnr"] is None
    assert cached["psnr"] > 0
    assert written["machine"]["torch"] == torch.__version__
    for picture in ("router.png", "samples.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert min(image.size) > 100
    printed = capsys.readouterr().out
    assert f"{cached['psnr']:.2f}" in printed
    assert f"{uncached['frechet']:.2f}" in printed


def test_ways_draw_what_they_say(router: l2c.Router, dit: l2c.DiT) -> None:
    chosen = report.ways(dit, router, 1.5)
    figures, samples = report.compare(dit, chosen, None, count=10, batch=5, seed=0)
    again, same = report.compare(dit, chosen, None, count=10, batch=5, seed=0)
    assert figures["router"]["psnr"] == again["router"]["psnr"]
    assert torch.equal(samples["router"], same["router"])
    assert not torch.equal(samples["router"], samples["uncached"])
    difference = (samples["router"].clamp(-1, 1) - samples["uncached"].clamp(-1, 1)).square()
    expected = 10 * np.log10(4 / float(difference.mean()))
    assert figures["router"]["psnr"] == pytest.approx(expected, abs=1e-4)


def test_report_refuses_a_router_of_another_model(
    schedule: l2c.Schedule, dit_folder: Path, tmp_path: Path
) -> None:
    make_router(tiny_dit(seed=1), schedule).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another model: weights"):
        report.main(
            [
                *("--router", str(tmp_path / "other.safetensors"), "--model", str(dit_folder)),
                *("--out", str(tmp_path / "out"), "--samples", "2"),
            ]
        )
    assert not (tmp_path / "out").exists()


def test_frechet_distance_equals_the_formula(judge_folder: Path) -> None:
    judge = Judge(judge_folder)
    g = torch.Generator().manual_seed(1)
    images = torch.rand(50, 3, 8, 8, generator=g) * 2 - 1
    with torch.no_grad():
        features = judge.classifier.features(images).double().numpy()
    count = float(judge.reference["count"])
    mean = (judge.reference["sum"] / count).double().numpy().ravel()
    products = judge.reference["products"].double().numpy()
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    other = np.cov(features, rowvar=False)
    eigenvalues = np.linalg.eigvals(covariance @ other)
    root = np.sqrt(eigenvalues.astype(complex)).real.sum()
    apart = np.square(mean - features.mean(0)).sum()
    expected = apart + np.trace(covariance) + np.trace(other) - 2 * root
    # torchmetrics' sums of float32 features lose some digits against numpy's float64
    assert judge.frechet(images) == pytest.approx(expected, rel=1e-3)


def test_recognised_counts_the_classifier_s_answers(judge_folder: Path) -> None:
    judge = Judge(judge_folder)
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        answers = judge.classifier(images).argmax(dim=1)
    assert judge.recognised(images, answers) == 1
    wrong = answers.clone()
    wrong[:15] = (wrong[:15] + 1) % 10
    assert judge.recognised(images, wrong) == 0.5


def test_judge_needs_its_files(judge_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a classifier"):
        Judge(tmp_path / "none")
    (judge_folder / REFERENCE).unlink()
    with pytest.raises(ValueError, match=r"train\.quality"):
        Judge(judge_folder)


def test_psnr_by_hand() -> None:
    zeros = torch.zeros(2, 1, 4, 4)
    assert psnr(zeros + 0.2, zeros) == pytest.approx(20.0, abs=1e-4)
