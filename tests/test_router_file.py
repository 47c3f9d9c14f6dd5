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
from l2c.reuse import Reuse
from tests.conftest import make_router


@pytest.fixture
def path(router: l2c.Router, tmp_path: Path) -> Path:
    router.save(tmp_path / "router.safetensors")
    return tmp_path / "router.safetensors"


def same(a: l2c.Router, b: l2c.Router) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("scores", "gated", "updates")
    )
    plain = ("sites", "schedule", "identity", "threshold", "guidance_scale", "reuse", "budget")
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
    assert described["format"] == 2
    assert described["version"] == l2c.__version__
    assert described["identity"]["backbone"] == "DiT"
    assert described["identity"]["config"] == dit.config
    assert len(described["identity"]["weights"]) == 64
    assert described["schedule"]["timesteps"] == [999, 799, 599, 400, 200, 0]
    assert described["sites"][0] == ["blocks.0.attn", l2c.sites(dit)[0].macs, [16, 32]]
    assert described["reuse"] == {"kind": "copy", "order": 0, "relative": False}
    assert described["streams"] == 1
    assert described["budget"] is None
    assert {"rest", "threshold", "guidance_scale", "provenance"} <= described.keys()


@pytest.mark.parametrize("width", [1, 32])
@pytest.mark.parametrize("kind", ["copy", "taylor", "newton"])
@pytest.mark.parametrize("parts", [("corrections",), ("shift",), ("corrections", "shift")])
def test_what_was_learned_about_reuse_comes_back_bit_by_bit(
    dit: l2c.DiT,
    schedule: l2c.Schedule,
    tmp_path: Path,
    kind: str,
    width: int,
    parts: tuple[str, ...],
) -> None:
    g = torch.Generator().manual_seed(0)
    order = 0 if kind == "copy" else 2
    learned = {
        "corrections": torch.randn(6, 6, order + 1, width, generator=g),
        "shift": torch.randn(6, 6, 32, generator=g),
    }
    reuse = Reuse(kind, order, **{part: learned[part] for part in parts})
    router = make_router(dit, schedule, reuse=reuse, budget=0.75)
    path = tmp_path / "router.safetensors"
    router.save(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"scores", "gated", "updates", *parts}
        for part in parts:
            assert torch.equal(file.get_tensor(part), learned[part])
        described = json.loads(file.metadata()["l2c"])
    assert described["reuse"] == {"kind": kind, "order": order, "relative": False}
    assert described["budget"] == 0.75
    loaded = l2c.Router.load(path, dit)
    assert same(loaded, router)
    assert loaded.plan() == router.plan()
    content = path.read_bytes()
    loaded.save(path)
    again = l2c.Router.load(path)
    assert same(again, router)
    flipped = bytearray(content)
    flipped[-100] ^= 1  # the last tensor of the file
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged: its checksum differs"):
        l2c.Router.load(path)


def test_what_was_trained_and_may_have_a_gradient_is_saved_as_it_is(
    dit: l2c.DiT, schedule: l2c.Schedule, tmp_path: Path
) -> None:
    shift = torch.randn(32, 6, 6).permute(2, 1, 0).double().requires_grad_()
    router = make_router(dit, schedule, reuse=Reuse(shift=shift))
    router.save(tmp_path / "r.safetensors")
    loaded = l2c.Router.load(tmp_path / "r.safetensors").reuse
    assert loaded.corrections is None
    assert loaded.shift is not None
    assert loaded.shift.dtype == torch.float32
    assert torch.equal(loaded.shift, shift.detach().float())


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


def ruled(kind: str, order: object) -> dict[str, object]:
    return {"kind": kind, "order": order, "relative": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3, "version": "9.9"}, "router format 3.*reads format 2.*l2c 9.9"),
        ({"format": 1, "version": "0.1"}, "router format 1.*reads format 2.*l2c 0.1, install that"),
        ({"scores": torch.full((6, 6), torch.nan)}, "not a usable router: .*NaN"),
        ({"scores": torch.rand(5, 6)}, r"not a usable router: .*got \(5, 6\)"),
        ({"scores": torch.rand(6, 6).double()}, "expected a tensor scores of torch.float32"),
        ({"schedule": {}}, "incomplete: KeyError"),
        ({"sites": []}, "not a usable router"),
        ({"identity": {"backbone": "DiT"}}, "incomplete"),
        ({"identity": {"backbone": "DiT", "config": {}, "weights": 3}}, "incomplete"),
        ({"reuse": ruled("spline", 2)}, "not a usable router: unknown rule 'spline'"),
        ({"reuse": ruled("taylor", 4)}, "not a usable router: .*order from 1 to 3"),
        ({"reuse": ruled("taylor", "2")}, "incomplete"),
        ({"reuse": {"kind": "taylor", "relative": False}}, "incomplete: KeyError"),
        ({"budget": 1.5}, r"not a usable router: .*budget in \(0, 1\], got 1.5"),
        ({"budget": "half"}, "incomplete"),
        ({"corrections": torch.zeros(6, 6, 2, 32)}, "not a usable router: .*1 terms for copy"),
        ({"corrections": torch.zeros(5, 6, 1, 32)}, "not a usable router: .*6 evaluations and 6"),
        ({"corrections": torch.zeros(6, 6, 1, 16)}, r"not a usable router: .*\[32\], got 16"),
        ({"corrections": torch.zeros(6, 6, 1, 32).half()}, "corrections of torch.float32"),
        ({"shift": torch.full((6, 6, 32), torch.inf)}, "not a usable router: .*finite shift"),
        ({"shift": torch.zeros(6, 6)}, "not a usable router: .*a shift"),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_too_many(path: Path, dtype: torch.dtype) -> None:
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["l2c"]
    sign(path, text)
    l2c.Router.load(path)
    sign(path, text, other=torch.zeros(2, dtype=dtype))
    with pytest.raises(ValueError, match=f"{path.name} is no whole router: .*found .*other"):
        l2c.Router.load(path)
    sign(path, text, shift=torch.zeros(6, 6, 32), other=torch.zeros(2))
    with pytest.raises(ValueError, match="no whole router: .*corrections, shift, found .*other"):
        l2c.Router.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rest": None},
        {"rest": "many"},
        {"sites": [["a", "b", [2]]] * 6},
        {"sites": [[1, 2, [2]]] * 6},
        {"sites": [["a", 2]] * 6},
        {"sites": [["a", 2, 3]] * 6},
        {"sites": [["a", 2, ["3"]]] * 6},
    ],
)
def test_costs_and_names_of_the_wrong_type(path: Path, changes: dict[str, object]) -> None:
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=path.name):
        l2c.Router.load(path)


def test_another_format_is_named_before_anything_else_is_judged(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["l2c"])
    text = json.dumps({**described, "format": 3, "version": "9.9"})
    save_file({"packed": torch.zeros(3)}, path, {"l2c": text})
    with pytest.raises(ValueError, match=r"router format 3.*reads format 2.*l2c 9\.9"):
        l2c.Router.load(path)


def test_a_file_of_the_first_format_is_refused_with_the_version_that_reads_it(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["l2c"])
    for added in ("reuse", "budget"):
        del described[added]
    described["sites"] = [site[:2] for site in described["sites"]]
    sign(path, json.dumps({**described, "format": 1, "version": "0.1.0"}))
    with pytest.raises(
        ValueError, match=r"router format 1, this .*reads format 2; .*l2c 0\.1\.0, install that one"
    ):
        l2c.Router.load(path)
