"""Forward processes: noise levels against diffusers, between timesteps, and rectified flow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import l2c
from l2c.noise import process


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_noise_equals_diffusers(betas: str) -> None:
    noise = l2c.Noise(betas, 0.00085, 0.012)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=betas)
    # float32 in diffusers
    torch.testing.assert_close(
        noise.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6
    )
    clean, eps = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    t = torch.tensor([10, 990])
    torch.testing.assert_close(noise.add(clean, eps, t), scheduler.add_noise(clean, eps, t))


@pytest.mark.parametrize(
    "values", [{"betas": "cosine"}, {"start": 0.0}, {"end": 1.0}, {"timesteps": 0}]
)
def test_noise_that_is_none(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected|must be"):
        l2c.Noise(**values)


def test_the_uvit_s_noise_is_stable_diffusion_s_counted_from_1() -> None:
    noise = l2c.Noise.uvit()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    products = np.cumprod(1 - betas)
    assert (noise.first, noise.last) == (1, 1000)
    for t in (1, 2, 500, 1000):
        # float64, up to a thousand products in another order
        assert noise.acp(t) == pytest.approx(products[t - 1], rel=1e-12)
    assert noise.acp(1) == pytest.approx(1 - 0.00085)
    assert noise.acp(1000) == pytest.approx(0.00466, abs=5e-6)
    shifted = l2c.Noise("scaled_linear", 0.00085, 0.012)
    assert [noise.acp(t + 1) for t in range(1000)] == [shifted.acp(t) for t in range(1000)]


@pytest.mark.parametrize("noise", [l2c.Noise(), l2c.Noise.uvit()], ids=["dit", "uvit"])
class TestBetweenTimesteps:
    def test_whole_ones_are_exact(self, noise: l2c.Noise) -> None:
        for t in range(noise.first, noise.last + 1):
            exact = float(noise.alphas_cumprod[t - noise.first])
            assert noise.acp(t) == noise.acp(float(t)) == exact

    def test_log_acp_is_linear(self, noise: l2c.Noise) -> None:
        for t in (noise.first, 17, 500, noise.last - 1):
            low, high = math.log(noise.acp(t)), math.log(noise.acp(t + 1))
            for share in (0.25, 0.5, 0.9):
                expected = low + share * (high - low)
                assert math.log(noise.acp(t + share)) == pytest.approx(expected, rel=1e-12)

    def test_log_snr_falls_and_is_that_of_signal_and_noise(self, noise: l2c.Noise) -> None:
        grid = np.linspace(noise.first, noise.last, 5000)
        values = [noise.half_log_snr(float(t)) for t in grid]
        assert all(a > b for a, b in zip(values, values[1:], strict=False))
        for t in (noise.first, 250.5, noise.last):
            acp = noise.acp(t)
            assert values[0] >= noise.half_log_snr(t) >= values[-1]
            expected = math.log(math.sqrt(acp) / math.sqrt(1 - acp))
            assert noise.half_log_snr(t) == pytest.approx(expected, rel=1e-12)

    def test_timestep_is_the_inverse_of_log_snr(self, noise: l2c.Noise) -> None:
        for t in np.linspace(noise.first, noise.last, 3001):
            # float64; log acp near 0 has lost four digits
            assert noise.timestep(noise.half_log_snr(float(t))) == pytest.approx(t, abs=1e-8)

    def test_log_snr_beyond_the_ends_is_that_of_the_ends(self, noise: l2c.Noise) -> None:
        assert noise.timestep(100.0) == noise.first
        assert noise.timestep(-100.0) == noise.last

    @pytest.mark.parametrize("beyond", [-1, -0.5, 0.5, 1])
    def test_timesteps_beyond_the_ends_are_refused(self, noise: l2c.Noise, beyond: float) -> None:
        t = (noise.first if beyond < 0 else noise.last) + beyond
        with pytest.raises(ValueError, match=f"between {noise.first} and {noise.last}, got {t}"):
            noise.acp(t)

    def test_adding_noise_takes_each_sample_s_timestep(self, noise: l2c.Noise) -> None:
        clean, eps = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
        for given in ([noise.first, 300, noise.last], [noise.first, 300.5, 999.75 - 1]):
            t = torch.tensor(given)
            noisy = noise.add(clean, eps, t)
            for i, s in enumerate(given):
                acp = noise.acp(s)
                expected = acp**0.5 * clean[i] + (1 - acp) ** 0.5 * eps[i]
                # float64, and two ways to take a root
                torch.testing.assert_close(noisy[i], expected, rtol=1e-14, atol=1e-14)

    def test_json_and_back(self, noise: l2c.Noise) -> None:
        assert process(noise.to_dict()) == noise


def test_adding_noise_refuses_a_timestep_before_the_first() -> None:
    clean = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="timesteps from 1 on, got 0"):
        l2c.Noise.uvit().add(clean, clean, torch.tensor([0, 5]))


def test_noise_written_before_there_was_a_first_timestep_counts_from_0() -> None:
    old = {"betas": "linear", "start": 1e-4, "end": 0.02, "timesteps": 1000}
    assert process(old) == l2c.Noise()


def test_flow_equals_diffusers() -> None:
    flow, scheduler = l2c.Flow(), FlowMatchEulerDiscreteScheduler()
    clean, eps = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    t = scheduler.timesteps[[0, 1, 500, 999]]
    torch.testing.assert_close(flow.add(clean, eps, t), scheduler.scale_noise(clean, t, eps))
    assert torch.equal(flow.add(clean, eps, torch.full((4,), 1000)), eps)
    assert torch.equal(flow.add(clean, eps, torch.zeros(4)), clean)
    assert (flow.first, flow.last) == (0, 1000)
    assert process(l2c.Flow(500).to_dict()) == l2c.Flow(500)
    with pytest.raises(ValueError, match="timesteps >= 1, got 0"):
        l2c.Flow(0)
