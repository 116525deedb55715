"""From gradients to the window: what is compressed together, and what becomes of the errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .compressors import Job
from .kernels import Kernels
from .layout import Layout
from .preconditioners import Moment
from .shards import local
from .sites import Site, gradient_of, spans

_MADE = 1 << 20  # entries that wait in errors and gradients made for it; a made gradient is whole, however large


class _Slab(NamedTuple):
    """A slab that waits to be compressed: whose, where in it, and the errors that are to stay as they are."""

    site: Site
    place: slice
    job: Job
    withheld: list[tuple[slice, torch.Tensor]]


def push(sites: Iterable[Site], moment: Moment, layout: Layout, kernels: Kernels) -> None:
    """Compress gradients into the newest row, many at once.

    Args:
        sites: What has a gradient.
        moment: Where the window stands.
        layout: What their state is made of.
        kernels: The backend.
    """
    waiting: list[_Slab] = []
    made = 0
    for site in sites:
        gradient, row = gradient_of(site), layout.window.row(site.state, site.shape, moment.newest)
        if layout.compressor.lossless:
            layout.compressor.compress([Job(gradient, None, row, site.state)], kernels)
            continue
        is_made = _is_made(gradient, site)
        for place, part in layout.window.slabs(row, site.shape):
            new = (place.stop - place.start) * (is_made + (not layout.errors.in_place))
            if waiting and made + new > _MADE:
                _compress(waiting, moment, layout, kernels)
                waiting, made = [], 0
            error = layout.errors.load(site.state, place, kernels)
            # In a joint vector, which is one slab, parameters without a gradient keep their error and push nothing.
            absent = [span for member, span in spans(site) if member.param.grad is None]
            withheld = [(span, error[span].clone()) for span in absent]
            for span in absent:
                error[span] = 0.0
            size = site.shape if error.numel() == site.shape.numel() else error.shape
            job = Job(gradient.view(-1)[place].view(size), error.view(size), part, site.state)
            waiting.append(_Slab(site, place, job, withheld))
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
    for site, place, job, withheld in waiting:
        assert job.error is not None  # what is lossless does not wait
        error = job.error.view(-1)
        for span, kept in withheld:
            error[span] = kept
        layout.errors.save(site.state, error, place, moment.steps, site.members[0].position, kernels)


def _is_made(gradient: torch.Tensor, site: Site) -> bool:
    """Whether it is not the parameter's own."""
    own = site.members[0].param.grad
    return len(site.members) > 1 or own is None or local(own).data_ptr() != gradient.data_ptr()
