"""Encoding images into latents with a small real VAE."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from l2c.sampling import decode
from tests.fitting import ROOT, write_latents
from train.crops import center_crop
from train.data import Images
from train.encode import encode, main
from train.seeding import generator
from train.sources import ImageFolder, Latents, Source, Split

SIZE = 16
WIDTHS = (16, 20, 37)  # of the images in turn; all are 16 pixels high


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))


def make_vae(**overrides: Any) -> AutoencoderKL:
    """A VAE that halves images once."""
    torch.manual_seed(0)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 2,
        "scaling_factor": 0.3,
    }
    return AutoencoderKL(**{**config, **overrides}).eval().requires_grad_(False)


@pytest.fixture
def vae(tmp_path: Path) -> AutoencoderKL:
    model = make_vae()
    model.save_pretrained(tmp_path / "vae")
    return model


def pixels_of(number: int, grey: bool = False) -> np.ndarray:
    shape = (SIZE, WIDTHS[number % len(WIDTHS)], 3)
    return np.random.default_rng(number).integers(0, 256, shape[: 2 if grey else 3], np.uint8)


def write_images(folder: Path, count: int = 10, grey: bool = False) -> Path:
    """PNGs in two classes, in both a training and a validation folder; number i is of class i % 2.

    Sorted by path, which is how they are read, even numbers come first.
    """
    for i in range(count):
        for split, number in (("train", i), ("validation", 100 + i)):
            path = folder / split / "ab"[i % 2] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_of(number, grey)).save(path)
    return folder


def in_order(count: int = 10) -> list[int]:
    return [*range(0, count, 2), *range(1, count, 2)]


def cropped(number: int) -> Tensor:
    """The middle of an image in [-1, 1], [1, 3, 16, 16]; its height needs no scaling."""
    pixels = pixels_of(number)
    left = (pixels.shape[1] - SIZE) // 2
    values = torch.from_numpy(pixels[:, left : left + SIZE].copy()).permute(2, 0, 1)
    return values[None].float() / 127.5 - 1


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "source": ImageFolder(str(tmp_path / "images")),
        "vae": str(tmp_path / "vae"),
        "size": SIZE,
        "out": str(tmp_path / "latents"),
        "batch_size": 3,
        "shard": 4,
        "device": "cpu",
        **changes,
    }


def read(paths: list[Path]) -> tuple[Tensor, Tensor]:
    shards = [load_file(path) for path in paths]
    return torch.cat([s["latents"] for s in shards]), torch.cat([s["labels"] for s in shards])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is in the shards ---


@pytest.mark.parametrize(("stored", "shift"), [("float32", None), ("float32", 0.7), ("float16", 0)])
def test_modes_are_those_of_the_vae(stored: str, shift: float | None, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    vae = make_vae(shift_factor=shift)
    vae.save_pretrained(tmp_path / "vae")
    paths = encode(**settings(tmp_path, latents="mode", stored=stored))
    latents, labels = read(paths)
    assert [len(load_file(path)["labels"]) for path in paths] == [4, 4, 2]
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert latents.dtype == getattr(torch, stored)
    for latent, number in zip(latents, in_order(), strict=True):
        mode = vae.encode(cropped(number)).latent_dist.mode()
        expected = (mode - (shift or 0)) * 0.3
        # batches of 3 and of 1 sum in another order; float16 has 11 bits
        tolerance = 1e-3 if stored == "float16" else 1e-5
        assert torch.allclose(latent.float(), expected[0], rtol=tolerance, atol=tolerance)


def test_samples_are_those_of_the_posterior(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    latents, _ = read(encode(**settings(tmp_path, batch_size=5, shard=5, seed=3, stored="float32")))
    for start in (0, 5):
        images = torch.cat([cropped(number) for number in in_order()[start : start + 5]])
        posterior = vae.encode(images).latent_dist
        expected = posterior.sample(generator("encode", 3, start)) * 0.3
        assert torch.equal(latents[start : start + 5], expected)
        assert (expected - posterior.mode() * 0.3).abs().mean() > 0.01


@pytest.mark.parametrize("shift", [None, 0.7])
def test_decoding_undoes_the_scaling(shift: float | None, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    vae = make_vae(shift_factor=shift)
    vae.save_pretrained(tmp_path / "vae")
    latents, _ = read(encode(**settings(tmp_path, latents="mode", stored="float32")))
    plain = vae(torch.cat([cropped(0), cropped(1)])).sample
    expected = (plain / 2 + 0.5).clamp(0, 1)
    # the factor is multiplied and divided out again
    assert torch.allclose(decode(vae, latents), expected, atol=1e-5)


def test_flipped_copies_follow_their_image(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    latents, labels = read(
        encode(**settings(tmp_path, flip=True, latents="mode", stored="float32", shard=3))
    )
    assert labels.tolist() == [0] * 4 + [1] * 4
    for i, number in enumerate(in_order(4)):
        for mirrored in (0, 1):
            image = cropped(number).flip(-1) if mirrored else cropped(number)
            expected = vae.encode(image).latent_dist.mode()[0] * 0.3
            # batches of 3 and of 1 sum in another order
            assert torch.allclose(latents[2 * i + mirrored], expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_fit_any_vae(channels: int, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2, grey=True)
    vae = make_vae(in_channels=channels)
    vae.save_pretrained(tmp_path / "vae")
    source = ImageFolder(str(tmp_path / "images"), channels=1)
    latents, _ = read(encode(**settings(tmp_path, source=source, latents="mode", stored="float32")))
    grey = torch.from_numpy(pixels_of(0, grey=True)).expand(1, channels, -1, -1).float()
    expected = vae.encode(grey / 127.5 - 1).latent_dist.mode()[0] * 0.3
    # batches of 2 and of 1 sum in another order
    assert torch.allclose(latents[0], expected, atol=1e-5)


class Arrays(Source):
    """Four 16 x 16 images as arrays [C, H, W]; `count` of them, in columns of the given names."""

    def __init__(self, count: int = 4, column: str = "image") -> None:
        self.count = count
        self.column = column

    def load(self, split: Split) -> Dataset:
        arrays = [pixels_of(3 * i).transpose(2, 0, 1) for i in range(self.count)]
        return Dataset.from_dict({self.column: arrays, "label": list(range(self.count))})


def test_arrays_are_encoded_as_files_are(vae: AutoencoderKL, tmp_path: Path) -> None:
    latents, labels = read(
        encode(**settings(tmp_path, source=Arrays(), latents="mode", stored="float32"))
    )
    assert labels.tolist() == [0, 1, 2, 3]
    expected = vae.encode(cropped(9)).latent_dist.mode()[0] * 0.3
    assert torch.equal(latents[3], expected)  # the last shard's batch of one


@pytest.mark.parametrize(
    ("split", "numbers"), [("validation", [100, 101]), ("all", [0, 1, 100, 101])]
)
def test_split_chooses_the_images(
    split: str, numbers: list[int], vae: AutoencoderKL, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 2)
    latents, _ = read(
        encode(**settings(tmp_path, split=split, latents="mode", stored="float32", batch_size=1))
    )
    expected = [vae.encode(cropped(n)).latent_dist.mode()[0] * 0.3 for n in numbers]
    assert torch.equal(latents, torch.stack(expected))


def test_workers_change_nothing(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    encode(**settings(tmp_path))
    encode(**settings(tmp_path, out=str(tmp_path / "again"), workers=1))
    assert contents(tmp_path / "again") == contents(tmp_path / "latents")


def test_latents_and_images_read_what_was_written(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    written, labels = read(encode(**settings(tmp_path)))
    assert written.dtype == torch.float16
    known = {w.numpy().tobytes(): int(n) for w, n in zip(written, labels, strict=True)}
    data = Images(Latents(str(tmp_path / "latents"), validation_share=0.4), batch_size=2)
    data.setup("validate")
    assert (len(data.train), len(data.validation)) == (6, 4)
    (first, second) = data.val_dataloader()
    for batch in (first, second):
        assert batch["latents"].dtype == torch.float32
        assert batch["latents"].shape == (2, 2, 8, 8)
        for latent, label in zip(batch["latents"], batch["labels"], strict=True):
            assert known[latent.half().numpy().tobytes()] == label


# --- crops ---


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of neighbours in a row and then in a column, a half rounded up as Pillow does."""
    wide = pixels.astype(int)
    rows = (wide[:, ::2] + wide[:, 1::2] + 1) // 2
    return (rows[::2] + rows[1::2] + 1) // 2


def test_large_images_are_halved_by_averaging_and_cut_in_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 56, 3), np.uint8)
    crop = np.asarray(center_crop(Image.fromarray(pixels), 8))
    expected = halved(halved(pixels))[:, 3:11]  # 32 x 56 to 8 x 14
    assert np.array_equal(crop, expected)


@pytest.mark.parametrize(("width", "height"), [(20, 15), (11, 13), (5, 7)])
def test_the_rest_of_the_scaling_is_bicubic(width: int, height: int) -> None:
    # No overshoot beyond 0 and 255, which Pillow cuts off after each of its two passes.
    pixels = np.random.default_rng(0).integers(80, 176, (height, width, 3), np.uint8)
    crop = np.asarray(center_crop(Image.fromarray(pixels), 8)).astype(float)
    scale = 8 / min(width, height)
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].double(),
        size=(round(height * scale), round(width * scale)),
        mode="bicubic",
        antialias=True,
    )[0]
    top, left = (scaled.shape[1] - 8) // 2, (scaled.shape[2] - 8) // 2
    expected = scaled[:, top : top + 8, left : left + 8].permute(1, 2, 0).numpy()
    # Pillow rounds to whole levels after each pass
    assert np.abs(crop - expected).max() <= 2


# --- interruption and other settings ---


class Failing(ImageFolder):
    """An image folder whose pictures from a given one on cannot be read."""

    def __init__(self, path: str, bad: int | None, error: type[BaseException] = OSError) -> None:
        super().__init__(path)
        self._bad = bad
        self._error = error

    def load(self, split: Split) -> Dataset:
        dataset = super().load(split)

        def read(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
            self._read += 1
            if self._bad is not None and self._read > self._bad:
                raise self._error("the reading failed here")
            return columns

        self._read = 0
        return dataset.with_transform(read)


@pytest.mark.parametrize(("error", "raised"), [(OSError, ValueError), (KeyboardInterrupt,) * 2])
def test_a_run_that_failed_is_continued_bit_for_bit(
    error: type[BaseException],
    raised: type[BaseException],
    vae: AutoencoderKL,
    tmp_path: Path,
) -> None:
    folder = str(write_images(tmp_path / "images"))
    encode(**settings(tmp_path, source=Failing(folder, None), out=str(tmp_path / "whole")))
    with pytest.raises(raised):
        encode(**settings(tmp_path, source=Failing(folder, 6, error)))
    left = contents(tmp_path / "latents")
    assert sorted(left) == ["00000000.safetensors", "settings.json"]  # nothing else is there

    with pytest.raises(ValueError, match="expected 10 latents .*found 4"):
        Latents(str(tmp_path / "latents")).load("train")
    before = (tmp_path / "latents" / "00000000.safetensors").stat().st_mtime_ns
    encode(**settings(tmp_path, source=Failing(folder, None)))
    assert (tmp_path / "latents" / "00000000.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole")


def test_a_shard_in_the_middle_is_made_again(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    paths = encode(**settings(tmp_path))
    whole = contents(tmp_path / "latents")
    paths[1].unlink()
    assert encode(**settings(tmp_path)) == paths
    assert contents(tmp_path / "latents") == whole


def test_progress_begins_with_what_is_done(
    vae: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images")
    encode(**settings(tmp_path))[2].unlink()
    capsys.readouterr()
    encode(**settings(tmp_path))
    shown = capsys.readouterr().err.split("\r")
    assert any("8/10" in line for line in shown)
    assert "10/10" in shown[-1]
    assert "image/s" in shown[-1]


def other_vae(tmp_path: Path) -> dict[str, Any]:
    vae = make_vae()
    vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1
    vae.save_pretrained(tmp_path / "other")
    return {"vae": str(tmp_path / "other")}


def more_images(tmp_path: Path) -> dict[str, Any]:
    write_images(tmp_path / "images", 12)
    return {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 8}, r"size: it has 16, now 8"),
        ({"latents": "mode"}, r'latents: it has "sample", now "mode"'),
        ({"stored": "float32"}, r'stored: it has "float16", now "float32"'),
        ({"seed": 1}, r"seed: it has 0, now 1"),
        ({"flip": True}, r"samples: it has 10, now 20; .*flip: it has false, now true"),
        ({"split": "validation"}, r'split: it has "train", now "validation"'),
        (lambda path: {"source": Arrays()}, r'source\.class: it has "ImageFolder", now "Arrays"'),
        (other_vae, r"\(vae\.weights: it has .*\)"),
        (more_images, r"images: it has 10, now 12"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    changes: dict[str, Any] | Callable[[Path], dict[str, Any]],
    named: str,
    vae: AutoencoderKL,
    tmp_path: Path,
) -> None:
    write_images(tmp_path / "images")
    encode(**settings(tmp_path))
    before = contents(tmp_path / "latents")
    changes = changes(tmp_path) if callable(changes) else changes
    with pytest.raises(ValueError, match=f"other settings .*{named}"):
        encode(**settings(tmp_path, **changes))
    assert contents(tmp_path / "latents") == before


def test_a_smaller_batch_continues_a_folder(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    paths = encode(**settings(tmp_path, stored="float32"))
    latents, _ = read(paths)
    paths[0].unlink()
    again, _ = read(encode(**settings(tmp_path, stored="float32", batch_size=1)))
    # the noise is the same; sums within the VAE go in another order
    assert torch.allclose(latents, again, atol=1e-5)


def test_shards_of_unknown_origin_are_refused(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    write_latents(tmp_path / "latents")
    with pytest.raises(ValueError, match=r"has shards and no settings\.json; give another out"):
        encode(**settings(tmp_path))


def test_damaged_settings_are_named(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    encode(**settings(tmp_path))
    (tmp_path / "latents" / "settings.json").write_text('{"size": ')
    with pytest.raises(ValueError, match=r"settings\.json is no file of settings"):
        encode(**settings(tmp_path))


def test_settings_tell_how_latents_were_made(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    encode(**settings(tmp_path))
    told = json.loads((tmp_path / "latents" / "settings.json").read_text())
    assert told["source"]["path"] == str(tmp_path / "images")
    assert (told["images"], told["samples"], told["size"], told["shape"]) == (10, 10, 16, [2, 8, 8])
    assert told["classes"] == ["a", "b"]
    assert (told["dtype"], told["stored"]) == ("float32", "float16")
    assert told["vae"]["config"]["scaling_factor"] == 0.3
    assert len(told["vae"]["weights"]) == 64


# --- what does not fit ---


def without_weight(tmp_path: Path) -> None:
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def without_config(tmp_path: Path) -> None:
    (tmp_path / "vae" / "config.json").unlink()


def without_weights(tmp_path: Path) -> None:
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def cut(tmp_path: Path) -> None:
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_class(tmp_path: Path) -> None:
    VQModel(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without_weight, r"its weights lack encoder\.conv_in\.weight"),
        (without_config, r"config\.json"),
        (without_weights, r"diffusion_pytorch_model\.safetensors"),
        (cut, r"diffusion_pytorch_model\.safetensors"),
        (other_class, r"its config\.json describes VQModel"),
    ],
)
def test_a_folder_that_is_no_whole_vae_is_refused(
    damage: Callable[[Path], None], named: str, vae: AutoencoderKL, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 2)
    damage(tmp_path)
    with pytest.raises(
        ValueError, match=f"expected a folder .*AutoencoderKL.*got .*vae: .*{named}"
    ) as e:
        encode(**settings(tmp_path))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "latents").exists()


def test_official_names_of_attention_weights_are_known(vae: AutoencoderKL, tmp_path: Path) -> None:
    # sd-vae-ft-ema and -mse were saved with these
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in names.items():
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    write_images(tmp_path / "images", 2)
    first, _ = read(encode(**settings(tmp_path)))
    save_file(tensors, path, metadata={"format": "pt"})
    again, _ = read(encode(**settings(tmp_path, out=str(tmp_path / "again"))))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("config", "size", "named"),
    [
        ({}, 15, "expected a size divisible by 2, .* got 15; use 16"),
        ({"in_channels": 2}, 16, "expected a VAE of 1 or 3 channels, .* has 2"),
        ({"latents_mean": [0.1, 0.2], "latents_std": [1.0, 2.0]}, 16, "scaled by one factor"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(
    config: dict[str, Any], size: int, named: str, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 2)
    make_vae(**config).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=named):
        encode(**settings(tmp_path, size=size))


def test_latents_that_overflow_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    make_vae(scaling_factor=1e6).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="finite latents.*samples 0 to 1 .*use float32"):
        encode(**settings(tmp_path))
    assert not list((tmp_path / "latents").glob("*.safetensors"))
    # no shard is there yet, so the settings may still change
    latents, _ = read(encode(**settings(tmp_path, stored="float32")))
    assert latents.isfinite().all()


def test_a_source_without_images_is_refused(vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="no images found in .*images"):
        encode(**settings(tmp_path))
    with pytest.raises(ValueError, match="Arrays holds no images in split train"):
        encode(**settings(tmp_path, source=Arrays(0)))
    latents = Latents(str(write_latents(tmp_path / "others")))
    with pytest.raises(ValueError, match="columns image and label, Latents has latent, label"):
        encode(**settings(tmp_path, source=latents))


def test_a_damaged_image_is_named(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    path = tmp_path / "images" / "train" / "b" / "001.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="image 2 is no whole image"):
        encode(**settings(tmp_path))


@pytest.mark.parametrize("name", ["batch_size", "shard", "size"])
def test_counts_are_positive(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        encode(**settings(tmp_path, **{name: 0}))


def test_a_device_that_is_not_there_is_named(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    with pytest.raises(ValueError, match="device cuda:99 cannot be used"):
        encode(**settings(tmp_path, device="cuda:99"))


# --- the command line ---


def written(tmp_path: Path, **changes: Any) -> Path:
    """The settings as YAML."""
    source = {"class_path": "ImageFolder", "init_args": {"path": str(tmp_path / "images")}}
    path = tmp_path / "encode.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, source=source, **changes)))
    return path


def test_the_command_writes_what_the_function_does(vae: AutoencoderKL, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    encode(**settings(tmp_path, seed=5, out=str(tmp_path / "expected")))
    done = subprocess.run(
        [sys.executable, "-m", "train", "encode", "--config", written(tmp_path), "--seed", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "3 shards and settings.json" in done.stdout
    assert "10/10" in done.stderr
    one, other = contents(tmp_path / "latents"), contents(tmp_path / "expected")
    assert json.loads(one["settings.json"]) == json.loads(other["settings.json"])
    for (latents, labels), (expected, named) in [
        (
            read(sorted(folder.glob("*.safetensors")))
            for folder in (tmp_path / "latents", tmp_path / "expected")
        )
    ]:
        # another number of threads may sum in another order
        assert torch.allclose(latents.float(), expected.float(), atol=1e-3)
        assert torch.equal(labels, named)


@pytest.mark.parametrize("keys", [(), ("source", "init_args")], ids=["top", "source"])
def test_an_unknown_key_is_named(
    keys: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    config = yaml.safe_load(path.read_text())
    inner = config
    for key in keys:
        inner = inner[key]
    inner["wrong_key"] = 1
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        main(["--config", str(path)])
    assert end.value.code == 2
    assert "wrong_key" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers' use of the hub's client
def test_a_vae_that_cannot_be_had_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 2)
    assert main(["--config", str(written(tmp_path, vae="nobody/no-such-vae"))]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("python -m train encode: expected a folder or hub id")
    assert "nobody/no-such-vae, which is no folder here and was not to be had from the hub" in line


def test_help_documents_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("--source", "mirrored left to right", "A sample of the VAE's posterior"):
        assert words in said
