"""The classifier that judges samples."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.fitting import configuration, run
from train.classifier import Classifier


def stripes(count: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """Noisy images with horizontal or vertical stripes, or none."""
    g = torch.Generator().manual_seed(0)
    wave = torch.tensor([1.0, -1.0]).repeat(size // 2)
    across = wave.expand(size, size)
    patterns = torch.stack([across, across.T, torch.zeros(size, size)])[:, None]
    labels = torch.arange(count) % 3
    return patterns[labels] + 0.3 * torch.randn(count, 1, size, size, generator=g), labels


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    latents, labels = stripes(80)
    (tmp_path / "latents").mkdir()
    save_file({"latents": latents, "labels": labels}, tmp_path / "latents" / "0.safetensors")
    trainer = {"callbacks": [], "max_steps": 60, "limit_val_batches": 1.0}
    config = configuration(tmp_path / "run", tmp_path, tmp_path / "latents", **trainer)
    backbone = {
        "class_path": "Classifier",
        "init_args": {"width": 8, "num_classes": 3, "num_features": 8},
    }
    config["model"] = {"class_path": "ClassifierTraining", "init_args": {"backbone": backbone}}
    source = config["data"]["init_args"]["source"]
    source["init_args"]["validation_share"] = 0.3
    return config


def test_separable_images_are_learnt_in_a_few_steps(config: dict[str, Any], tmp_path: Path) -> None:
    before = run("validate", config, tmp_path / "run").trainer.callback_metrics
    after = run("fit", config, tmp_path / "run").trainer.callback_metrics
    assert float(before["val/accuracy"]) < 0.7
    assert float(after["val/accuracy"]) > 0.95


def test_test_measures_accuracy_too(config: dict[str, Any], tmp_path: Path) -> None:
    tested = run("test", config, tmp_path / "run").trainer.callback_metrics["test/accuracy"]
    validated = run("validate", config, tmp_path / "run").trainer.callback_metrics["val/accuracy"]
    assert float(tested) == float(validated)


class Watched(Classifier):
    """A classifier that keeps the images it is trained on."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.__dict__.setdefault("seen", []).append(images.clone())
        return super().forward(images)


@pytest.mark.parametrize("shift", [0, 2])
def test_training_images_are_shifted_by_a_few_pixels(
    shift: int, config: dict[str, Any], tmp_path: Path
) -> None:
    settings = config["model"]["init_args"]
    settings["backbone"]["class_path"] = "tests.test_classifier.Watched"
    settings["shift"] = shift
    cli = run("fit", config, tmp_path / "run")
    known = {image.numpy().tobytes() for image in stripes(80)[0]}
    found = set()
    for images in cli.model.backbone.seen:
        for move in product(range(-shift, shift + 1), repeat=2):
            back = images.roll((-move[0], -move[1]), dims=(2, 3))
            if all(image.numpy().tobytes() in known for image in back):
                found.add(move)
                break
        else:
            pytest.fail("a batch is no shift of training images")
    assert found == {(0, 0)} if shift == 0 else len(found) > 5


@pytest.mark.parametrize(
    ("channels", "size", "features", "classes"), [(1, 28, 64, 10), (3, 8, 5, 4)]
)
def test_features_and_logits_have_their_shapes(
    channels: int, size: int, features: int, classes: int
) -> None:
    model = Classifier(channels, 4, classes, features).eval()
    images = torch.zeros(2, channels, size, size)
    assert model.features(images).shape == (2, features)
    assert model.num_features == features
    assert model(images).shape == (2, classes)


def test_logits_are_a_linear_map_of_rectified_features() -> None:
    model = Classifier(1, 4).eval()
    images, _ = stripes(4)
    with torch.no_grad():
        assert torch.equal(model(images), model.head(model.features(images).relu()))


def test_a_saved_classifier_loads_with_its_settings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(channels=3, width=4, num_classes=7, num_features=9)
    images = torch.randn(4, 3, 12, 12)
    model(images)  # in train mode: the running statistics move
    model.eval().save_pretrained(tmp_path / "classifier")
    loaded = Classifier.from_pretrained(tmp_path / "classifier").eval()
    assert loaded.num_features == 9
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
