"""Schedules of SmoothCache (Liu et al. 2024): JSON objects of lists of 1, compute, and 0, reuse.

A list has an entry per evaluation, in calling order. Its key is a type of layer, "attn" or "mlp",
or a type and the name of the block in its list, "attn-0", which then goes before the type; a layer
without a list is always computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2c.files import replacing
from l2c.plan import Plan
from l2c.site import Site, Sites

ALIASES = {"attn1": "attn", "ff": "mlp"}  # names of the same layers in diffusers' DiT


def read(path: Path) -> dict[str, list[int]]:
    """Read a schedule: lists of 0 and 1 of one length, the first entry 1.

    Raises:
        ValueError: If it is anything else; naming the list.
    """
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file of a schedule: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"expected a JSON object of lists in {path}, found {content!r:.60}")
    lengths = {}
    for key, row in content.items():
        if not isinstance(row, list) or not row:
            raise ValueError(f"{path}: expected a list of 0 and 1 as {key!r}, found {row!r:.60}")
        wrong = [entry for entry in row if type(entry) is not int or entry not in (0, 1)]
        if wrong:
            raise ValueError(f"{path}: expected 0 (reuse) or 1 in {key!r}, found {wrong[0]!r:.60}")
        if row[0] != 1:
            raise ValueError(
                f"{path}: {key!r} reuses in evaluation 0, before anything was computed; expected 1"
            )
        lengths[key] = len(row)
    first = next(iter(lengths))
    for key, length in lengths.items():
        if length != lengths[first]:
            raise ValueError(
                f"{path}: expected lists of one length, found {lengths[first]} entries in "
                f"{first!r} and {length} in {key!r}"
            )
    return content


def table(schedule: Mapping[str, list[int]], sites: Sites) -> Tensor:
    """What a schedule computes, bool [evaluation, site].

    Raises:
        ValueError: If it has lists for layers that these sites lack, or for some blocks alone.
    """
    lists: dict[str, list[int]] = {}
    for key, row in schedule.items():
        kind, dash, block = key.partition("-")
        name = ALIASES.get(kind, kind) + dash + block
        if name in lists:
            raise ValueError(f"it has {key!r} beside another list for {name!r}; keep one")
        lists[name] = row
    keys = [_keys(site) for site in sites]
    kinds = list(dict.fromkeys(kind for kind, _ in keys))
    blocks = list(dict.fromkeys(block for _, block in keys))
    foreign = [name for name in lists if name not in (*kinds, *blocks)]
    if foreign:
        raise ValueError(
            f"it has lists for {', '.join(foreign[:4])}; the model has {', '.join(kinds)}, and by "
            f"block {blocks[0]} to {blocks[-1]}"
        )
    for kind, block in keys:
        listed = any(name.startswith(f"{kind}-") for name in lists)
        if listed and kind not in lists and block not in lists:
            raise ValueError(f"it lists {kind} by block, but not {block}, which the model has")
    full = [1] * len(next(iter(lists.values())))
    columns = [lists.get(block, lists.get(kind, full)) for kind, block in keys]
    return torch.tensor(columns).T.bool()


def write(plan: Plan, path: Path) -> None:
    """Write a plan as a schedule: by type if all blocks agree, else by block.

    Raises:
        ValueError: If blocks differ that SmoothCache does not tell apart, as `in_blocks.0` and
            `out_blocks.0` of U-ViT.
    """
    columns = [list(map(int, column)) for column in zip(*plan.compute, strict=True)]
    keys = [_keys(site) for site in plan.sites]
    for level in (0, 1):
        lists: dict[str, list[int]] = {}
        for key, column in zip(keys, columns, strict=True):
            lists.setdefault(key[level], column)
        clash = [
            site.name
            for site, key, column in zip(plan.sites, keys, columns, strict=True)
            if lists[key[level]] != column
        ]
        if not clash:
            break
    if clash:
        raise ValueError(
            f"the plan treats {clash[0]} unlike another site that SmoothCache also calls "
            f"{dict(zip(plan.sites.names, keys, strict=True))[clash[0]][1]!r}; write .safetensors"
        )
    lines = ",\n".join(f'  "{key}": {json.dumps(column)}' for key, column in lists.items())
    with replacing(path) as temporary:
        temporary.write_text(f"{{\n{lines}\n}}\n")


def _keys(site: Site) -> tuple[str, str]:
    """The two keys under which SmoothCache looks a site up: its type, and with its block's name."""
    *_, block, kind = site.name.split(".")
    return kind, f"{kind}-{block}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)
