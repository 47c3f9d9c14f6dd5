"""A small convolutional classifier: the judge of samples and the extractor of their features."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from train.data import Batch
from train.seeding import batches_done, generator


class Classifier(nn.Module, PyTorchModelHubMixin):
    """Three stages of convolutions, each halving the image, and a linear head.

    Args:
        channels: Image channels.
        width: Channels of the first stage; they double per stage.
        num_classes: Number of classes.
        num_features: Width of the features before the head.
    """

    def __init__(
        self, channels: int = 1, width: int = 32, num_classes: int = 10, num_features: int = 64
    ) -> None:
        super().__init__()
        self.num_features = num_features
        layers: list[nn.Module] = []
        before = channels
        for stage in range(3):
            after = width * 2**stage
            for _ in range(2):
                layers += [nn.Conv2d(before, after, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(after), nn.ReLU()]
                before = after
            layers += [nn.MaxPool2d(2)] if stage < 2 else []
        self.body = nn.Sequential(*layers)
        self.neck = nn.Linear(before, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, num_features] of images [B, C, H, W] in [-1, 1]."""
        pooled = self.body(images).mean(dim=(2, 3))
        out: Tensor = self.neck(pooled)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        out: Tensor = self.head(F.relu(self.features(images)))
        return out


class ClassifierTraining(L.LightningModule):
    """Trains a `Classifier` by cross-entropy under a one-cycle learning rate.

    Args:
        backbone: The classifier.
        lr: Highest learning rate.
        weight_decay: AdamW's weight decay.
        label_smoothing: Share of the target spread over all classes.
        shift: Images are shifted by up to so many pixels each way.
    """

    def __init__(
        self,
        backbone: Classifier,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.05,
        shift: int = 2,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.lr = lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.shift = shift

    def configure_optimizers(self) -> Any:
        """AdamW and the one-cycle schedule over the whole training."""
        optimizer = torch.optim.AdamW(
            self.backbone.parameters(), lr=self.lr, weight_decay=self.weight_decay
        )
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One batch, shifted at random."""
        images = batch["latents"]
        if self.shift:
            g = generator("shift", batches_done(self.trainer), self.global_rank)
            down, right = torch.randint(-self.shift, self.shift + 1, (2,), generator=g).tolist()
            images = images.roll((down, right), dims=(2, 3))
        loss = F.cross_entropy(
            self.backbone(images), batch["labels"], label_smoothing=self.label_smoothing
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Accuracy on the validation images."""
        right = self.backbone(batch["latents"]).argmax(dim=1) == batch["labels"]
        self.log("val/accuracy", right.float().mean(), prog_bar=True, batch_size=len(right))

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Accuracy on the test images."""
        right = self.backbone(batch["latents"]).argmax(dim=1) == batch["labels"]
        self.log("test/accuracy", right.float().mean(), batch_size=len(right))
