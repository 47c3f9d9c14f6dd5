"""The README's code runs, its tables are those of the measurements, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.tables import DOCUMENTS, filled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, scope)  # noqa: S102
    images = scope["images"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (10, 1, 28, 28)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_measurements(path: Path) -> None:
    assert filled(path.read_text()) == path.read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_named_files_exist(path: Path) -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    named += re.findall(r"(?:configs|benchmarks|docs)/[\w/]+\.\w+", path.read_text())
    assert named
    for name in named:
        assert (path.parent / name).exists() or (ROOT / name).exists(), name


def test_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert {"quickstart", "test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
