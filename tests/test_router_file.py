"""The router file: everything comes back, and nothing damaged or foreign gets in."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import l2c
from tests.conftest import make_router


@pytest.fixture
def path(router: l2c.Router, tmp_path: Path) -> Path:
    router.save(tmp_path / "router.safetensors")
    return tmp_path / "router.safetensors"


def same(a: l2c.Router, b: l2c.Router) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("scores", "gated", "updates")
    )
    plain = ("sites", "schedule", "identity", "threshold", "guidance_scale")
    return tensors and all(getattr(a, name) == getattr(b, name) for name in plain)


def test_everything_comes_back(dit: l2c.DiT, schedule: l2c.Schedule, tmp_path: Path) -> None:
    router = make_router(
        dit,
        schedule,
        threshold=0.1,
        guidance_scale=1.5,
        provenance={"objective": {"name": "l2c-pairs", "penalty": 1e-6}, "steps": 10},
    )
    router.save(tmp_path / "r.safetensors")
    loaded = l2c.Router.load(tmp_path / "r.safetensors", dit, schedule, 1.5)
    assert same(loaded, router)
    assert loaded.provenance == {**router.provenance, "l2c_version": l2c.__version__}


def test_what_nobody_recorded_comes_back(router: l2c.Router, tmp_path: Path) -> None:
    identity = dataclasses.replace(router.identity, weights=None)
    updates = torch.where(router.gated, -1, 0)
    given = dataclasses.replace(router, identity=identity, updates=updates)
    given.save(tmp_path / "r.safetensors")
    assert same(l2c.Router.load(tmp_path / "r.safetensors"), given)


def test_is_a_plain_safetensors_file_that_describes_itself(path: Path, dit: l2c.DiT) -> None:
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"scores", "gated", "updates"}
        described = json.loads(file.metadata()["l2c"])
    assert described["format"] == 1
    assert described["version"] == l2c.__version__
    assert described["identity"]["backbone"] == "DiT"
    assert described["identity"]["config"] == dit.config
    assert len(described["identity"]["weights"]) == 64
    assert described["schedule"]["timesteps"] == [999, 799, 599, 400, 200, 0]
    assert described["sites"][0] == ["blocks.0.attn", l2c.sites(dit)[0].macs]
    assert {"rest", "threshold", "guidance_scale", "provenance"} <= described.keys()


def test_loading_checks_what_it_is_given(path: Path, dit: l2c.DiT) -> None:
    with pytest.raises(ValueError, match="expected 6, got 20"):
        l2c.Router.load(path, dit, l2c.Schedule.ddim(20))


def test_saving_replaces_the_old_file(path: Path, dit: l2c.DiT) -> None:
    other = make_router(dit, l2c.Schedule.ddim(4), seed=2)
    other.save(path)
    assert same(l2c.Router.load(path), other)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failing_save_leaves_the_old_file(
    path: Path, dit: l2c.DiT, schedule: l2c.Schedule
) -> None:
    before = path.read_bytes()
    unwritable = make_router(dit, schedule, provenance={"model": dit})
    with pytest.raises(TypeError):
        unwritable.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        l2c.Router.load(path)


def test_truncated_with_a_header_that_begins_as_a_pickle(router: l2c.Router, path: Path) -> None:
    lengths = set()
    for padding in range(0, 256, 8):  # safetensors pads headers to multiples of 8
        dataclasses.replace(router, provenance={"note": "x" * padding}).save(path)
        content = path.read_bytes()
        lengths.add(content[0])
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="no whole safetensors file"):
            l2c.Router.load(path)
    assert 0x80 in lengths


def test_no_flipped_bit_goes_unseen(path: Path, router: l2c.Router) -> None:
    content = path.read_bytes()
    refused = 0
    draw = random.Random(0)
    for _ in range(400):
        position, bit = draw.randrange(len(content)), draw.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            loaded = l2c.Router.load(path)
        except ValueError:
            refused += 1
        else:
            assert same(loaded, router), f"bit {bit} of byte {position}"
    assert refused > 380  # a few bits, as in padding, mean nothing


def rewrite(path: Path, **changes: object) -> None:
    """Change the description and sign it again, as someone who edits on purpose would."""
    from l2c.router_file import _checksum

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in ("scores", "gated", "updates")}
        described = json.loads(file.metadata()["l2c"])
    tensors.update({k: v for k, v in changes.items() if isinstance(v, torch.Tensor)})
    plain = {k: v for k, v in changes.items() if not isinstance(v, torch.Tensor)}
    text = json.dumps({**described, **plain})
    save_file(tensors, path, {"l2c": text, "sha256": _checksum(text, tensors)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "version": "9.9"}, "router format 2.*reads format 1.*l2c 9.9"),
        ({"scores": torch.full((6, 6), torch.nan)}, "not a usable router: .*NaN"),
        ({"scores": torch.rand(5, 6)}, r"not a usable router: .*got \(5, 6\)"),
        ({"scores": torch.rand(6, 6).double()}, "expected a tensor scores of torch.float32"),
        ({"schedule": {}}, "incomplete: KeyError"),
        ({"sites": []}, "not a usable router"),
        ({"identity": {"backbone": "DiT"}}, "incomplete"),
        ({"identity": {"backbone": "DiT", "config": {}, "weights": 3}}, "incomplete"),
    ],
)
def test_signed_but_wrong(path: Path, changes: dict[str, object], message: str) -> None:
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        l2c.Router.load(path)


def test_edited_without_the_checksum(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in ("scores", "gated", "updates")}
        metadata = dict(file.metadata())
    tensors["scores"] = 1 - tensors["scores"]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="damaged: its checksum differs"):
        l2c.Router.load(path)


def test_foreign_files(path: Path, dit_folder: Path, router: l2c.Router) -> None:
    with pytest.raises(ValueError, match="safetensors file but no router"):
        l2c.Router.load(dit_folder / "model.safetensors")
    torch.save({"scores": router.scores}, path)
    with pytest.raises(ValueError, match="is a pickle, which can run any code"):
        l2c.Router.load(path)
    torch.save({"scores": router.scores}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is a pickle"):
        l2c.Router.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        l2c.Router.load(path)
    with pytest.raises(ValueError, match="expected a router file at .*, found none"):
        l2c.Router.load(path.with_name("none"))


def test_a_save_that_fails_late_leaves_nothing(router: l2c.Router, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        router.save(tmp_path / "folder")  # written beside it, but cannot take its place
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def sign(path: Path, text: str, **more: torch.Tensor) -> None:
    """Write any text as the description, with its right checksum where there can be one."""
    from l2c.router_file import _checksum

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in ("scores", "gated", "updates")}
    save_file({**tensors, **more}, path, {"l2c": text, "sha256": _checksum(text, tensors)})


@pytest.mark.parametrize("text", ["[]", "null", "3", '"router"'])
def test_a_description_that_is_no_object(path: Path, text: str) -> None:
    sign(path, text)
    with pytest.raises(ValueError, match=path.name):
        l2c.Router.load(path)


def test_a_tensor_too_many(path: Path) -> None:
    sign(path, "{}", other=torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=path.name):
        l2c.Router.load(path)


@pytest.mark.parametrize(
    "changes",
    [{"rest": None}, {"rest": "many"}, {"sites": [["a", "b"]] * 6}, {"sites": [[1, 2]] * 6}],
)
def test_costs_and_names_of_the_wrong_type(path: Path, changes: dict[str, object]) -> None:
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=path.name):
        l2c.Router.load(path)


def test_another_format_is_named_before_anything_else_is_judged(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["l2c"])
    text = json.dumps({**described, "format": 2, "version": "9.9"})
    save_file({"packed": torch.zeros(3)}, path, {"l2c": text})
    with pytest.raises(ValueError, match=r"router format 2.*reads format 1.*l2c 9\.9"):
        l2c.Router.load(path)
