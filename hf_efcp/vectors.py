"""The dense vectors of a step: what enters the window, what is preconditioned, and the way back to the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .compressors import span_length
from .kernels import Kernels, pool
from .leaves import Leaf, Spans, gradient_of, is_float32, spans_of_gradient
from .metric import Metric
from .shards import local

# Without a metric accumulators saturate here, so that float32 products of low-rank rows cannot overflow.
_LARGEST = 2.0**96


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

    def begin(self, leaves: list[Leaf]) -> None:
        """Count the gradients of parameters, and take them into second moments that need them whole; once a step.

        Args:
            leaves: The parameters.
        """
        metric = self.metric
        if metric is None or not leaves:
            return
        for leaf in leaves:
            self.states[leaf.ref.param]["gradients"] += 1
        factored = [leaf for leaf in leaves if metric.is_factored(leaf.shape)]

        def work(index: int, begin: int, end: int) -> None:
            metric.observe_factored(factored[index].state, gradient_of(factored[index]))

        pool.run_torch(work, len(factored), 1, leaves[0].ref.param.device)

    def is_made(self, leaf: Leaf) -> bool:
        """Whether what enters the window is no view of the gradient, or of a copy of it that is contiguous."""
        return self.metric is not None or not is_float32(leaf)

    def enter(self, leaf: Leaf, place: slice, gradient: Spans) -> torch.Tensor:
        """What enters the window of a slab, once a step.

        Args:
            leaf: The parameter.
            place: The slab, whole buckets.
            gradient: From `spans_of_gradient`, one for all slabs of a parameter.

        Returns:
            `D^-1/2 g`, `(n,)`, float32, contiguous.
        """
        if self.metric is None:
            return gradient(place)
        length, device = place.stop - place.start, local(leaf.ref.param).device
        return self.accumulate(leaf, place, gradient, torch.zeros(length, dtype=torch.float32, device=device))

    def accumulate(self, leaf: Leaf, place: slice, gradient: Spans, accumulator: torch.Tensor) -> torch.Tensor:
        """The same, added to an error; moments take the gradient, once a step. Threads share a large slab.

        Args:
            leaf: The parameter.
            place: The slab, whole buckets.
            gradient: As in `enter`.
            accumulator: `(n,)`, float32, contiguous; updated.

        Returns:
            The accumulator.
        """
        position = leaf.ref.position

        def work(_: int, begin: int, end: int) -> None:
            span, out = slice(place.start + begin, place.start + end), accumulator[begin:end]
            g = gradient(span)
            if self.metric is None:
                out.add_(g).clamp_(-_LARGEST, _LARGEST)
            else:
                self.metric.observe(leaf.state, leaf.shape, span, g, self._step(leaf), position, self.kernels, out)

        pool.run_torch(work, len(accumulator), span_length(accumulator.device), accumulator.device)
        return accumulator

    def preconditioned(self, leaf: Leaf) -> Spans:
        """The dense vector `x` that is preconditioned, `D^-1/2 m_hat`, or `D^-1/2 g` without momentum.

        Args:
            leaf: The parameter.

        Returns:
            What makes a span of it, `(n,)`, float32, contiguous.
        """
        state, shape, kernels, metric = leaf.state, leaf.shape, self.kernels, self.metric
        if metric is not None and metric.beta1:
            return lambda span: metric.momentum(state, shape, span, self._step(leaf), kernels)
        gradient = spans_of_gradient(leaf)
        if metric is None:
            return gradient
        step = self._step(leaf)
        return lambda span: metric.whiten(state, shape, span, gradient(span).clone(), step, kernels)

    def out_of_metric(self, leaf: Leaf, span: slice, update: torch.Tensor) -> torch.Tensor:
        """`D^-1/2 u`, in the memory of `u`; without a metric, `u`.

        Args:
            leaf: The parameter.
            span: A span of it.
            update: `u` in the metric, `(n,)`, float32.

        Returns:
            `(n,)`, float32.
        """
        if self.metric is None:
            return update
        return self.metric.whiten(leaf.state, leaf.shape, span, update, self._step(leaf), self.kernels)

    def _step(self, leaf: Leaf) -> int:
        return int(self.states[leaf.ref.param]["gradients"])
