"""U-ViT: a plain transformer over patches, time and label as tokens, with long skips.

Module and parameter names are those of the official checkpoints, so their state dicts load as
they are. Shapes: B batch, C channels, H height (= width), T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from l2c.backbone import Backbone, check_sizes, depth_of, heads_of, sinusoidal
from l2c.noise import Noise

SIZES: Mapping[str, dict[str, int]] = {
    "U-ViT-S": {"hidden_size": 512, "depth": 12, "num_heads": 8},
    "U-ViT-M": {"hidden_size": 768, "depth": 16, "num_heads": 12},
    "U-ViT-L": {"hidden_size": 1024, "depth": 20, "num_heads": 16},
    "U-ViT-H": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
PATCHES = (2, 4)


class UViTBlock(nn.Module):
    """Attention and MLP on normed tokens; an out-block first merges its in-block's output.

    `attention` and `feedforward` are the two cacheable sub-layers, each with its norm;
    `add_attention` and `add_feedforward` add their outputs to the tokens.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None

    def attention(self, x: Tensor) -> Tensor:
        """Attention output, [B, T, D]."""
        out: Tensor = self.attn(self.norm1(x))
        return out

    def feedforward(self, x: Tensor) -> Tensor:
        """MLP output, [B, T, D]."""
        out: Tensor = self.mlp(self.norm2(x))
        return out

    def add_attention(self, x: Tensor) -> Tensor:
        """Tokens with the attention output added, [B, T, D]."""
        return x + self.attention(x)

    def add_feedforward(self, x: Tensor) -> Tensor:
        """Tokens with the MLP output added, [B, T, D]."""
        return x + self.feedforward(x)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D], in an out-block with those of its in-block, to tokens."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return self.add_feedforward(self.add_attention(x))


class UViT(Backbone):
    """U-ViT (Bao et al., CVPR 2023), class-conditional or not, predicting the noise.

    Timesteps count from 1 (`Noise.uvit()`), but from 0 with DDPM's noise in `continuous_time`.

    Args:
        input_size: Height and width of the latent (or image), in elements.
        patch_size: Side of a patch, in elements; divides `input_size`.
        in_channels: Channels of the latent.
        hidden_size: Token width.
        depth: Number of in-blocks and out-blocks together, even; a mid-block comes on top.
        num_heads: Attention heads; divides `hidden_size`.
        mlp_ratio: Hidden width of the MLP over `hidden_size`.
        num_classes: Number of class labels; 0 for a model without labels.
        null_class: Have one more label, `num_classes`, for the unconditional model.
        mlp_time_embed: Put the time token through an MLP.
        conv: End with a 3 x 3 convolution.
        continuous_time: Trained on continuous time, as the official models of pixels were (CIFAR10,
            CelebA, ImageNet 64), on which DDPM's timesteps are points.

    Raises:
        ValueError: If the sizes do not divide.
    """

    layout: ClassVar[Mapping[str, int]] = {
        "pos_embed": 3,
        "patch_embed.proj.weight": 4,
        "in_blocks.0.mlp.fc1.weight": 2,
        "mid_block.attn.qkv.weight": 2,
        "out_blocks.0.skip_linear.weight": 2,
        "decoder_pred.weight": 2,
    }

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        mlp_time_embed: bool = False,
        conv: bool = False,
        continuous_time: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            num_heads=num_heads,
        )
        if num_classes < 0 or (null_class and not num_classes):
            raise ValueError(
                "expected num_classes >= 0, and a null_class only with classes, "
                f"got num_classes={num_classes}, null_class={null_class}"
            )
        if input_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide input_size {input_size}")
        if hidden_size % num_heads or hidden_size % 2:
            raise ValueError(
                f"expected an even hidden_size that num_heads divides, got {hidden_size} and "
                f"{num_heads}"
            )
        if depth < 2 or depth % 2:
            raise ValueError(f"expected an even depth of at least 2, got {depth}")
        self.config = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "null_class": null_class,
            "mlp_time_embed": mlp_time_embed,
            "conv": conv,
            "continuous_time": continuous_time,
        }
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.null_label = num_classes if null_class else None
        self.noise = Noise() if continuous_time else Noise.uvit()

        self.patch_embed = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.time_embed: nn.Module = nn.Identity()
        if mlp_time_embed:
            self.time_embed = nn.Sequential(
                nn.Linear(hidden_size, 4 * hidden_size),
                nn.SiLU(),
                nn.Linear(4 * hidden_size, hidden_size),
            )
        if num_classes:
            self.label_emb = nn.Embedding(num_classes + null_class, hidden_size)
        self.extras = 2 if num_classes else 1
        tokens = self.extras + (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size))

        def blocks(count: int, skip: bool) -> nn.ModuleList:
            made = (UViTBlock(hidden_size, num_heads, mlp_ratio, skip) for _ in range(count))
            return nn.ModuleList(made)

        self.in_blocks = blocks(depth // 2, skip=False)
        self.mid_block = UViTBlock(hidden_size, num_heads, mlp_ratio, skip=False)
        self.out_blocks = blocks(depth // 2, skip=True)
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.final_layer: nn.Module = nn.Identity()
        if conv:
            self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self._initialise()

    @classmethod
    def named(cls, name: str, **overrides: Any) -> UViT:
        """Build a published size with fresh weights, e.g. `UViT.named("U-ViT-H/2")`.

        Raises:
            ValueError: If `name` is none of U-ViT-{S,M,L,H}/{2,4}.
        """
        size, _, patch = name.partition("/")
        if size not in SIZES or patch not in map(str, PATCHES):
            known = ", ".join(f"{s}/{p}" for s in SIZES for p in PATCHES)
            raise ValueError(f"unknown U-ViT {name!r}; known are {known}")
        return cls(**{**SIZES[size], "patch_size": int(patch), **overrides})

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
        """The constructor's arguments from the shapes in an official state dict.

        A null class and continuous time leave no trace in shapes: with labels there is taken to be
        a null class, and models of three channels are taken to be those of pixels.
        """
        hidden, channels, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 2 * depth_of(state, "out_blocks")
        labels = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0
        null_class = given.get("null_class", labels > 0)
        tokens = state["pos_embed"].shape[1] - (2 if labels else 1)
        found = {
            "input_size": round(tokens**0.5) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": hidden,
            "depth": depth,
            "mlp_ratio": state["in_blocks.0.mlp.fc1.weight"].shape[0] / hidden,
            "num_classes": labels - null_class,
            "null_class": null_class,
            "mlp_time_embed": "time_embed.0.weight" in state,
            "conv": "final_layer.weight" in state,
            "continuous_time": channels == 3,
        }
        if "num_heads" not in given:
            found["num_heads"] = heads_of(SIZES, hidden, depth)
        return {**found, **given}

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches [B, T, patch * patch * C] to images [B, C, H, H]."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        x = x.reshape(-1, grid, grid, p, p, self.in_channels)
        x = torch.einsum("bhwpqc->bchpwq", x)
        return x.reshape(-1, self.in_channels, grid * p, grid * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            x: Noisy latents, [B, C, H, H].
            t: Timesteps, [B], from 1 on; they may lie between whole ones.
            y: Class labels, [B]; `null_label` for the unconditional model. A model without labels
                takes none.

        Returns:
            [B, C, H, H].
        """
        x = self.patch_embed(x)  # [B, T - extras, D]
        time = self.time_embed(sinusoidal(t, self.hidden_size).to(x.dtype))
        tokens = [time[:, None], x]
        if self.num_classes:
            tokens.insert(0, self.label_emb(y)[:, None])
        x = torch.cat(tokens, dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        image: Tensor = self.final_layer(self.unpatchify(x))
        return image
