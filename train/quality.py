"""How good samples are: Frechet distance and recognition by a small classifier, and PSNR.

`python -m train.quality --classifier DIR --images DIR` writes the reference statistics that the
Frechet distance is measured against, so that measuring needs no images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance

from l2c.files import replacing
from train.classifier import Classifier
from train.data import collate
from train.sources import FashionMNIST

REFERENCE = "reference.safetensors"


class Features(nn.Module):
    """A classifier's features, in the form in which torchmetrics takes an extractor."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features = classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, num_features] of images [B, C, H, W] in [-1, 1]."""
        return self.classifier.features(images)


class Judge:
    """A classifier and the statistics of its features on real images.

    Args:
        folder: Holds the classifier, and reference.safetensors.

    Raises:
        ValueError: If the folder lacks a file, or the statistics are of another classifier.
    """

    def __init__(self, folder: str | Path) -> None:
        self.classifier = load_classifier(folder)
        path = Path(folder) / REFERENCE
        if not path.is_file():
            raise ValueError(
                f"expected {path}; write it with python -m train.quality --classifier {folder}"
            )
        self.reference = load_file(path)
        width = len(self.reference["sum"])
        if width != self.classifier.num_features:
            raise ValueError(
                f"expected statistics of {self.classifier.num_features} features in {path}, "
                f"got {width}"
            )

    @torch.no_grad()
    def frechet(self, images: Tensor) -> float:
        """Frechet distance of images [N, C, H, W] in [-1, 1] to the real ones, in features."""
        metric = frechet_metric(self.classifier)
        metric.real_features_sum = self.reference["sum"]
        metric.real_features_cov_sum = self.reference["products"]
        metric.real_features_num_samples = self.reference["count"]
        for part in images.split(256):
            metric.update(part.clamp(-1, 1), real=False)
        return float(metric.compute())

    @torch.no_grad()
    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that the classifier takes for their label."""
        found = [self.classifier(part.clamp(-1, 1)).argmax(dim=1) for part in images.split(256)]
        return float((torch.cat(found) == labels).float().mean())


def load_classifier(folder: str | Path) -> Classifier:
    """Load a classifier from a local folder, for evaluation."""
    if not (Path(folder) / "model.safetensors").is_file():
        raise ValueError(f"expected a classifier (config.json, model.safetensors) in {folder}")
    classifier = Classifier.from_pretrained(str(folder), strict=True)
    frozen: Classifier = classifier.eval().requires_grad_(False)
    return frozen


def frechet_metric(classifier: Classifier) -> FrechetInceptionDistance:
    """The Frechet distance of torchmetrics over a classifier's features."""
    return FrechetInceptionDistance(feature=Features(classifier))


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over all of them at once."""
    return float(
        peak_signal_noise_ratio(images.clamp(-1, 1), reference.clamp(-1, 1), data_range=2.0)
    )


def main() -> None:
    """Write the reference statistics of a classifier on the real test images."""
    parser = argparse.ArgumentParser("python -m train.quality")
    parser.add_argument("--classifier", required=True, help="folder of the classifier")
    parser.add_argument("--images", default=FashionMNIST().path, help="Fashion-MNIST: id or folder")
    options = parser.parse_args()
    classifier = load_classifier(options.classifier)
    dataset = FashionMNIST(options.images).load("validation").with_format("numpy")
    metric = frechet_metric(classifier)
    right = 0
    with torch.no_grad():
        for start in range(0, len(dataset), 500):
            rows = range(start, min(start + 500, len(dataset)))
            batch = collate(dataset.__getitems__(list(rows)))
            metric.update(batch["latents"], real=True)
            found = classifier(batch["latents"]).argmax(dim=1)
            right += int((found == batch["labels"]).sum())
    with replacing(Path(options.classifier) / REFERENCE) as temporary:
        save_file(
            {
                "sum": metric.real_features_sum,
                "products": metric.real_features_cov_sum,
                "count": metric.real_features_num_samples,
            },
            temporary,
        )
    print(f"{len(dataset)} images, accuracy {right / len(dataset):.4f}")


if __name__ == "__main__":
    main()
