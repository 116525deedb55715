"""Natural GaLore: M-FAC's window inside GaLore's subspace (Das, arXiv 2410.16029)."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch.optim.optimizer import ParamsT

from ..compressors import DenseWindow
from ..kernels import choose, widest
from ..layout import State
from ..leaves import Group
from ..preconditioners import MFAC, WindowPosition
from .base import ProjectedAdam, ProjectedOptions


class NaturalGaLore(ProjectedAdam):
    """Natural GaLore (arXiv 2410.16029): GaLore, with the projected gradient preconditioned before Adam sees it.

        g_t = (R_t - H^T (damp I + H H^T)^-1 H R_t) / damp,     rows of H: the last `history` projected gradients
        theta <- theta - lr scale P Adam(g_t)

    `H` has the newest gradient among its rows, and turns with the subspace at a refresh (the published code leaves it
    as it is). Window and matrix are those of `DenseMFAC`, one for each matrix: `(damp I + H^T H)^-1 R`.

    Bytes: as `GaLore`, and `4 history rank long` for the window of a matrix.

    Args:
        params: Parameters or groups.
        lr: Learning rate; projected matrices move by `lr scale`.
        rank: Directions of a subspace, at least 1.
        scale: Factor of the update of projected matrices, at least 0.
        update_gap: Steps from one subspace to the next, at least 1.
        history: Projected gradients in the window; 0 is `GaLore`.
        damp: Dampening in the units of a squared gradient, positive.
        **options: See `ProjectedOptions`.

    Raises:
        ValueError: A value outside its range.
        TypeError: `rank`, `update_gap` or `history` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import NaturalGaLore
        >>> layer = torch.nn.Linear(512, 256)
        >>> optimizer = NaturalGaLore(layer.parameters(), lr=2e-5, rank=4, scale=4.0)
        >>> layer(torch.ones(4, 512)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.memory()["window"] == 4 * 20 * 4 * 512 + 8 * 20**2
        True
    """

    paper: ClassVar[tuple[str, str]] = ("Natural GaLore", "https://arxiv.org/abs/2410.16029")
    positive: ClassVar[tuple[str, ...]] = ("eps", "rank", "update_gap", "damp")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        rank: int = 128,
        scale: float = 0.25,
        update_gap: int = 200,
        history: int = 20,
        damp: float = 1e-3,
        **options: Unpack[ProjectedOptions],
    ) -> None:
        structure, tunable = {"history": history}, {"damp": damp}
        super().__init__(
            params, lr, rank=rank, scale=scale, update_gap=update_gap, structure=structure, tunable=tunable, **options
        )

    def turn(self, turned: torch.Tensor, state: State) -> None:
        """`row <- T row` for every row of the window, and the Gram matrix of what they are then."""
        if not self._structure["history"]:
            return
        rows = state["values"].view(len(state["values"]), len(turned), -1)
        for row in rows:  # one by one, so that no second window exists
            row.copy_(turned @ row)
        window, shape, written = self._window(state)
        for row in range(written):
            column = window.dots([(state, shape)], row, written, choose("auto", rows.device))[0]
            state["gram"][row, :written] = column.to("cpu", torch.float64)

    def direction(self, projected: torch.Tensor, state: State, group: Group) -> torch.Tensor:
        """`R` through the window's matrix; see the base class."""
        history = group["history"]
        if not history:
            return projected
        x = projected.reshape(-1)
        newest, state["pushed"] = state["pushed"] % history, state["pushed"] + 1
        window, shape, rows = self._window(state)
        kernels = choose("auto", x.device)
        window.row(state, shape, newest).copy_(x)
        column = window.dots([(state, shape)], newest, rows, kernels)[0].to("cpu", torch.float64)
        state["gram"][newest, :rows] = state["gram"][:rows, newest] = column
        # MFAC has damp I + (1/m) sum_i g_i g_i^T, times m the same; what it shortens is the newest row itself.
        rule = MFAC(damp=group["damp"] / history)
        now = WindowPosition(newest, rows, history, state["pushed"])
        c = rule.shorten(state["gram"][None, :rows, :rows], column[None], now)[0].to(x.device, widest(x.device))
        spans = window.spans(shape, x.device)
        parts = [window.combine(state, shape, span, c, kernels, base=x[span], scale=1.0) for span in spans]
        return torch.cat(parts).view_as(projected).div_(group["damp"])

    def extra_state(self, short: int, long: int, device: torch.device | str) -> dict[str, Any]:
        """The window, and its Gram matrix; see the base class."""
        history, rank = self._structure["history"], self._structure[self.rank_name]
        if not history:
            return {}
        gram = torch.zeros(history, history, dtype=torch.float64, device="meta" if device == "meta" else "cpu")
        return {"pushed": 0, "gram": gram, **DenseWindow(history).allocate(torch.Size((rank, long)), device)}

    def _window(self, state: State) -> tuple[DenseWindow, torch.Size, int]:
        """The window of a matrix, the shape of its rows, and how many were written."""
        history = self._structure["history"]
        return DenseWindow(history), state["exp_avg"].shape, min(state["pushed"], history)
