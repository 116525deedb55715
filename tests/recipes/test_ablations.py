"""The optimizers that a comparison needs beside the package's own: the default without one of its parts."""

import pytest
import torch
from problems import set_gradients

from hf_efcp import LowRankMFAC


def test_direction_off_is_adamws_direction_as_short_as_the_matrix_makes_it(recipe):
    """Tensor by tensor, over 12 steps that are given the same gradients; lengths are those in the metric."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((20, 12), (12,))]
    kinds = {
        "matrix": lambda params: LowRankMFAC(params, 4e-4, metric_dtype=torch.float32),
        "direction off": lambda params: recipe.ablations.ShortenedAdamW(params, 4e-4, metric_dtype=torch.float32),
        "matrix off": lambda params: LowRankMFAC(params, 4e-4, metric_dtype=torch.float32, relative_damp=1e30),
    }
    params = {name: [torch.nn.Parameter(start.clone()) for start in starts] for name in kinds}
    optimizers = {name: make(params[name]) for name, make in kinds.items()}
    shortened = []
    for _ in range(12):
        gradients = [torch.randn(start.shape, generator=generator) for start in starts]
        updates = {}
        for name, optimizer in optimizers.items():
            before = [param.detach().clone() for param in params[name]]
            set_gradients(params[name], gradients)
            optimizer.step()
            updates[name] = [old - param.detach() for old, param in zip(before, params[name], strict=True)]
        for number, param in enumerate(params["matrix"]):
            state = optimizers["matrix"].state[param]
            root = (state["second_moment"].view_as(param) / (1 - 0.999 ** state["gradients"])).sqrt().add(1e-8).sqrt()
            turned, short, adamw = (updates[name][number] for name in kinds)
            assert torch.cosine_similarity(short.flatten(), adamw.flatten(), dim=0) > 1 - 1e-4
            torch.testing.assert_close((root * short).norm(), (root * turned).norm(), rtol=1e-3, atol=0.0)
            shortened.append(((root * short).norm() / (root * adamw).norm()).item())
            cosine = torch.cosine_similarity((root * turned).flatten(), (root * adamw).flatten(), dim=0)
    assert min(shortened) < 0.9
    assert max(shortened) < 1 + 1e-3
    assert cosine < 0.99  # the matrix does turn


def test_without_feedback_nothing_is_kept(recipe):
    """The first row is the default's; then the error of the default grows, and this one's stays zero."""
    start, generator = torch.randn(20, 12), torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    forgetful, default = recipe.ablations.ForgetfulMFAC(params[:1], 1e-2), LowRankMFAC(params[1:], 1e-2)
    for step in range(3):
        gradient = torch.randn(20, 12, generator=generator)
        for param, optimizer in zip(params, (forgetful, default), strict=True):
            set_gradients([param], [gradient])
            optimizer.step()
        (own,), (other,) = (list(optimizer.state.values()) for optimizer in (forgetful, default))
        assert not own["error"].any()
        assert other["error"].any()
        assert torch.equal(own["left"][step], other["left"][step]) == (step == 0)


@pytest.mark.parametrize("name", ["shortened_adamw", "forgetful_mfac"])
def test_they_have_names_in_comparisons_and_the_settings_of_the_default(recipe, name):
    from hf_efcp.factory import OPTIMIZERS, efcp_name, parse_optim_args

    assert OPTIMIZERS[name].__module__ == "ablations"
    assert efcp_name(name) == name
    assert parse_optim_args(name, "") == {}
    settings = [
        dict(cls([torch.nn.Parameter(torch.zeros(3, 4))]).param_groups[0]) for cls in (OPTIMIZERS[name], LowRankMFAC)
    ]
    assert settings[0].pop("params")
    assert settings[1].pop("params")
    assert settings[0] == settings[1]
