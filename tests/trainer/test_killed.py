"""Nothing is lost: killed runs end bit-equal."""

import random

import crash
import pytest
import torch
from resume_cases import FILES
from tiny import parameters, tiny_bert

from hf_efcp import OPTIMIZERS

ARGUMENTS = {
    "sparse_mfac": "num_grads=3,density=0.1,block_size=1024,momentum=0.5,exclude=word_embeddings",
    "sparse_ggt": "num_grads=3,density=0.1,block_size=256,beta1=0.5",
    "dense_mfac": "num_grads=3",
    "dense_ggt": "num_grads=3",
    "lowrank_mfac": "num_grads=3,rank=2,momentum=0.9",
    "lowrank_ggt": "num_grads=3,rank=2",
    "sparse_adagrad": "density=0.1",
    "microadam": "num_grads=3,density=0.1",
    "galore": "rank=4,update_gap=3,exclude=word_embeddings",
    "adarankgrad": "max_rank=4,max_gap=4,threshold=0.5",
    "lorenza": "rank=4,update_gap=3,probes=2",
    "natural_galore": "rank=4,update_gap=4,history=3",
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Parameters at the end of a run that nobody killed, by optimizer and dtype."""
    ends = {}

    def run(optim, dtype=torch.float32):
        if (optim, dtype) not in ends:
            folder = tmp_path_factory.mktemp("whole")
            assert not crash.start(folder, optim, optim_args=ARGUMENTS[optim], dtype=dtype)
            theta, starts = crash.end(folder)
            assert starts == ["0"]
            ends[optim, dtype] = theta
        return ends[optim, dtype]

    return run


def assert_equal(found, expected):
    """Bit-equal, and not because nobody moved."""
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set()
    start = parameters(tiny_bert(dtype=next(iter(expected.values())).dtype))
    assert any(not torch.equal(found[name], start[name]) for name in found)


def killed_and_resumed(folder, optim, kills, dtype=torch.float32):
    for kill in kills:
        assert crash.start(folder, optim, optim_args=ARGUMENTS[optim], kill=kill, dtype=dtype)
    assert not crash.start(folder, optim, optim_args=ARGUMENTS[optim], dtype=dtype)
    return crash.end(folder)


@pytest.mark.parametrize(
    ("optim", "kills", "starts"),
    [
        ("sparse_mfac", [("step", random.Random(1).randrange(4, 7)), ("optimizer.pt", 12)], ["0", "3", "9"]),
        ("lowrank_mfac", [("model.safetensors", 6), ("trainer_state.json", 9)], ["0", "3", "6"]),
        ("sparse_ggt", [("rng_state.pth", 9)], ["0", "6"]),
        ("lorenza", [("step", 5), ("optimizer.pt", 9)], ["0", "3", "6"]),
        ("adarankgrad", [("step", 8)], ["0", "6"]),
    ],
)
def test_a_killed_run_ends_bit_equal(tmp_path, uninterrupted, optim, kills, starts):
    found, resumed_from = killed_and_resumed(tmp_path, optim, kills)
    assert_equal(found, uninterrupted(optim))
    assert resumed_from == starts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_a_killed_run_of_every_optimizer_ends_bit_equal(tmp_path, uninterrupted, optim, dtype):
    """Three runs of three kills each: at two random steps, and in the middle of a random file of a checkpoint."""
    numbers = random.Random(optim)
    for run in range(3):
        kills = [("step", step) for step in numbers.sample(range(4, crash.STEPS + 1), 2)]
        kills = sorted([*kills, (numbers.choice(FILES), 6)], key=lambda kill: kill[1])
        found, starts = killed_and_resumed(tmp_path / str(run), optim, kills, dtype)
        assert_equal(found, uninterrupted(optim, dtype))
        assert len(starts) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_run_killed_in_every_checkpoint_ends_bit_equal(tmp_path, uninterrupted, name):
    kills = [(name, step) for step in (6, 9, 12, 14)]
    found, starts = killed_and_resumed(tmp_path, "sparse_mfac", kills)
    assert_equal(found, uninterrupted("sparse_mfac"))
    assert starts == ["0", "3", "6", "9", "12"]


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sparse_mfac", "microadam"])
def test_a_run_killed_from_outside_at_random_moments_ends_bit_equal(tmp_path, uninterrupted, optim):
    numbers, kills = random.Random(2), 0
    while kills < 12 and crash.start(tmp_path, optim, optim_args=ARGUMENTS[optim], after=numbers.uniform(0.0, 0.1)):
        kills += 1
    if kills == 12:
        assert not crash.start(tmp_path, optim, optim_args=ARGUMENTS[optim])
    assert_equal(crash.end(tmp_path)[0], uninterrupted(optim))
    assert kills >= 3
