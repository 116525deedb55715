"""`EFCPTrainingArguments` beside another configuration, in either order."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_efcp import EFCPTrainingArguments


@dataclasses.dataclass
class Tuned(TrainingArguments):
    """As TRL's SFTConfig: other defaults, fields of its own, and work before the parent's."""

    learning_rate: float = dataclasses.field(default=2e-5, metadata={"help": "The initial learning rate."})
    gradient_checkpointing: bool = True
    weight_decay: float = 0.25
    max_length: int | None = 1024
    columns: list[str] = dataclasses.field(default_factory=lambda: ["text"])

    def __post_init__(self) -> None:
        self.seen_rate = self.learning_rate
        super().__post_init__()


@dataclasses.dataclass
class OursFirst(EFCPTrainingArguments, Tuned):
    max_length: int | None = 2048
    own: float = 0.5


@dataclasses.dataclass
class OursLast(Tuned, EFCPTrainingArguments):
    max_length: int | None = 2048
    own: float = 0.5


@dataclasses.dataclass
class Translating(EFCPTrainingArguments, Seq2SeqTrainingArguments):
    pass


@dataclasses.dataclass
class TranslatingLast(Seq2SeqTrainingArguments, EFCPTrainingArguments):
    pass


class Derived(OursFirst):
    """No dataclass, and needs to be none: it has no fields of its own."""


@dataclasses.dataclass
class Eager(EFCPTrainingArguments):
    learning_rate: float = 3e-4


@dataclasses.dataclass
class EagerAndTuned(Eager, Tuned):
    pass


@pytest.mark.parametrize("cls", [OursFirst, OursLast, Derived])
@pytest.mark.parametrize("optim", ["lowrank_mfac", "sgd", None])
def test_defaults_of_another_configuration_stay_in_either_order(cls, optim):
    args = cls(output_dir="out", use_cpu=True, **({"optim": optim} if optim else {}))
    assert args.optim == (optim or TrainingArguments.optim)
    assert (args.learning_rate, args.seen_rate, args.weight_decay, args.gradient_checkpointing) == (
        2e-5,
        2e-5,
        0.25,
        True,
    )
    assert (args.max_length, args.columns, args.own, args.efcp_diagnostics_steps) == (2048, ["text"], 0.5, 0)
    assert args.per_device_train_batch_size == TrainingArguments.per_device_train_batch_size
    copies = [cls(**args.to_dict()), dataclasses.replace(args), pickle.loads(pickle.dumps(args))]
    assert all(copy.to_dict() == args.to_dict() for copy in copies)


@pytest.mark.parametrize("cls", [OursFirst, OursLast])
def test_the_parser_takes_our_names_in_either_order(cls):
    flags = ["--output_dir", "out", "--use_cpu", "--optim", "sparse-mfac"]
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(flags)
    assert (args.optim, args.learning_rate, args.gradient_checkpointing) == ("sparse_mfac", 2e-5, True)
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses([*flags, "--learning_rate", "0.5", "--own", "2"])
    assert (args.learning_rate, args.own) == (0.5, 2.0)


@pytest.mark.parametrize("cls", [OursFirst, OursLast])
def test_none_asks_for_the_optimizers_rate_or_the_configurations(cls):
    assert cls(output_dir="out", use_cpu=True, optim="sparse_adagrad", learning_rate=None).learning_rate == 1e-2
    assert cls(output_dir="out", use_cpu=True, optim="sgd", learning_rate=None).learning_rate == 2e-5


@pytest.mark.parametrize("cls", [Translating, TranslatingLast])
@pytest.mark.parametrize(("optim", "rate"), [("sparse_adagrad", 1e-2), ("sgd", 5e-5)])
def test_without_another_default_the_rate_is_the_optimizers(cls, optim, rate):
    args = cls(output_dir="out", use_cpu=True, optim=optim, predict_with_generate=True)
    assert (args.optim, args.learning_rate, args.predict_with_generate) == (optim, rate, True)
    plain = Seq2SeqTrainingArguments(output_dir="out", use_cpu=True).to_dict()
    ours = cls(output_dir="out", use_cpu=True).to_dict()
    assert {key: value for key, value in ours.items() if key in plain} == plain
    assert ours.keys() - plain.keys() == {"efcp_diagnostics_steps"}


def test_a_default_of_ones_own_comes_first():
    assert Eager(output_dir="out", use_cpu=True).learning_rate == 3e-4
    args = EagerAndTuned(output_dir="out", use_cpu=True, optim="lowrank_mfac")
    assert (args.learning_rate, args.gradient_checkpointing) == (3e-4, True)


@pytest.mark.parametrize(
    ("bases", "made", "lost"),
    [
        ((EFCPTrainingArguments, Tuned), "EFCPTrainingArguments", "Tuned"),
        ((Tuned, EFCPTrainingArguments), "Tuned", "EFCPTrainingArguments"),
    ],
)
def test_a_class_that_would_lose_defaults_for_want_of_its_decorator_is_refused(bases, made, lost):
    forgotten = type("Forgotten", bases, {})
    message = f"the constructor of {made}, .* defaults of {lost}: put @dataclass above class Forgotten"
    with pytest.raises(TypeError, match=message):
        forgotten(output_dir="out", use_cpu=True)
