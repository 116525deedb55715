"""The dense vectors of a step: what enters the window, what is preconditioned, and the way back to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .kernels import Kernels, pool
from .metric import Metric
from .shards import local
from .sites import Site, gradient_of, spans_of_gradient
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
            if metric.is_factored(site.shape):
                metric.observe_factored(site.state, gradient_of(site))
            gradient = spans_of_gradient(site)
            step = span_length(site.member.param.device)  # a multiple of `kernels.BUCKET`
            for start in range(0, site.shape.numel(), step):
                tasks.append((site, slice(start, min(start + step, site.shape.numel())), gradient))

        def work(index: int, begin: int, end: int) -> None:
            site, span, gradient = tasks[index]
            position, step = site.member.position, self._step(site)
            metric.observe(site.state, site.shape, span, gradient(span), step, position, self.kernels)

        if tasks:
            pool.run_torch(work, len(tasks), 1, sites[0].member.param.device)

    def row(self, site: Site) -> torch.Tensor:
        """What compression adds to the error, in the parameter's shape.

        Args:
            site: The parameter.

        Returns:
            `D^-1/2 g`, float32, contiguous.
        """
        if self.metric is None:
            return gradient_of(site)
        gradient, metric, step = spans_of_gradient(site), self.metric, self._step(site)
        out = torch.empty(site.shape, dtype=torch.float32, device=local(site.member.param).device)

        def work(_: int, begin: int, end: int) -> None:
            x, whitened = gradient(slice(begin, end)), out.view(-1)[begin:end]
            metric.whiten(site.state, site.shape, slice(begin, end), x, step, self.kernels, out=whitened)

        pool.run_torch(work, out.numel(), span_length(out.device), out.device)
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
        gradient = spans_of_gradient(site)
        if metric is None:
            return gradient
        return lambda span: metric.whiten(state, shape, span, gradient(span), self._step(site), kernels)

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
        return self.metric.whiten(site.state, site.shape, span, update, self._step(site), self.kernels, out=update)

    def _step(self, site: Site) -> int:
        return int(self.states[site.member.param]["gradients"])
