"""Fine-tune a model on questions whose answers stand in a text, as in SQuAD, with an EFCP optimizer.

    python recipes/run_qa.py recipes/configs/squad_v2.yaml
    python recipes/run_qa.py recipes/configs/squad_v2.yaml --baseline adamw_torch --baseline_learning_rate 3e-5
    python recipes/run_qa.py --data_dir my_folder --max_train_samples 1000 --output_dir outputs/mine

The folder `output_dir` then holds the model with its tokenizer, `metrics.json`, `history.json`, `training.png` and
`predictions.json`, the answers to the validation questions in the form that SQuAD's evaluation takes. "No answer" may
be predicted if the data, before any of it is left out, has a question without one. Defaults that are not Trainer's
are those of `run_glue.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import DEFAULTS, BaselineArguments, ModelArguments, runs_of
from cli import explained, parse_arguments, require
from qa_data import has_unanswerable, load_questions
from qa_features import AnswerFinder, check_tokenizer, cut_windows
from qa_metrics import metric_names, squad_metrics

from hf_efcp import EFCPTrainingArguments

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from hf_efcp import EFCPTrainer


@dataclasses.dataclass(kw_only=True)
class DataArguments:
    """What to train on, and how answers are chosen."""

    dataset_name: str = dataclasses.field(
        default="rajpurkar/squad_v2",
        metadata={"help": "rajpurkar/squad_v2, rajpurkar/squad, or a dataset on the Hub in their format"},
    )
    data_dir: str | None = dataclasses.field(
        default=None,
        metadata={"help": "a folder with train and validation as .json (SQuAD's own or flat), .jsonl or .parquet"},
    )
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "train on so many questions, the first ones; default: all of them"}
    )
    max_eval_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "evaluate on so many questions, the first ones; default: all of them"}
    )
    max_seq_length: int = dataclasses.field(
        default=384, metadata={"help": "longer texts are cut into windows of so many tokens, the question included"}
    )
    doc_stride: int = dataclasses.field(
        default=128, metadata={"help": "the tokens of the text that neighbouring windows share"}
    )
    n_best_size: int = dataclasses.field(
        default=20, metadata={"help": "the first tokens, and the last, that are tried with each other in a window"}
    )
    max_answer_length: int = dataclasses.field(default=30, metadata={"help": "the tokens of the longest answer"})
    null_score_diff_threshold: float = dataclasses.field(
        default=0.0,
        metadata={"help": "predict no answer if its score exceeds that of the best answer by more than this"},
    )

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to do.

        Raises:
            ValueError: if one is too small.
        """
        least = {"max_train_samples": 1, "max_eval_samples": 1, "doc_stride": 0, "n_best_size": 1}
        for name, bound in {**least, "max_answer_length": 1}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"--{name} must be at least {bound}: {value}")


@dataclasses.dataclass(frozen=True)
class QATask:
    """What the recipes' `train` must know of a task."""

    name: str
    metrics: tuple[str, ...]
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def headline(self) -> str:
        """The metric that stands for the task in one line."""
        return self.metrics[0]


class Evaluation:
    """Computes the metrics of an evaluation, and keeps its answers.

    Args:
        questions: the validation questions.
        finder: what finds the answers to them.
    """

    def __init__(self, questions: Any, finder: AnswerFinder) -> None:
        self.true = {row["id"]: row["answers"]["text"] for row in questions.select_columns(["id", "answers"])}
        self.finder = finder
        self.predictions: dict[str, str] = {}

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        """Compute the metrics.

        Args:
            output: the logits of the validation questions' windows.

        Returns:
            The value of each metric.
        """
        logits: Any = output.predictions  # encoder-decoders return more than the two
        self.predictions = self.finder(logits[0], logits[1])
        return squad_metrics(self.predictions, self.true)


def build_trainer(
    model: Any, tokenizer: Any, windows: dict[str, Any], evaluation: Evaluation, args: EFCPTrainingArguments
) -> EFCPTrainer:
    """Put together what `train` trains.

    Args:
        model: the model; it is trained in place.
        tokenizer: the model's tokenizer.
        windows: the windows of each split.
        evaluation: what computes the metrics on the validation split.
        args: the training arguments.

    Returns:
        A trainer that watches the metrics on the validation split.
    """
    from training import InOrder
    from transformers import DataCollatorWithPadding

    return InOrder(
        model=model,
        args=args,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=evaluation,
    )


def main(argv: list[str]) -> None:
    """Run the recipe.

    Args:
        argv: the command line without the program's name.
    """
    require("recipes", "datasets", "matplotlib", "yaml")
    data_arguments, model_arguments, baseline, args = parse_arguments(
        (DataArguments, ModelArguments, BaselineArguments, EFCPTrainingArguments),
        argv,
        DEFAULTS,
        elsewhere={"do_predict": "predictions.json, the answers to the validation questions, which are always written"},
    )
    runs = runs_of(args, baseline)
    questions = load_questions(data_arguments.dataset_name, data_arguments.data_dir)
    may_be_null = any(has_unanswerable(split) for split in questions.values())
    limits = {"train": data_arguments.max_train_samples, "validation": data_arguments.max_eval_samples}
    for name, limit in limits.items():
        if limit is not None:
            questions[name] = questions[name].select(range(min(limit, len(questions[name]))))

    # These take seconds to import: what is wrong with the command line and the data has been told before.
    from fine_tuning import fine_tune
    from training import load_pretrained, write_json
    from transformers import AutoModelForQuestionAnswering, set_seed

    set_seed(args.seed)  # the new head's weights
    tokenizer, model = load_pretrained(model_arguments, AutoModelForQuestionAnswering, {"num_labels": 2})
    check_tokenizer(tokenizer, data_arguments.max_seq_length)
    with args.main_process_first():
        windows = {
            name: cut_windows(
                tokenizer,
                split,
                data_arguments.max_seq_length,
                data_arguments.doc_stride,
                keep_places=name == "validation",
                name=name,
            )
            for name, split in questions.items()
        }
    finder = AnswerFinder(
        questions["validation"],
        windows["validation"],
        n_best_size=data_arguments.n_best_size,
        max_answer_length=data_arguments.max_answer_length,
        null_threshold=data_arguments.null_score_diff_threshold if may_be_null else None,
    )
    evaluation = Evaluation(questions["validation"], finder)
    source = Path(data_arguments.data_dir).resolve() if data_arguments.data_dir else Path(data_arguments.dataset_name)
    task = QATask(source.name, metric_names(evaluation.true))

    def build(model: Any, run: EFCPTrainingArguments) -> EFCPTrainer:
        return build_trainer(model, tokenizer, windows, evaluation, run)

    def write(trainer: EFCPTrainer, folder: Path) -> list[str]:
        if args.process_index == 0:
            write_json(folder / "predictions.json", evaluation.predictions)
        return ["predictions.json"]

    counts = {
        "train_examples": len(questions["train"]),
        "train_windows": len(windows["train"]),
        "validation_examples": len(questions["validation"]),
    }
    fine_tune(runs, task, windows, model, model_arguments, build, write, counts)


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
