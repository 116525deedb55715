"""From gradients to the window: what is compressed together, and what becomes of the errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .compressors import Job
from .kernels import Kernels
from .layout import Layout
from .preconditioners import Moment
from .shards import local
from .sites import Site
from .vectors import Vectors

_MADE = 1 << 20  # entries that wait in errors and gradients made for it; a made gradient is whole, however large


class _Slab(NamedTuple):
    """A slab that waits to be compressed: whose, and where in it."""

    site: Site
    place: slice
    job: Job


def push(sites: Iterable[Site], moment: Moment, layout: Layout, kernels: Kernels, vectors: Vectors) -> None:
    """Compress gradients into the newest row, many at once.

    Args:
        sites: Parameters that have a gradient.
        moment: Where the window stands.
        layout: What their state is made of.
        kernels: The backend.
        vectors: What of their gradients enters the window.
    """
    waiting: list[_Slab] = []
    made = 0
    for site in sites:
        gradient, row = vectors.row(site), layout.window.row(site.state, site.shape, moment.newest)
        if layout.compressor.lossless:
            layout.compressor.compress([Job(gradient, None, row, site.state)], kernels)
            continue
        own = site.member.param.grad
        is_made = own is None or local(own).data_ptr() != gradient.data_ptr()
        for place, part in layout.window.slabs(row, site.shape):
            new = (place.stop - place.start) * (is_made + (not layout.errors.in_place))
            if waiting and made + new > _MADE:
                _compress(waiting, moment, layout, kernels)
                waiting, made = [], 0
            error = layout.errors.load(site.state, place, kernels)
            size = site.shape if error.numel() == site.shape.numel() else error.shape
            job = Job(gradient.view(-1)[place].view(size), error.view(size), part, site.state)
            waiting.append(_Slab(site, place, job))
            made += new
            del error, job
        if waiting and is_made and site.shape.numel() > _MADE:
            _compress(waiting, moment, layout, kernels)
            waiting, made = [], 0
        del gradient  # before the next one is made
    if waiting:
        _compress(waiting, moment, layout, kernels)


def _compress(waiting: list[_Slab], moment: Moment, layout: Layout, kernels: Kernels) -> None:
    layout.compressor.compress([slab.job for slab in waiting], kernels)
    for site, place, job in waiting:
        assert job.error is not None  # what is lossless does not wait
        layout.errors.save(site.state, job.error.view(-1), place, moment.steps, site.member.position, kernels)
