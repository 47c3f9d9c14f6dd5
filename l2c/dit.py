"""DiT: the original diffusion transformer with adaLN-Zero blocks, on timm layers.

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
    "DiT-S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "DiT-B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "DiT-L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "DiT-XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCHES = (2, 4, 8)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Per-sample affine map of tokens: `x` [B, T, D], `shift` and `scale` [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep features (frequencies 10000^(-i/half), cosine first) and an MLP."""

    def __init__(self, hidden_size: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(
            nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps, [B] -> [B, D]."""
        features = sinusoidal(t, self.num_features)
        embedded: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Class embeddings; with guidance the last row is the null class.

    Unlike the original there is no random dropout in here: who trains drops labels, and a frozen
    model means the same in train and eval mode.
    """

    def __init__(self, num_classes: int, hidden_size: int, null_class: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels, [B] -> [B, D]."""
        embedded: Tensor = self.embedding_table(y)
        return embedded


class DiTBlock(nn.Module):
    """Attention and MLP, each normed, modulated and gated by the conditioning (adaLN-Zero).

    `attention` and `feedforward` are the two cacheable sub-layers: they return the output before
    its gate, and hold everything (norm, modulation) that only this output needs.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU("tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def attention(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Attention output before its gate, [B, T, D]."""
        out: Tensor = self.attn(modulate(self.norm1(x), shift, scale))
        return out

    def feedforward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """MLP output before its gate, [B, T, D]."""
        out: Tensor = self.mlp(modulate(self.norm2(x), shift, scale))
        return out

    def add_attention(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Tokens with the gated attention output added, [B, T, D]."""
        # In one pass: it is most of what a reused sub-layer costs.
        return torch.addcmul(x, gate.unsqueeze(1), self.attention(x, shift, scale))

    def add_feedforward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Tokens with the gated MLP output added, [B, T, D]."""
        return torch.addcmul(x, gate.unsqueeze(1), self.feedforward(x, shift, scale))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of both sub-layers, [B, D] each, from the conditioning [B, D]."""
        parts: tuple[Tensor, ...] = self.adaLN_modulation(c).chunk(6, dim=1)
        return parts

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens [B, T, D] under the conditioning [B, D] to tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = self.add_attention(x, shift1, scale1, gate1)
        return self.add_feedforward(x, shift2, scale2, gate2)


class FinalLayer(nn.Module):
    """Modulated norm and the projection of each token to its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift and scale, [B, D] each, from the conditioning [B, D]."""
        parts: tuple[Tensor, ...] = self.adaLN_modulation(c).chunk(2, dim=1)
        return parts

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens [B, T, D] to patches [B, T, patch * patch * C]."""
        shift, scale = self.modulation(c)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiT(Backbone):
    """Diffusion transformer (Peebles & Xie, ICCV 2023), class-conditional, with adaLN-Zero.

    Args:
        input_size: Height and width of the latent (or image), in elements.
        patch_size: Side of a patch, in elements; divides `input_size`.
        in_channels: Channels of the latent.
        hidden_size: Token width.
        depth: Number of blocks.
        num_heads: Attention heads; divides `hidden_size`.
        mlp_ratio: Hidden width of the MLP over `hidden_size`.
        num_classes: Number of class labels.
        learn_sigma: Predict the variance too, in as many further channels.
        null_class: Have one more label, `num_classes`, for the unconditional model.

    Raises:
        ValueError: If the sizes do not divide.
    """

    layout: ClassVar[Mapping[str, int]] = {
        "pos_embed": 3,
        "x_embedder.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
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
        learn_sigma: bool = True,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_classes=num_classes,
        )
        if input_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide input_size {input_size}")
        if hidden_size % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide hidden_size {hidden_size}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, got {hidden_size}")
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "null_class": null_class,
        }
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes = num_classes
        self.null_label = num_classes if null_class else None
        self.noise = Noise()

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class)
        self.pos_embed = nn.Parameter(
            sincos_positions(hidden_size, input_size // patch_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    @classmethod
    def named(cls, name: str, **overrides: Any) -> DiT:
        """Build a published size with fresh weights, e.g. `DiT.named("DiT-XL/2", input_size=64)`.

        Raises:
            ValueError: If `name` is none of DiT-{S,B,L,XL}/{2,4,8}.
        """
        size, _, patch = name.partition("/")
        if size not in SIZES or patch not in map(str, PATCHES):
            known = ", ".join(f"{s}/{p}" for s in SIZES for p in PATCHES)
            raise ValueError(f"unknown DiT {name!r}; known are {known}")
        return cls(**{**SIZES[size], "patch_size": int(patch), **overrides})

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
        """The constructor's arguments from the shapes in an official state dict."""
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = depth_of(state, "blocks")
        found = {
            "input_size": round(state["pos_embed"].shape[1] ** 0.5) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": hidden,
            "depth": depth,
            "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
            "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
            "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
        }
        if "num_heads" not in given:
            found["num_heads"] = heads_of(SIZES, hidden, depth)
        return {**found, **given}

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
        # adaLN-Zero: every block starts as the identity, and the model's output at zero.
        zeroed: list[Any] = [m for m in self.modules() if isinstance(m, (DiTBlock, FinalLayer))]
        for linear in [module.adaLN_modulation[1] for module in zeroed] + [self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches [B, T, patch * patch * C] to images [B, C, H, H]."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        x = x.reshape(-1, grid, grid, p, p, self.out_channels)
        x = torch.einsum("bhwpqc->bchpwq", x)
        return x.reshape(-1, self.out_channels, grid * p, grid * p)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """The conditioning [B, D] of timesteps and labels [B]."""
        embedded: Tensor = self.t_embedder(t) + self.y_embedder(y)
        return embedded

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise, and with `learn_sigma` the variance in as many further channels.

        Args:
            x: Noisy latents, [B, C, H, H].
            t: Timesteps, [B], in units of training timesteps.
            y: Class labels, [B]; `null_label` for the unconditional model.

        Returns:
            [B, C, H, H], or [B, 2 C, H, H] with `learn_sigma`.
        """
        x = self.x_embedder(x) + self.pos_embed  # [B, T, D]
        c = self.condition(t, y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, [1, grid * grid, hidden_size] (MAE's layout).

    The first half of the channels encodes the column, the second the row; in each, sines stand
    before cosines.
    """
    quarter = hidden_size // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega[None]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, hidden / 2]
    columns = line[None].expand(grid, grid, -1)
    rows = line[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, hidden_size).float()
