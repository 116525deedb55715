"""GaLore equals the authors' package (galore_torch), on its defaults and on its settings for GLUE, refreshes too."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from problems import flat, set_gradients

from hf_efcp import GaLore

SHAPES = [(200, 150), (150, 200), (160, 160), (30,), (3, 50)]


@pytest.fixture
def published(monkeypatch):
    """Its AdamW. Its package imports an optimizer in 8 bits that needs bitsandbytes: this takes the module alone."""
    found = importlib.util.find_spec("galore_torch")
    if found is None:
        pytest.skip("galore_torch is not installed: pip install --no-deps galore-torch")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    module = importlib.import_module("galore_torch.adamw")
    yield module.AdamW
    for name in ("galore_torch.adamw", "galore_torch.galore_projector"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize(("eps", "size"), [(1e-8, 1.0), (1e-6, 1e3)])  # Trainer's, and its own
@pytest.mark.parametrize(
    ("lr", "rank", "scale", "weight_decay"), [(1e-2, 128, 0.25, 0.0), (3e-5, 4, 4.0, 0.0), (1e-2, 8, 1.0, 1e-3)]
)
def test_sixty_steps_with_two_refreshes(published, lr, rank, scale, weight_decay, proj_type, eps, size):
    """On the same gradients; what is not projected is stepped by both as AdamW.

    Its eps is added to a root that is not bias-corrected, ours, as torch.optim.AdamW's, to one that is, which counts in
    the first steps, for entries that are not far above `30 eps`. It decays after the step: a difference of `lr
    weight_decay` of an update.
    """
    source = torch.Generator().manual_seed(rank)
    starts = [torch.randn(shape, generator=source) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = dict(lr=lr, weight_decay=weight_decay, eps=eps)
    matrices, others = theirs[:3], theirs[3:]
    reference = published(
        [{"params": others}, {"params": matrices, "rank": rank, "update_proj_gap": 20, "scale": scale,
                              "proj_type": proj_type}],
        no_deprecation_warning=True, **settings,
    )  # fmt: skip
    optimizer = GaLore(ours, rank=rank, scale=scale, update_gap=20, proj_type=proj_type, **settings)
    common = [torch.randn(shape, generator=source) for shape in SHAPES]
    for _ in range(60):
        gradients = [size * (part + torch.randn(part.shape, generator=source)) for part in common]
        for params, one in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, gradients)
            one.step()
    assert {optimizer.state[param]["refreshes"] for param in ours[:3]} == {3}
    for param, other, start in zip(ours, theirs, starts, strict=True):
        moved = (flat([other]) - flat([start])).norm()
        assert (flat([param]) - flat([other])).norm() < 1e-4 * moved
        assert moved > 0
