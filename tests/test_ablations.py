"""The optimizer that a comparison needs beside the package's own: the default with its direction off."""

import torch
from problems import set_gradients

from hf_efcp import LowRankMFAC


def test_direction_off_is_adamws_direction_as_short_as_the_matrix_makes_it(recipe):
    """Tensor by tensor, over 12 steps that are given the same gradients; lengths are those in the metric."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((20, 12), (12,))]
    kinds = {
        "matrix": lambda params: LowRankMFAC(params, 1e-2),
        "direction off": lambda params: recipe.ablations.ShortenedAdamW(params, 1e-2),
        "matrix off": lambda params: LowRankMFAC(params, 1e-2, relative_damp=1e30),
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


def test_it_has_a_name_in_comparisons(recipe):
    from hf_efcp.factory import efcp_name, parse_optim_args

    assert recipe.ablations.ShortenedAdamW.__module__ == "ablations"
    assert efcp_name("shortened_adamw") == "shortened_adamw"
    assert parse_optim_args("shortened_adamw", "") == {}
