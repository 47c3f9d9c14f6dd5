"""Loading backbones: official files, folders, and everything that is neither."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import l2c
from tests.conftest import randomised, tiny_dit

GIVEN = (torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 9]))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_official_checkpoints(dit: l2c.DiT, tmp_path: Path, suffix: str, wrapped: bool) -> None:
    state = dit.state_dict()
    torch.save({"ema": state, "step": 5} if wrapped else state, tmp_path / f"dit{suffix}")
    loaded = l2c.load(tmp_path / f"dit{suffix}", num_heads=4)
    assert loaded.config == dit.config
    assert torch.equal(loaded(*GIVEN), dit(*GIVEN))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_official_layout_in_safetensors(dit: l2c.DiT, tmp_path: Path) -> None:
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    loaded = l2c.load(tmp_path / "dit.safetensors", num_heads=4)
    assert torch.equal(loaded(*GIVEN), dit(*GIVEN))


def test_published_sizes_need_no_settings(tmp_path: Path) -> None:
    model = randomised(l2c.DiT.named("DiT-S/8", input_size=16))
    torch.save(model.state_dict(), tmp_path / "DiT-S-8.pt")
    loaded = l2c.load(tmp_path / "DiT-S-8.pt")
    assert loaded.config == model.config
    assert loaded.config["num_heads"] == 6


def test_other_sizes_need_the_number_of_heads(dit: l2c.DiT, tmp_path: Path) -> None:
    torch.save(dit.state_dict(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"hidden size 32 and depth 3.*give num_heads="):
        l2c.load(tmp_path / "dit.pt")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "sprung")


def test_no_pickled_code_runs(dit: l2c.DiT, tmp_path: Path) -> None:
    trap = {**dit.state_dict(), "args": Trap(tmp_path / "trap")}
    torch.save(trap, tmp_path / "dit.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(trap["args"]))
    for name in ("dit.pt", "raw.pt"):
        with pytest.raises(ValueError, match="no whole checkpoint of tensors alone"):
            l2c.load(tmp_path / name, num_heads=4)
    assert not (tmp_path / "trap").exists()


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def test_checkpoints_of_something_else(dit: l2c.DiT, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"for DiT it lacks blocks\.0\.mlp.*for UViT it lacks"):
        l2c.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        l2c.load(path)
    torch.save(without(dit.state_dict(), "blocks.1.attn.proj.bias"), path)
    with pytest.raises(ValueError, match=r"(?s)do not fit DiT.*blocks\.1\.attn\.proj\.bias"):
        l2c.load(path, num_heads=4)
    torch.save({**dit.state_dict(), "t_embedder.mlp.0.bias": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"size mismatch for t_embedder\.mlp\.0\.bias"):
        l2c.load(path, num_heads=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(dit: l2c.DiT, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"dit{suffix}"
    if suffix == ".pt":
        torch.save(dit.state_dict(), path)
    else:
        save_file(dit.state_dict(), path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="no whole checkpoint"):
            l2c.load(path, num_heads=4)


def test_folders(dit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has its own config.json; it takes no num_heads"):
        l2c.load(dit_folder, num_heads=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected config.json and model.safetensors"):
        l2c.load(tmp_path / "empty")

    described = json.loads((dit_folder / "config.json").read_text())
    config = dit_folder / "config.json"
    config.write_text(json.dumps({**described, "_class_name": "Other"}))
    with pytest.raises(ValueError, match="holds a backbone 'Other'; known are DiT"):
        l2c.load(dit_folder)
    config.write_text(json.dumps({**described, "depth": 2}))
    with pytest.raises(ValueError, match=r"(?s)do not fit DiT\(.*'depth': 2.*blocks\.2"):
        l2c.load(dit_folder)
    config.write_text(json.dumps({**described, "width": 2}))
    with pytest.raises(ValueError, match="width"):
        l2c.load(dit_folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        l2c.load(dit_folder)


@pytest.mark.parametrize("path", ["./none", "/none/there", "a/b/c", "none"])
def test_nothing_there(path: str) -> None:
    with pytest.raises(ValueError, match="found nothing at"):
        l2c.load(path)


def test_a_hub_id_that_is_not_there_says_so() -> None:
    with pytest.raises(ValueError, match="no folder someone/model, and no config.json of a hub"):
        l2c.load("someone/model")


def test_the_model_is_the_same_in_another_precision(dit_folder: Path) -> None:
    model = l2c.load(dit_folder).bfloat16()
    out = model(GIVEN[0].bfloat16(), *GIVEN[1:])
    assert out.dtype == torch.bfloat16
    # bfloat16 has 8 bits of mantissa, and errors add up over three blocks
    torch.testing.assert_close(out.float(), tiny_dit()(*GIVEN), rtol=0.1, atol=0.1)


def test_truncated_files_in_the_old_format(dit: l2c.DiT, tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    torch.save(dit.state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(l2c.load(path, num_heads=4)(*GIVEN), dit(*GIVEN))
    content = path.read_bytes()
    for length in (0, 1, 2, 50, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="no whole checkpoint"):
            l2c.load(path, num_heads=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "version https://git-lfs", "hello"])
def test_texts_in_place_of_a_checkpoint(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"dit{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match="no whole checkpoint of tensors alone"):
        l2c.load(path)


@pytest.mark.parametrize("key", ["pos_embed", "x_embedder.proj.weight"])
def test_tensors_of_the_wrong_rank(dit: l2c.DiT, tmp_path: Path, key: str) -> None:
    torch.save({**dit.state_dict(), key: torch.zeros(3)}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=key):
        l2c.load(tmp_path / "dit.pt", num_heads=4)


def test_unknown_settings_of_an_official_file(dit: l2c.DiT, tmp_path: Path) -> None:
    torch.save(dit.state_dict(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="heads"):
        l2c.load(tmp_path / "dit.pt", num_heads=4, heads=4)


@pytest.mark.parametrize("text", ["[]", "3"])
def test_configurations_that_are_no_object(dit_folder: Path, text: str) -> None:
    (dit_folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        l2c.load(dit_folder)


@pytest.mark.parametrize("key", ["num_heads", "patch_size"])
def test_configurations_with_a_zero(dit_folder: Path, key: str) -> None:
    config = dit_folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: 0}))
    with pytest.raises(ValueError, match=key):
        l2c.load(dit_folder)
