"""The same promises on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import l2c
from l2c.sampling import initial_latents
from tests.conftest import make_router, tiny_dit
from train.cli import main

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_plan_is_bit_identical(dtype: torch.dtype) -> None:
    model = tiny_dit().to("cuda", dtype)
    schedule = l2c.Schedule.ddim(6)
    noise = initial_latents(model, 4, torch.Generator().manual_seed(0))
    plan = l2c.Plan.full(6, l2c.sites(model))
    plain = l2c.sample(model, schedule, [0, 1, 2, 3], 1.5, latents=noise)
    assert plain.is_cuda
    assert torch.equal(
        plain, l2c.sample(model, schedule, [0, 1, 2, 3], 1.5, latents=noise, plan=plan)
    )


def test_cached_samples_equal_those_of_the_cpu() -> None:
    model, schedule = tiny_dit(), l2c.Schedule.ddim(6)
    router = make_router(model, schedule)
    noise = initial_latents(model, 4, torch.Generator().manual_seed(0))
    cpu = l2c.sample(model, schedule, [0, 1, 2, 3], 1.5, latents=noise, router=router)
    model.cuda()
    gpu = l2c.sample(model, schedule, [0, 1, 2, 3], 1.5, latents=noise, router=router)
    # other kernels sum in another order; six evaluations amplify float32 rounding
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-3, atol=1e-3)


def test_router_trains(dit_folder: Path, tmp_path: Path) -> None:
    source = {
        "class_path": "TeacherSamples",
        "init_args": {"backbone": str(dit_folder), "count": 32, "folder": str(tmp_path / "drawn")},
    }
    config = {
        "trainer": {
            "max_steps": 3,
            "accelerator": "gpu",
            "devices": 1,
            "precision": "bf16-mixed",
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "ExportRouter",
                    "init_args": {"path": str(tmp_path / "r.safetensors")},
                }
            ],
        },
        "model": {
            "class_path": "RouterTraining",
            "init_args": {"backbone": str(dit_folder), "evaluations": 6},
        },
        "data": {"class_path": "Images", "init_args": {"batch_size": 8, "source": source}},
    }
    main({"subcommand": "fit", "fit": config})
    l2c.Router.load(tmp_path / "r.safetensors", l2c.load(dit_folder))
