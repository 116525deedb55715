"""Second moments that are means over rows and columns, against plain torch's."""

import dataclasses

import pytest
import torch
from rig import Model, row, settings

from hf_efcp.kernels.triton import shared
from hf_efcp.metric import Metric

CPU = torch.device("cpu")
SHAPES = [(300, 150), (1, 7), (7, 1), (257, 129), (40, 3, 2), (70,)]


def rows_of(gradients, states, runs):
    rows = []
    for gradient, state in zip(gradients, states, strict=True):
        tensors, places = {"second": state.get("second_moment")}, {}
        if gradient.dim() > 1:
            tensors = {"second": state["second_moment_rows"], "second_scale": state["second_moment_columns"]}
            places = {"second_width": gradient[0].numel()}
        rows += [row(gradient, tensors, begin=64 * run, **places) for run in range(runs)]
    return rows


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e17])
def test_means_are_plain_torchs(runs, scale):
    metric = Metric("factored", torch.float32, beta2=0.9)
    mine, expected = ([metric.allocate(torch.Size(shape), CPU) for shape in SHAPES] for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) * scale for shape in SHAPES]
        gradients[1].zero_()
        rows, model = rows_of(gradients, mine, runs), Model(CPU)
        model.begin(rows, 1)
        compiled = settings(metric=torch.float32)
        model.observe(rows, dataclasses.replace(compiled, metric=compiled.metric + shared.FACTORED.value))
        for gradient, state in zip(gradients[:-1], expected[:-1], strict=True):
            metric.observe_factored(state, gradient)
        expected[-1]["second_moment"].mul_(0.9).add_(gradients[-1].square().clamp(max=3.4e38), alpha=1 - 0.9)
    found = model.numbers.view(len(rows), len(shared.NUMBERS))[:, shared.MEAN.value].view(len(SHAPES), runs)
    for number, (state, own) in enumerate(zip(mine, expected, strict=True)):
        for name, value in own.items():
            assert torch.allclose(state[name], value, rtol=1e-6, atol=0.0), (number, name)
        if "second_moment_columns" in own:
            mean = own["second_moment_columns"].double().mean().clamp(min=torch.finfo(torch.float32).tiny)
            assert torch.allclose(found[number].double(), mean.expand(runs), rtol=1e-6)
    assert expected[0]["second_moment_rows"].any() or scale == 1e-25  # whose squares are 0
