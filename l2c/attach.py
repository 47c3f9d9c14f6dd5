"""Where a backbone can be cached, and the one way in which l2c gets hold of it.

Only this file knows the names of a backbone's parts. An anchor is a callable attribute of a
module that computes one cacheable output with everything that only this output needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Call = Callable[..., Any]

_ABSENT = object()


@dataclass(frozen=True)
class Family:
    """How the blocks of one backbone class are laid out.

    Args:
        containers: Names of the blocks, or of the module lists that hold them, in calling order.
        anchors: Site name within a block -> the block's method that computes its output.
        modulated: Names of the containers and modules whose method `modulation` depends on nothing
            but the model's `condition(t, y)`.
        joins: Site name within a block -> the block's method that takes the tokens first and
            returns them with the site's output, times its gate, added. Without them the sites of
            a model are reused one by one.
        gates: Site name within a block -> which part of the block's `modulation` is its gate, for
            all sites or, without gates, none.
        chained: Names of the containers whose blocks do nothing but joins, and hand their tokens
            to the next block alone.
    """

    containers: tuple[str, ...]
    anchors: Mapping[str, str]
    modulated: tuple[str, ...] = ()
    joins: Mapping[str, str] = field(default_factory=dict)
    gates: Mapping[str, int] = field(default_factory=dict)
    chained: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "DiT": Family(
        ("blocks",),
        {"attn": "attention", "mlp": "feedforward"},
        modulated=("blocks", "final_layer"),
        joins={"attn": "add_attention", "mlp": "add_feedforward"},
        gates={"attn": 2, "mlp": 5},
        chained=("blocks",),
    ),
    # An in-block's tokens also go to an out-block, which merges them before it adds.
    "UViT": Family(
        ("in_blocks", "mid_block", "out_blocks"),
        {"attn": "attention", "mlp": "feedforward"},
        joins={"attn": "add_attention", "mlp": "add_feedforward"},
    ),
}


@dataclass(frozen=True)
class Anchor:
    """The attribute of `module` that computes the output of the site called `name`."""

    name: str
    module: nn.Module
    attribute: str


def anchors(model: nn.Module) -> tuple[Anchor, ...]:
    """The cacheable calls of a model, in calling order.

    Raises:
        ValueError: If the class of the model is not known, or nothing in it matched.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"no sites are declared for {name}; known backbones are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    found = [
        Anchor(f"{name}.{site}", block, attribute)
        for container in family.containers
        for name, block in _blocks(model, container)
        for site, attribute in family.anchors.items()
        if hasattr(block, attribute)
    ]
    if not found:
        raise ValueError(f"no site matched in this {name}: it has no blocks")
    return tuple(found)


@dataclass(frozen=True)
class Residual:
    """How the outputs of a model's sites enter its tokens.

    Args:
        joins: The attribute that adds the output of each site.
        gates: By site, the module whose `modulation` has its gate, and which part it is; empty
            for a model without gates.
        begins: Sites before which tokens go elsewhere too, or are changed by something else.
        chains: Containers of blocks that can be left out, as attributes, and their blocks, each
            with the indices of its sites.
    """

    joins: tuple[Anchor, ...]
    gates: tuple[tuple[nn.Module, int], ...]
    begins: frozenset[int]
    chains: Mapping[tuple[nn.Module, str], tuple[tuple[nn.Module, range], ...]]


def residual(model: nn.Module) -> Residual | None:
    """How outputs enter the tokens of a model; None if that is not declared for all its sites."""
    family = FAMILIES.get(type(model).__name__)
    if family is None or set(family.joins) != set(family.anchors):
        return None
    joins: list[Anchor] = []
    gates: list[tuple[nn.Module, int]] = []
    begins, chains = set(), {}
    for container in family.containers:
        begins.add(len(joins))
        blocks = []
        for name, block in _blocks(model, container):
            first = len(joins)
            for site, attribute in family.anchors.items():
                if hasattr(block, attribute):
                    joins.append(Anchor(f"{name}.{site}", block, family.joins[site]))
                    if family.gates:
                        gates.append((block, family.gates[site]))
            blocks.append((block, range(first, len(joins))))
        if container in family.chained and all(sites for _, sites in blocks):
            chains[model, container] = tuple(blocks)
        else:
            begins.update(sites.start for _, sites in blocks)
    return Residual(tuple(joins), tuple(gates), frozenset(begins), chains)


def _blocks(model: nn.Module, container: str) -> list[tuple[str, nn.Module]]:
    found = model.get_submodule(container)
    if not isinstance(found, nn.ModuleList):
        return [(container, found)]
    return [(f"{container}.{i}", block) for i, block in enumerate(found)]


@contextmanager
def attached(
    model: nn.Module,
    wrap_site: Callable[[int, Call], Call],
    wrap_forward: Callable[[Call], Call] | None = None,
    wrap_join: Callable[[int, Call], Call] | None = None,
) -> Iterator[None]:
    """Route a model's cacheable calls through wrappers; on exit the model is as it was.

    Args:
        model: The model; its class decides the sites.
        wrap_site: `wrap_site(index, call)` returns what stands in for the call of site `index`.
        wrap_forward: The same for the model's own forward.
        wrap_join: The same for what adds the output of site `index`, of a model that declares it.

    Raises:
        ValueError: If the model is attached to already.
    """
    if "_l2c_attached" in model.__dict__:
        raise ValueError(
            f"this {type(model).__name__} is cached or recorded already; leave the other "
            "`with` block first"
        )
    targets = [(a.module, a.attribute) for a in anchors(model)]
    wrappers = [wrap_site(i, getattr(*target)) for i, target in enumerate(targets)]
    if wrap_join is not None:
        adding = residual(model)
        assert adding is not None
        joins = [(a.module, a.attribute) for a in adding.joins]
        targets += joins
        wrappers += [wrap_join(i, getattr(*target)) for i, target in enumerate(joins)]
    if wrap_forward is not None:
        targets.append((model, "forward"))
        wrappers.append(wrap_forward(model.forward))
    model.__dict__["_l2c_attached"] = True
    try:
        with replaced(targets, wrappers):
            yield
    finally:
        del model.__dict__["_l2c_attached"]


def modulated(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules whose `modulation` depends on timestep and label alone; none if not declared."""
    family = FAMILIES.get(type(model).__name__)
    names = family.modulated if family else ()
    return tuple(module for name in names for _, module in _blocks(model, name))


@contextmanager
def replaced(targets: Sequence[tuple[nn.Module, str]], calls: Sequence[Any]) -> Iterator[None]:
    """Put calls, or others, in the place of attributes of modules; on exit all is as it was."""
    before = [module.__dict__.get(attribute, _ABSENT) for module, attribute in targets]
    try:
        for (module, attribute), call in zip(targets, calls, strict=True):
            module.__dict__[attribute] = call
        yield
    finally:
        for (module, attribute), original in zip(targets, before, strict=True):
            if original is _ABSENT:
                module.__dict__.pop(attribute, None)
            else:
                module.__dict__[attribute] = original
