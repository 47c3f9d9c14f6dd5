"""Images of any size as square pictures of one size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

MODES = {1: "L", 3: "RGB"}  # by the number of channels that a VAE takes


class Crops(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """Centre crops of images, uint8 [C, size, size], and their labels.

    Args:
        dataset: Images and labels.
        size: Height and width of a crop, in pixels.
        channels: 1 for grey, 3 for colour; images are converted.
        flip: Have each image twice, sample 2 i as it is and 2 i + 1 mirrored.
    """

    def __init__(self, dataset: Dataset, size: int, channels: int, flip: bool) -> None:
        self.dataset = dataset
        self.size = size
        self.mode = MODES[channels]
        self.copies = 2 if flip else 1

    def __len__(self) -> int:
        return len(self.dataset) * self.copies

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        row, mirrored = divmod(index, self.copies)
        try:
            example = self.dataset[row]
            image = as_picture(example["image"]).convert(self.mode)
        except (OSError, SyntaxError) as error:  # the latter for some broken PNGs
            raise ValueError(f"image {row} is no whole image: {error}") from error
        image = center_crop(image, self.size)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image).reshape(self.size, self.size, -1)
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)), int(example["label"])  # [C, H, W]


def stacked(examples: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """A batch: uint8 pixels [B, C, H, W] and int64 labels [B]."""
    pixels, labels = zip(*examples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def as_picture(image: Any) -> Image.Image:
    """A decoded file as it is, an array [C, H, W] as a picture."""
    if isinstance(image, Image.Image):
        return image
    pixels = np.moveaxis(np.asarray(image, np.uint8), 0, -1)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` and cut out the middle, as ADM and DiT did in training.

    Sides are halved by averaging while they stay large enough, the rest is bicubic.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
