"""From gradients to the window: what is compressed together, and what becomes of the errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .compressors import Job
from .kernels import Kernels, pool
from .layout import Layout
from .leaves import Leaf, Spans, copied, spans_of_gradient
from .preconditioners import WindowPosition
from .vectors import Vectors

_MADE = 1 << 21  # entries of errors and gradients that are made to be compressed, and exist at a time


class _Slab(NamedTuple):
    """What is compressed as one: whose, where in it, into what, when, and the gradient of all of the parameter."""

    leaf: Leaf
    place: slice
    row: Any
    now: WindowPosition
    gradient: Spans


def push(leaves: Sequence[tuple[Leaf, WindowPosition]], layout: Layout, kernels: Kernels, vectors: Vectors) -> None:
    """Compress gradients into the newest rows, many at once. Threads share the slabs, or a large one.

    Args:
        leaves: Parameters that have a gradient, and where their windows stand.
        layout: What their state is made of.
        kernels: The backend.
        vectors: What of their gradients enters the window.
    """
    for slabs in _batches(leaves, layout, vectors):
        _push_batch(slabs, layout, kernels, vectors)


def _push_batch(slabs: list[_Slab], layout: Layout, kernels: Kernels, vectors: Vectors) -> None:
    device = slabs[0].leaf.ref.param.device
    jobs: dict[int, Job] = {}

    def accumulate(index: int, begin: int, end: int) -> None:
        jobs[index] = _job(slabs[index], layout, kernels, vectors)

    def keep(index: int, begin: int, end: int) -> None:
        leaf, place, _, now, _ = slabs[index]
        error = jobs[index].error
        assert error is not None  # what is lossless keeps none, and is not brought here
        layout.errors.save(leaf.state, error.view(-1), place, now.steps, leaf.ref.position, kernels)

    pool.run_torch(accumulate, len(slabs), 1, device)
    layout.compressor.compress([jobs[index] for index in range(len(slabs))], kernels)
    if not (layout.compressor.lossless or layout.errors.in_place):
        pool.run_torch(keep, len(slabs), 1, device)


def _batches(leaves: Iterable[tuple[Leaf, WindowPosition]], layout: Layout, vectors: Vectors) -> Iterator[list[_Slab]]:
    """Slabs that are compressed together: as many as may be made at a time, or a larger one alone."""
    batch: list[_Slab] = []
    total = 0
    for leaf, now in leaves:
        takes_gradient = layout.compressor.lossless or layout.compressor.accumulates
        copies = (takes_gradient and vectors.is_made(leaf)) + (not layout.errors.in_place)
        row = layout.window.row(leaf.state, leaf.shape, now.newest)
        gradient: Spans | None = None
        for place, part in layout.window.slabs(row, leaf.shape):
            made = copies * (place.stop - place.start)
            if gradient is None:  # copied once for all slabs, and counted with the first
                made += copied(leaf)
            if batch and total + made > _MADE:
                yield batch
                batch.clear()  # and so copies of gradients are gone before the next is made
                total = 0
            gradient = gradient or spans_of_gradient(leaf)
            batch.append(_Slab(leaf, place, part, now, gradient))
            total += made
    if batch:
        yield batch


def _job(slab: _Slab, layout: Layout, kernels: Kernels, vectors: Vectors) -> Job:
    """A slab with its error loaded, and its gradient beside it or in it."""
    leaf, place, row, _, gradient = slab
    entering = error = None
    if layout.compressor.lossless or layout.compressor.accumulates:
        entering = vectors.enter(leaf, place, gradient)
    if not layout.compressor.lossless:
        error = layout.errors.load(leaf.state, place, kernels)
        if entering is None:
            vectors.accumulate(leaf, place, gradient, error)
    return Job(_shaped(entering, leaf), _shaped(error, leaf), row, leaf.state)


def _shaped(part: torch.Tensor | None, leaf: Leaf) -> torch.Tensor | None:
    """A whole parameter in its shape; a slab of it is flat."""
    return part if part is None or part.numel() != leaf.shape.numel() else part.view(leaf.shape)
