"""Resumed runs end, bit for bit, where uninterrupted ones do."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from l2c.router import Router
from tests.fitting import (
    assert_equal_routers,
    averaging,
    checkpoints,
    configuration,
    exported,
    finish,
    lively_dit,
    run,
    started,
    write_config,
    write_latents,
)

Configure = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def sigint_as_before() -> Iterator[None]:
    """Lightning ignores SIGINT after an interrupted training, as the process is about to end."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """`configure(folder, **trainer)` describes one and the same training into a folder."""
    given = tmp_path_factory.mktemp("given")
    lively_dit().save_pretrained(given / "dit")
    write_latents(given / "latents")

    def of(folder: Path, *callbacks: dict[str, Any], every: int = 5, **trainer: Any) -> dict:
        listed = [*callbacks, checkpoints(folder, every), exported(folder)]
        trainer = {"callbacks": listed, "max_steps": 10, **trainer}
        return configuration(folder, given / "dit", given / "latents", **trainer)

    return of


@pytest.fixture(scope="module")
def uninterrupted(
    configure: Configure, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`uninterrupted(*callbacks, **trainer)` gives the router of the training in one go."""
    done: dict[str, Path] = {}

    def of(*callbacks: dict[str, Any], **trainer: Any) -> Path:
        key = str((callbacks, trainer))
        if key not in done:
            folder = tmp_path_factory.mktemp("uninterrupted")
            run("fit", configure(folder, *callbacks, **trainer), folder)
            done[key] = folder / "router.safetensors"
        return done[key]

    return of


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def resume(config: dict[str, Any], folder: Path) -> LightningCLI:
    return run("fit", config, folder, "--ckpt_path", str(last(folder)))


def batches_in(checkpoint: Path) -> int:
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["processed"]


def interrupt(config: dict[str, Any], folder: Path, *options: str) -> None:
    """Run until a Signal among the callbacks presses Ctrl-C."""
    with pytest.raises(SystemExit) as stopped:
        run("fit", config, folder, *options)
    assert stopped.value.code != 0
    assert not (folder / "router.safetensors").exists()


def signals(*batches: int, times: int = 1) -> dict[str, Any]:
    settings = {"batches": list(batches), "times": times}
    return {"class_path": "tests.fitting.Signal", "init_args": settings}


# --- stopped at a checkpoint ---


# six batches make an epoch
@pytest.mark.parametrize(
    ("batches_per_step", "first", "averaged"),
    [
        (1, 5, False),  # within an epoch
        (1, 6, False),  # at its end
        (1, 7, False),  # at the beginning of the next
        (2, 2, False),  # within an epoch, gradients accumulated
        (2, 3, False),  # at its end
        (4, 1, False),  # within an epoch that ends with an incomplete accumulation
        (4, 2, False),  # at its end
        (1, 5, True),
        (1, 6, True),
        (2, 2, True),
        (2, 3, True),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    batches_per_step: int,
    first: int,
    averaged: bool,
    configure: Configure,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    extra = [averaging()] if averaged else []
    trainer = {"accumulate_grad_batches": batches_per_step}
    expected = uninterrupted(*extra, **trainer)
    run("fit", configure(tmp_path, *extra, every=first, max_steps=first, **trainer), tmp_path)
    stopped = Router.load(tmp_path / "router.safetensors")
    assert stopped.provenance["optimizer_steps"] == first
    resume(configure(tmp_path, *extra, every=first, **trainer), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", expected)
    resumed = Router.load(tmp_path / "router.safetensors")
    assert resumed.provenance["optimizer_steps"] == 10
    assert not torch.equal(resumed.scores, stopped.scores)


def test_a_run_resumed_many_times_equals_an_uninterrupted_one(
    configure: Configure, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    run("fit", configure(tmp_path, every=1, max_steps=1), tmp_path)
    for steps in (2, 6, 7, 10):
        resume(configure(tmp_path, every=1, max_steps=steps), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", uninterrupted(accumulate_grad_batches=1))


def test_validation_does_not_disturb_a_resumed_run(
    configure: Configure, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = {"limit_val_batches": 1.0, "val_check_interval": 3}
    run("fit", configure(tmp_path, every=3, max_steps=3, **trainer), tmp_path)
    resume(configure(tmp_path, every=3, **trainer), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", uninterrupted(accumulate_grad_batches=1))


def test_a_run_resumed_at_its_end_changes_nothing(
    configure: Configure, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    run("fit", configure(tmp_path), tmp_path)
    (tmp_path / "router.safetensors").unlink()
    resume(configure(tmp_path), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", uninterrupted(accumulate_grad_batches=1))


# --- stopped by Ctrl-C ---


# six batches make an epoch
@pytest.mark.parametrize(
    ("batches_per_step", "pressed"),
    [
        (1, [2]),  # within an epoch
        (1, [5]),  # in its last batch
        (1, [6]),  # in the first batch of the next
        (1, [4]),  # where a checkpoint is written anyway
        (2, [2]),  # in the first batch of an accumulation
        (2, [3]),  # in its second
        (4, [4]),  # in an incomplete accumulation
        (1, [1, 3, 7]),  # three times
        (2, [1, 6]),  # in the second batch of an accumulation, then in the first of another
    ],
)
def test_a_run_continued_after_ctrl_c_equals_an_uninterrupted_one(
    batches_per_step: int,
    pressed: list[int],
    configure: Configure,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    trainer = {"accumulate_grad_batches": batches_per_step}
    expected = uninterrupted(**trainer)
    interrupt(configure(tmp_path, signals(pressed[0]), **trainer), tmp_path)
    for batch in pressed[1:]:
        config = configure(tmp_path, signals(batch), **trainer)
        interrupt(config, tmp_path, "--ckpt_path", str(last(tmp_path)))
    resume(configure(tmp_path, **trainer), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", expected)


def test_averages_survive_ctrl_c(
    configure: Configure, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    expected = uninterrupted(averaging(), accumulate_grad_batches=1)
    interrupt(configure(tmp_path, averaging(), signals(6)), tmp_path)
    resume(configure(tmp_path, averaging()), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", expected)


def test_ctrl_c_finishes_the_running_batch(configure: Configure, tmp_path: Path) -> None:
    interrupt(configure(tmp_path, signals(2)), tmp_path)
    assert batches_in(last(tmp_path)) == 3


def test_a_second_ctrl_c_stops_within_the_batch(
    configure: Configure, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    interrupt(configure(tmp_path, signals(2, times=2)), tmp_path)
    assert batches_in(last(tmp_path)) == 2
    resume(configure(tmp_path), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", uninterrupted(accumulate_grad_batches=1))


def test_ctrl_c_in_the_last_batch_lets_training_end(
    configure: Configure, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    run("fit", configure(tmp_path, signals(9)), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", uninterrupted(accumulate_grad_batches=1))


@pytest.mark.parametrize("batch", [5, 7])
def test_a_run_continued_after_an_error_equals_an_uninterrupted_one(
    batch: int,
    configure: Configure,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    trainer = {"accumulate_grad_batches": 2}
    expected = uninterrupted(**trainer)
    run("fit", configure(tmp_path, every=2, max_steps=2, **trainer), tmp_path)
    fail = {"class_path": "tests.fitting.Fail", "init_args": {"batch": batch}}  # half a step done
    failing = configure(tmp_path, fail, every=2, **trainer)
    with pytest.raises(ArithmeticError):
        run("fit", failing, tmp_path, "--ckpt_path", str(last(tmp_path)))
    resume(configure(tmp_path, every=2, **trainer), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", expected)


@pytest.mark.parametrize("failing", [False, True], ids=["success", "error"])
def test_sigint_is_given_back_after_training(
    failing: bool, configure: Configure, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    fail = {"class_path": "tests.fitting.Fail", "init_args": {"batch": 2 if failing else 99}}
    with pytest.raises(ArithmeticError) if failing else nullcontext():
        run("fit", configure(tmp_path, fail), tmp_path)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_run_interrupted_from_outside_continues(
    configure: Configure, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    slow = {"class_path": "tests.fitting.Slow"}
    config = write_config(configure(tmp_path, slow, max_steps=60), tmp_path / "slow.yaml")
    with started("fit", config) as process:
        deadline = time.monotonic() + 120
        while not last(tmp_path).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output = finish(process)
    assert process.returncode != 0, output
    assert last(tmp_path).is_file(), output
    assert 5 <= batches_in(last(tmp_path)) < 60
    assert not (tmp_path / "router.safetensors").exists()
    resume(configure(tmp_path, max_steps=60), tmp_path)
    assert_equal_routers(tmp_path / "router.safetensors", uninterrupted(max_steps=60))


# --- what a checkpoint does not decide ---


def test_settings_come_from_yaml_and_not_from_the_checkpoint(
    configure: Configure, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run("fit", configure(folder, max_steps=5), folder)
    config = configure(folder)
    settings = config["model"]["init_args"]
    settings |= {"threshold": 0.3, "clamp": 2.0}
    settings["objective"]["init_args"] = {"penalty": 0.5, "label_dropout": 0.2}
    cli = resume(config, folder)
    assert cli.trainer.global_step == 10
    router = Router.load(folder / "router.safetensors")
    assert router.threshold == 0.3
    assert router.provenance["clamp"] == 2.0
    assert router.provenance["objective"]["penalty"] == 0.5


def test_optimizer_settings_come_from_yaml_and_not_from_the_checkpoint(
    configure: Configure, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run("fit", configure(folder, max_steps=5), folder)
    config = configure(folder)
    given = {"lr": 0.025, "weight_decay": 0.5, "betas": [0.8, 0.99]}
    config["model"]["init_args"]["optimizer"]["init_args"] = given
    (group,) = resume(config, folder).trainer.optimizers[0].param_groups
    assert group["lr"] == 0.025
    assert group["weight_decay"] == 0.5
    assert tuple(group["betas"]) == (0.8, 0.99)
