"""The dense vectors of a step: what enters the window, what is preconditioned, and the way back to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .kernels import Kernels, pool
from .metric import Metric
from .sites import Site, gradient_of
from .windows import span_length


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

    def observe(self, sites: list[Site]) -> None:
        """Take the gradients of parameters into their moments, once a step.

        Args:
            sites: The parameters.
        """
        metric = self.metric
        if metric is None:
            return
        tasks = []
        for site in sites:
            self.states[site.member.param]["gradients"] += 1
            gradient = gradient_of(site)
            if metric.is_factored(site.shape):
                metric.observe_factored(site.state, gradient)
            step = span_length(site.state)  # a multiple of `kernels.BUCKET`
            for start in range(0, site.shape.numel(), step):
                tasks.append((site, slice(start, min(start + step, site.shape.numel())), gradient.view(-1)))

        def work(index: int, begin: int, end: int) -> None:
            site, span, g = tasks[index]
            position, step = site.member.position, self._step(site)
            metric.observe(site.state, site.shape, span, g[span], step, position, self.kernels)

        for device in {site.member.param.device for site in sites}:
            pool.run_torch(work, len(tasks), 1, device)

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
        flat, out = gradient.view(-1), torch.empty_like(gradient)
        metric, step = self.metric, self._step(site)

        def work(_: int, begin: int, end: int) -> None:
            x, whitened = flat[begin:end], out.view(-1)[begin:end]
            metric.whiten(site.state, site.shape, x, step, self.kernels, start=begin, out=whitened)

        pool.run_torch(work, len(flat), span_length(site.state), out.device)
        return out

    def preconditioned(self, site: Site) -> Callable[[slice], torch.Tensor]:
        """The dense vector `x` that is preconditioned, `D^-1/2 m_hat`, or `D^-1/2 g` without momentum.

        Args:
            site: The parameter.

        Returns:
            What makes a span of it, `(n,)`, float32, contiguous.
        """
        state, shape, kernels, metric = site.state, site.shape, self.kernels, self.metric
        if metric is not None and metric.beta1:
            return lambda span: metric.momentum(state, shape, span, self._step(site), kernels)
        gradient = gradient_of(site).view(-1)
        if metric is not None:
            return lambda span: metric.whiten(state, shape, gradient[span], self._step(site), kernels, start=span.start)
        return lambda span: gradient[span]

    def out_of_metric(self, site: Site, span: slice, update: torch.Tensor) -> torch.Tensor:
        """`D^-1/2 u`, in the memory of `u`; without a metric, `u`.

        Args:
            site: The parameter.
            span: A span of it.
            update: `u` in the metric, `(n,)`, float32.

        Returns:
            `(n,)`, float32.
        """
        if self.metric is None:
            return update
        step, start = self._step(site), span.start
        return self.metric.whiten(site.state, site.shape, update, step, self.kernels, start=start, out=update)

    def _step(self, site: Site) -> int:
        return int(self.states[site.member.param]["gradients"])
