"""Resuming without Trainer: Accelerate and torch.distributed.checkpoint."""

import copy
import warnings

import pytest
import torch
from problems import flat
from states import assert_same
from torch import nn
from variants import build, names


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))


def steps(model, optimizer, numbers, backward=torch.Tensor.backward):
    for number in numbers:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        backward(nn.functional.mse_loss(model(x), x[:, :2].sin()))
        optimizer.step()


def settled(name, model):
    """With momentum in one group, and one that is stepped as AdamW would."""
    first, second, third = (list(model[position].parameters()) for position in (0, 2, 4))
    return build(name, [{"params": first, "momentum": 0.5}, {"params": second},
                        {"params": third, "preconditioned": False}])  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_accelerators_save_state_and_load_state_are_exact(tmp_path, name):
    from accelerate import Accelerator

    def prepared():
        accelerator = Accelerator(cpu=True)
        model = network()
        return accelerator, *accelerator.prepare(model, settled(name, model))

    accelerator, model, optimizer = prepared()
    steps(model, optimizer, range(8), accelerator.backward)
    accelerator.save_state(str(tmp_path))
    steps(model, optimizer, range(8, 14), accelerator.backward)

    accelerator, other, fresh = prepared()
    accelerator.load_state(str(tmp_path))
    middle = flat(other.parameters())
    steps(other, fresh, range(8, 14), accelerator.backward)
    assert torch.equal(flat(other.parameters()), flat(model.parameters()))
    assert not torch.equal(middle, flat(model.parameters()))
    assert_same(fresh.optimizer.state_dict()["state"], optimizer.optimizer.state_dict()["state"])


@pytest.mark.parametrize("through", ["memory", "file", "dcp"])
@pytest.mark.parametrize("name", names())
def test_distributed_checkpoints_of_one_process_are_exact(tmp_path, name, through):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = network()
    optimizer = settled(name, model)
    steps(model, optimizer, range(8))
    middle = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    steps(model, optimizer, range(8, 14))

    other = network()
    other.load_state_dict(middle)
    fresh = settled(name, other)
    if through == "file":
        torch.save(saved, tmp_path / "optimizer.bin")
        saved = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    elif through == "dcp":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")
            dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
            container = {"optimizer": get_optimizer_state_dict(other, fresh)}
            dcp.load(container, checkpoint_id=tmp_path, no_dist=True)
        saved = container["optimizer"]
    set_optimizer_state_dict(other, fresh, saved)
    steps(other, fresh, range(8, 14))
    assert torch.equal(flat(other.parameters()), flat(model.parameters()))
    assert not torch.equal(flat(middle.values()), flat(model.parameters()))
    assert_same(fresh.state_dict()["state"], optimizer.state_dict()["state"])
