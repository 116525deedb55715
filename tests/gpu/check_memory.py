"""Where tensors begin: kernels read 16 bytes at a time, and what is not so aligned is copied or refused."""

import pytest
import torch
from check_steps import Run, assert_close


def test_a_state_inside_other_memory_is_named():
    run = Run("default", "triton")
    run.step()
    state = run.optimizer.state[run.params[0]]
    state["error"] = torch.zeros(state["error"].numel() + 1, dtype=torch.int8)[1:].view(state["error"].shape)
    with pytest.raises(ValueError, match=r"^error of the state of parameter 0 .* no multiple of 16 bytes: load"):
        run.step()


def shifted(tensor):
    """The same, at an address that is no multiple of 16 bytes."""
    memory = torch.cat([torch.zeros(1), tensor.flatten()])
    return memory[1:].view(tensor.shape)


def test_parameters_and_gradients_anywhere_in_memory():
    mine, expected = Run("exact", "triton"), Run("exact", "reference")
    for param in mine.params:
        param.data = shifted(param.data)

    def shift_gradients(*_):
        for param in mine.params:
            param.grad = shifted(param.grad)

    mine.optimizer.register_step_pre_hook(shift_gradients)
    for _ in range(3):
        found = mine.step()
        assert_close(found, expected.step(), 2e-5)
