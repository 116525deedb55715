"""Published numbers, as they were published, and the settings that each of them belongs to. None is measured here.

M-FAC: the model cards huggingface.co/M-FAC/bert-{tiny,mini}-finetuned-{task}, mean and standard deviation of 5 runs in
percent, on the validation split. Their Adam was not tuned ("default Adam baseline"; the cards do not say its learning
rate, and `adam` here takes 5e-5, Trainer's default): Google reports 70.2 on MNLI and 81.5 on QNLI for BERT-tiny with a
tuned Adam, on the test sets. EFCP (arXiv 2306.06098) and MicroAdam (arXiv 2405.15593): the settings are those of their
repositories; their papers' tables could not be looked up, and no number of theirs is written down.
"""

from __future__ import annotations

import dataclasses

Number = tuple[float, float | None]  # the mean, and the standard deviation where it is known

TUNED_ADAM = (
    "Adam of the model cards was not tuned. Google's tuned Adam reports 70.2 on MNLI and 81.5 on QNLI for BERT-tiny, "
    "on the test sets."
)
SEEDS = (42, 7, 1234, 8276, 10723)  # those that the cards name for their best runs

# By model and task: Adam's and M-FAC's number.
_CARDS: dict[str, dict[str, tuple[Number, Number]]] = {
    "bert-tiny": {
        "mnli": ((65.36, 0.13), (68.28, 3.29)),
        "qnli": ((77.85, 0.15), (81.17, 0.43)),
        "qqp": ((81.09, 0.15), (84.29, 0.08)),
        "sst2": ((80.11, None), (81.86, None)),
        "mrpc": ((81.68, 0.33), (82.77, 0.22)),
        "stsb": ((64.39, 5.02), (80.15, 0.52)),
        "squad_v2": ((49.99, 0.54), (52.18, 0.20)),
    },
    "bert-mini": {
        "mnli": ((73.30, 0.20), (74.59, 0.41)),
        "qnli": ((83.85, 0.10), (83.70, 0.13)),
        "qqp": ((86.45, 0.12), (86.75, 0.20)),
        "sst2": ((85.46, 0.58), (84.20, 0.58)),
        "mrpc": ((84.57, 0.36), (85.06, 1.63)),
        "stsb": ((82.09, 0.54), (84.66, 0.30)),
        "squad_v2": ((58.13, 0.31), (61.35, 0.24)),
    },
}
_METRICS = {"mrpc": "f1", "stsb": "pearson", "squad_v2": "f1"}  # of the others accuracy; on mnli the matched one
_ADAM = {"optim": "adamw_torch", "optim_args": "", "learning_rate": "5e-5"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a published table.

    Args:
        config: the YAML file under `recipes/configs/published/`, without its ending.
        flags: what the row has other than the file.
        metric: what the number is of, as in `metrics.json`.
        number: the published mean and standard deviation, in percent; None where it is not written down.
        seeds: how many runs make a row, at most five.
    """

    config: str
    flags: dict[str, str]
    metric: str
    number: Number | None
    seeds: int = 1

    @property
    def script(self) -> str:
        """The program that runs it."""
        return "run_qa" if self.config.endswith("squad") else "run_glue"

    def command(self) -> list[str]:
        """The command line of a run, without a seed and a folder.

        Returns:
            The configuration's name, and the flags.
        """
        return [f"published/{self.config}", *(f"--{name}={value}" for name, value in self.flags.items())]


def _of_cards() -> dict[str, Row]:
    rows = {}
    for model, tasks in _CARDS.items():
        for task, numbers in tasks.items():
            config, flags = f"mfac_{model.replace('-', '_')}", {"task_name": task}
            if task == "squad_v2":
                config, flags = f"{config}_squad", {}
            if task == "sst2":
                flags["num_train_epochs"] = "3"
            mfac = {"optim_args": "num_grads=512,damp=1e-6,metric=none"} if task in ("mrpc", "stsb") else {}
            for optimizer, own, number in (("adam", _ADAM, numbers[0]), ("mfac", mfac, numbers[1])):
                metric = _METRICS.get(task, "accuracy")
                rows[f"{model}/{task}/{optimizer}"] = Row(config, {**flags, **own}, metric, number, len(SEEDS))
    return rows


_LOW_RANK = {"optim": "lowrank_mfac", "optim_args": "num_grads=1024,rank=4,damp=5e-5,metric=none"}
ROWS: dict[str, Row] = {
    **_of_cards(),
    "bert-base/mnli/efcp-topk": Row("efcp_bert_base", {}, "accuracy", None),
    "bert-base/mnli/efcp-rank4": Row("efcp_bert_base", _LOW_RANK, "accuracy", None),
    "bert-base/squad_v2/efcp-topk": Row("efcp_bert_base_squad", {}, "f1", None),
    "bert-base/squad_v2/efcp-rank4": Row("efcp_bert_base_squad", _LOW_RANK, "f1", None),
    "bert-base/mnli/microadam": Row("microadam_bert_base", {"bf16": "true"}, "accuracy", None),
}
