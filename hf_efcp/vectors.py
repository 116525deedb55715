"""The dense vectors of a step: what enters the window, what is preconditioned, and the way back to the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .kernels import Kernels
from .metric import Metric
from .sites import Site, gradient_of
from .windows import Slab


@dataclass(frozen=True)
class Vectors:
    """Gradients in the metric: `D^-1/2 g` and `D^-1/2 m_hat`. Without a metric, gradients as they are.

    Args:
        metric: The metric; None for none.
        states: Of all parameters.
        kernels: The backend.
    """

    metric: Metric | None
    states: Mapping[torch.Tensor, dict[str, Any]]
    kernels: Kernels

    def observe(self, site: Site) -> None:
        """Take the gradient of a parameter into its moments, once a step.

        Args:
            site: The parameter.
        """
        if self.metric is not None:
            owner = self.states[site.member.param]
            owner["gradients"] += 1
            position = site.member.position
            self.metric.observe(site.state, gradient_of(site), owner["gradients"], position, self.kernels)

    def row(self, site: Site) -> torch.Tensor:
        """What compression adds to the error, in the parameter's shape.

        Args:
            site: The parameter.

        Returns:
            `D^-1/2 g`, float32, contiguous.
        """
        gradient = gradient_of(site)
        if self.metric is None:
            return gradient
        return self._whitened(site, gradient)

    def preconditioned(self, site: Site) -> torch.Tensor:
        """The dense vector `x` that is preconditioned, in the metric and in the parameter's shape.

        Args:
            site: The parameter.

        Returns:
            `D^-1/2 m_hat`, or `D^-1/2 g` without momentum, float32, contiguous.
        """
        if self.metric is None or not self.metric.beta1:
            return self.row(site)
        return self.metric.momentum(site.state, site.shape, self._step(site), self.kernels).view(site.shape)

    def out_of_metric(self, site: Site, updates: Iterable[Slab]) -> Iterator[Slab]:
        """`D^-1/2 u`, slab by slab, in the memory of `u`; without a metric, `u`.

        Args:
            site: The parameter.
            updates: The update `u` in the metric.

        Yields:
            Where the slab goes in the flattened parameter, and its entries in float32.
        """
        for span, update in updates:
            if self.metric is not None:
                step = self._step(site)
                self.metric.whiten(site.state, site.shape, update, step, self.kernels, start=span.start, out=update)
            yield span, update
            del update  # before the next one is made

    def _whitened(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        assert self.metric is not None
        flat = self.metric.whiten(site.state, site.shape, x.view(-1), self._step(site), self.kernels)
        return flat.view(site.shape)

    def _step(self, site: Site) -> int:
        return int(self.states[site.member.param]["gradients"])
