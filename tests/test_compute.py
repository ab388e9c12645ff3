"""Parameters, operations, time and memory of networks whose numbers are known."""

import sys

import pytest
import torch
from torch import nn

from causalvae.compute import cost, flops, num_parameters
from causalvae.models.build import build
from causalvae.models.presets import PRESETS

CPU = torch.device("cpu")


def test_parameters_are_counted_once() -> None:
    shared = nn.Linear(3, 4)
    assert num_parameters(nn.Sequential(shared, nn.Linear(4, 3), shared)) == 16 + 15


def test_operations_of_a_convolution_and_of_a_product() -> None:
    convolution = nn.Conv3d(3, 4, (2, 3, 3), bias=False)
    # outputs 4 x 4 x 6 x 6, each of 3 x 2 x 3 x 3 multiply-adds
    assert flops(lambda: convolution(torch.zeros(1, 3, 5, 8, 8))) == 2 * (4 * 4 * 6 * 6) * (3 * 2 * 3 * 3)
    assert flops(lambda: torch.zeros(5, 7) @ torch.zeros(7, 11)) == 2 * 5 * 7 * 11


def test_operations_of_a_model_grow_with_its_clip() -> None:
    vae = build(PRESETS["tiny"])
    short, tall = (flops(lambda h=h: vae.encode(torch.zeros(1, 3, 5, h, 32))) for h in (32, 64))
    assert 0 < short < tall
    assert tall <= 2.6 * short  # twice but for attention, which grows by its square


def test_time_is_by_clip() -> None:
    calls = []

    def call() -> torch.Tensor:
        calls.append(1)
        return torch.zeros(8)

    found = cost(call, clips=6, device=CPU, repeats=5)
    assert len(calls) == 6  # one of them is not counted
    assert found.seconds > 0
    assert found.clips_per_second == pytest.approx(6 / found.seconds)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_memory_is_that_of_the_call_and_not_of_an_earlier_one() -> None:
    small, large = 1, 256 * 2**20

    def peak(num_bytes: int) -> int:
        measured = cost(
            lambda: torch.ones(num_bytes, dtype=torch.uint8), clips=1, device=CPU, repeats=1
        ).peak_bytes
        if measured is None:
            pytest.skip("this system does not let a process reset the peak of its memory")
        return measured

    before, during, after = peak(small), peak(large), peak(small)
    assert during > before + 0.8 * large
    assert after < during - 0.8 * large
