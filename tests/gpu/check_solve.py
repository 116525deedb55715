"""The table that counters bring to a step, and the coefficients that one launch finds, against the host's own."""

import pytest
import torch
from rig import Model, row, settings

from hf_efcp import noise
from hf_efcp.kernels.triton import shared
from hf_efcp.kernels.triton.changing import Changing, logarithm
from hf_efcp.kernels.triton.rows import Sums
from hf_efcp.metric import Metric
from hf_efcp.preconditioners import MFAC, WindowPosition

CPU = torch.device("cpu")
CAPACITY = 5


def columns_of(model, rows):
    table = model.table.view(rows, len(shared.COLUMNS))
    numbers = model.numbers.view(rows, len(shared.NUMBERS))
    integers = {name: table[:, place].tolist() for place, name in enumerate(shared.COLUMNS)}
    return integers | {name: numbers[:, place].tolist() for place, name in enumerate(shared.NUMBERS)}


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_table_is_brought_to_the_step_that_the_counters_stand_at(beta1):
    metric = Metric("adam", torch.int8, beta1, 0.999, 1e-8)
    count = 150  # more than one program takes
    pushed, gradients = 7, [3 + number for number in range(count)]
    gradient = torch.ones(4)
    rows = [row(gradient, {}) for _ in range(count)]
    model = Model(CPU)
    model.begin(rows, 1)
    changing = Changing([pushed, *gradients], [[1, 1]], CPU)
    told = torch.tensor([(0, 1 + number, 10 + number, number % 2) for number in range(count)])
    groups = [(0.01, 0.1, 1.0, 0.0), (torch.tensor(0.002, dtype=torch.float64), 0.3, 0.0, 0.5)]
    optimizer = [logarithm(metric.beta2), logarithm(beta1), logarithm(0.9), 0.0, 4e-4]
    for step in (1, 2):
        addresses = [1000 * step + number for number in range(2 * count)]
        changing.advance(addresses, optimizer, groups)
        model.advance(told, changing, settings(metric=torch.int8, capacity=CAPACITY))
        found = columns_of(model, count)
        steps = [number + step for number in gradients]
        assert found["gradient"] == addresses[::2]
        assert found["theta"] == addresses[1::2]
        assert found["newest"] == [(pushed + step - 1) % CAPACITY] * count
        assert found["held"] == [CAPACITY] * count
        assert found["error_key"] == [noise.key(pushed + step, 10 + number) for number in range(count)]
        assert found["second_key"] == [metric.key(n, 10 + number) for number, n in enumerate(steps)]
        assert found["first_key"] == [metric.first_key(n, 10 + number) for number, n in enumerate(steps)]
        expected = {
            "correction": [metric.correction(n) for n in steps],
            "factor": [1.0 / (1.0 - beta1**n) for n in steps],
            "lr": [(0.01, 0.002)[number % 2] for number in range(count)],
            "keep": [(1.0 - 0.01 * 0.1, 1.0)[number % 2] for number in range(count)],
            "decay": [(0.0, 0.3)[number % 2] for number in range(count)],
            "momentum": [(0.0, 0.5)[number % 2] for number in range(count)],
        }
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-7), name


@pytest.mark.parametrize("capacity", [1, 2, CAPACITY, 16])
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("damping", [{"relative_damp": 0.3, "damp": 0.0}, {"trust_lr": 4e-4, "damp": 0.0}])
def test_coefficients_are_the_preconditioners(capacity, parts, damping):
    """Windows that are empty, half full, full, full of zeros; sums over one task, many, and none."""
    torch.manual_seed(capacity)
    beta1, rates, mfac = 0.9, (1e-2, 3e-3), MFAC(**damping)
    pushed = [0, capacity // 2, capacity - 1, 3 * capacity, 3 * capacity + 1, 7]
    tasks = [1, 40, 3, 1, 16, 0]
    units = len(pushed)
    grams, partial, outside, expected = [], [], [], []
    for unit, before in enumerate(pushed):
        now = WindowPosition(before % capacity, min(before + 1, capacity), capacity, before + 1, rates[unit % 2])
        R = torch.randn(now.rows, 9, dtype=torch.float64) * (0.0 if tasks[unit] == 0 else 10.0**unit)
        K = R @ R.T
        column = torch.zeros(capacity, dtype=torch.float64)
        column[: now.rows] = K[now.newest]
        split = torch.rand(tasks[unit], 1, dtype=torch.float64)
        partial.append(split / split.sum() * column)
        stored = torch.zeros(capacity, capacity, dtype=torch.float64)
        stored[: now.rows, : now.rows] = K
        stored[now.newest] = stored[:, now.newest] = -1.0  # what the new column takes the place of
        stored[now.newest, now.rows :] = stored[now.rows :, now.newest] = 0.0
        grams.append(stored)
        if parts is None:
            weights = now.weights(beta1)
            c = mfac.shorten(K[None], (K @ weights)[None], now)[0] + weights
        else:
            own = torch.randn(tasks[unit], now.rows, parts, dtype=torch.float64)
            padded = torch.zeros(tasks[unit], capacity, parts, dtype=torch.float64)
            padded[:, : now.rows] = own
            outside.append(padded.flatten(1))
            c = mfac.shorten(K[None], own.sum(dim=(0, 2))[None], now)[0]
        expected.append((K, c))
    bounds = torch.tensor([sum(tasks[:unit]) for unit in range(units + 1)])
    changing = Changing(pushed, [[int(unit % 2 == 0), 1] for unit in range(units)], CPU)
    groups = [(rate, 0.0, 1.0, 0.0) for rate in rates]  # the larger of those that a unit has counts
    changing.advance([], [0.0, 0.0, logarithm(beta1), mfac.relative_damp, mfac.trust_lr], groups)
    model, stacked = Model(CPU), torch.stack(grams)
    model.begin([], units)
    products = None if parts is None else Sums(torch.cat(outside), bounds, parts)
    found = model.solve(stacked, Sums(torch.cat(partial), bounds), products, changing, settings(capacity=capacity))
    for unit, (K, c) in enumerate(expected):
        rows = len(K)
        assert torch.allclose(stacked[unit, :rows, :rows], K, rtol=1e-12, atol=0.0)
        assert not stacked[unit, rows:].any()
        assert torch.allclose(found[unit, :rows], c, rtol=1e-9, atol=1e-12 * float(c.abs().max()) + 1e-300)
        assert not found[unit, rows:].any()
