"""Every optimizer by its name trains a model through the Trainer: the loss falls, and every tensor moves."""

import pytest
import torch
from tiny import arguments, parameters, tiny_bert, toy_rows, train

from hf_efcp import OPTIMIZERS, EFCPTrainer

# A tiny model that starts from nothing wants more entries and longer steps than the defaults, which were measured on a
# pretrained BERT.
SETTINGS = {
    "sparse_mfac": "num_grads=16,density=0.1,trust_lr=1e-2",
    "sparse_ggt": "num_grads=16,density=0.1",
    "dense_mfac": "num_grads=16,trust_lr=1e-2",
    "dense_ggt": "num_grads=16",
    "lowrank_mfac": "num_grads=16,rank=2,trust_lr=1e-2",
    "lowrank_ggt": "num_grads=16,rank=2",
    "sparse_adagrad": "density=0.1",
    "microadam": "density=0.1",
    "galore": "rank=8,scale=1,update_gap=10",
    "adarankgrad": "max_rank=8,scale=1,max_gap=10",
    "lorenza": "rank=8,scale=1,update_gap=10",
    "natural_galore": "rank=8,scale=1,update_gap=10",
}


def loss_of(model, rows, folder):
    return EFCPTrainer(model=model, args=arguments(folder, optim="sparse_mfac")).evaluate(rows)["eval_loss"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls_and_every_tensor_moves(name, tmp_path):
    rows = toy_rows(128)
    model = tiny_bert()
    before, loss = parameters(model), loss_of(model, rows, tmp_path)
    train(
        arguments(
            tmp_path, optim=name, optim_args=SETTINGS[name], max_steps=80, warmup_steps=8,
            learning_rate=1e-2 if name == "sparse_adagrad" else 2e-3,  # whose sum never forgets
            per_device_train_batch_size=16,
        ),
        model,
        rows,
    )  # fmt: skip
    assert loss_of(model, rows, tmp_path) < 0.8 * loss
    still = [key for key, value in parameters(model).items() if torch.equal(value, before[key])]
    assert not still
