"""FSDP2 on gloo: sharded parameters against whole ones, checkpoints, faults on one rank."""

import pytest
import torch
from fsdp_cases import RESUMED, SETTINGS, STEPS, batch, everything, excluded, given, moved, network, train, whole
from ranks import needs_fsdp, run
from torch import nn

pytestmark = needs_fsdp


@pytest.fixture(scope="module", params=[2, 3])
def ranks_and_results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return request.param, run(everything, request.param, folder, request.param, str(folder))


@pytest.fixture
def two(ranks_and_results):
    ranks, results = ranks_and_results
    if ranks != 2:
        pytest.skip("run with two ranks")
    return results


@pytest.mark.parametrize("name", ["dense", "sparse at density 1", "metric", "metric of the model"])
def test_what_compression_does_not_cut_equals_the_unsharded_run(name, ranks_and_results):
    ranks, results = ranks_and_results
    cls, settings = SETTINGS[name]
    model = network()
    start = whole(model)
    optimizer = cls(model.parameters(), **settings)
    train(model, optimizer, range(STEPS))
    expected = moved(whole(model), start)
    assert expected.norm() > 0.1
    all_values = optimizer.memory()["values"]
    for result in results:
        ends, gram, memory, planned = result[name]
        assert (moved(ends, start) - expected).norm() < 1e-3 * expected.norm()
        assert torch.equal(gram, results[0][name][1])
        assert memory == planned
        # one bias of a single entry cannot be split, and rows are padded to the longest shard
        assert all_values / ranks <= memory["values"] < 1.4 * all_values / ranks


@pytest.mark.parametrize("name", ["sparse", "ggt"])
def test_sparse_equals_one_process_whose_parameters_are_cut_at_the_borders(name, ranks_and_results):
    ranks, results = ranks_and_results
    cls, settings = SETTINGS[name]
    model = network()
    start = whole(model)
    pieces = [[nn.Parameter(piece.clone()) for piece in param.detach().chunk(ranks)] for param in model.parameters()]
    optimizer = cls([piece for parts in pieces for piece in parts], **settings)
    for step in range(STEPS):
        model.zero_grad()
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        for param, parts in zip(model.parameters(), pieces, strict=True):
            for piece, gradient in zip(parts, param.grad.chunk(ranks), strict=True):
                piece.grad = gradient.clone()
        optimizer.step()
        with torch.no_grad():
            for param, parts in zip(model.parameters(), pieces, strict=True):
                param.copy_(torch.cat(list(parts)))
    expected = moved(whole(model), start)
    assert expected.norm() > 0.05
    for result in results:
        assert (moved(result[name][0], start) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", RESUMED)
def test_resuming_through_distributed_checkpoints_is_bit_equal(name, full, two):
    for result in two:
        through, resumed, middle, dtypes = result["resumed", name, full]
        for one, other in zip(through, resumed, strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(middle, resumed[0])
        if name == "sparse":
            assert {"torch.uint8", "torch.bfloat16", "torch.float32", "torch.float64"} <= dtypes


def test_rank_0_sends_its_checkpoint_of_whole_parameters(two):
    for result in two:
        through, resumed, middle = result["broadcast"]
        assert all(torch.equal(one, other) for one, other in zip(through, resumed, strict=True))
        assert not torch.equal(middle[0], resumed[0])


def test_excluded_shards_are_stepped_in_float32_and_resumed_from_bfloat16(two):
    model = network().to(torch.bfloat16)
    start = [param.double() for param in whole(model)]
    optimizer = excluded(model.parameters())
    for step in range(6):
        for param, grad in zip(model.parameters(), given(step, model.parameters()), strict=True):
            param.grad = grad
        optimizer.step()
    expected = moved(whole(model)[:-2], start[:-2])
    assert expected.norm() > 0.1
    for result in two:
        ends, dtypes, planned, through, resumed = result["excluded"]
        assert (dtypes, planned) == ({torch.float32}, True)
        assert (moved(ends[:-2], start[:-2]) - expected).norm() < 1e-2 * expected.norm()
        assert all(torch.equal(one, other) for one, other in zip(through, resumed, strict=True))
        assert moved(through[:-2], ends[:-2]).norm() > 1e-2


def test_all_ranks_refuse_or_skip_together(two):
    (first, *rest), (second, *others) = (result["faults"][0] for result in two)
    assert "a gradient on another rank has entries that are NaN" in first
    assert "the gradient of parameter 0 of group 0" in second
    assert rest == others == [True, 0, True]
    assert [result["faults"][1] for result in two] == [(None, True, 1, True)] * 2


def test_what_cannot_work_on_shards_is_refused(two):
    for result in two:
        mixed, flattened, gathered = result["refused"]
        assert "some parameters are sharded and others are not" in mixed
        assert "the parameters were flattened by FSDP version 1" in flattened
        assert "is whole, but the parameter is sharded" in gathered
