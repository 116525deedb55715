"""Low-rank rows of single matrices and their errors, by the Triton kernels, against a power iteration in float64."""

import pytest
import torch
from rig import Model, place_scratch, row, settings

CPU = torch.device("cpu")
SHAPES = [(9, 70), (130, 64), (33, 200), (1100, 20)]  # within a tile, several below and beside each other, a long one


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (3, 1e-12), (4, 1e12)])
def test_rows_and_errors_are_those_of_a_power_iteration(rank, scale):
    generator = torch.Generator().manual_seed(rank)
    rows, expected = [], []
    for height, width in SHAPES:
        gradient, error = (scale * torch.randn(height, width, generator=generator) for _ in range(2))
        start = torch.randn(rank, width, generator=generator)
        A = gradient.double() + error.double()
        P = torch.linalg.qr(A @ start.T.double()).Q
        expected.append((A, P @ P.T @ A, A.T @ P))
        state = {"left": torch.zeros(3, rank, height), "right": torch.zeros(3, rank, width)}
        rows.append(row(gradient, state | {"start": start, "error": error.view(-1)}, height=height, width=width))
    model = Model(CPU)
    place_scratch(rows, rank)
    model.begin(rows, 1)
    model.push_low_rank(rows, settings(rank=rank))
    for own, (A, line, Q) in zip(rows, expected, strict=True):
        left, right = own.state["left"], own.state["right"]
        found = left[1].T.double() @ right[1].double()
        length = float(A.norm())
        assert float((found - line).norm()) < 1e-6 * length
        assert float((own.state["error"].view(A.shape).double() - (A - found)).norm()) < 1e-6 * length
        # Columns of orthonormal bases may have either sign, and so may the vectors that the next iteration starts from.
        assert float((own.state["start"].abs().double() - Q.T.abs()).norm()) < 1e-5 * length
        assert not left[::2].any()
        assert not right[::2].any()


def test_a_matrix_of_zeros_leaves_the_next_start():
    start = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    state = {"left": torch.ones(3, 2, 20), "right": torch.ones(3, 2, 30), "error": torch.zeros(600)}
    rows = [row(torch.zeros(20, 30), state | {"start": start.clone()}, height=20, width=30)]
    model = Model(CPU)
    place_scratch(rows, 2)
    model.begin(rows, 1)
    model.push_low_rank(rows, settings(rank=2))
    assert torch.equal(rows[0].state["start"], start)
    assert not rows[0].state["right"][1].any()
    assert not rows[0].state["error"].any()
