"""Train a model on classes of pictures, from scratch or pretrained, with an EFCP optimizer.

    python recipes/run_image_classification.py recipes/configs/digits.yaml
    python recipes/run_image_classification.py recipes/configs/digits.yaml --baseline adamw_torch --seed 1
    python recipes/run_image_classification.py --image_folder my_folder --model_name_or_path resnet18 --augment crop
    python recipes/run_image_classification.py --dataset_name uoft-cs/cifar10 --model_name_or_path resnet20 \
      --image_size 32 --augment shift

The folder `output_dir` then holds the model with its image processor, `metrics.json`, `history.json` and
`training.png`. Defaults that are not Trainer's are those of `run_glue.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from arguments import DEFAULTS, BaselineArguments, ModelArguments, runs_of
from cli import explained, parse_arguments, require
from fine_tuning import fine_tune
from image_data import ImageArguments, Pictures, load_images, preparation
from image_models import ImageModelArguments, load_image_model
from training import InOrder, first_output
from transformers import EvalPrediction, set_seed

from hf_efcp import EFCPTrainer, EFCPTrainingArguments
from hf_efcp.glue import GlueTask, compute_metrics


@dataclasses.dataclass
class StepArguments:
    """A learning rate that falls in steps, which Trainer has no name for."""

    lr_steps: list[float] | None = dataclasses.field(
        default=None,
        metadata={"help": "after these fractions of training, 0.5 0.75 for example, the learning rate is a tenth"},
    )

    def __post_init__(self) -> None:
        """Refuse fractions that are none.

        Raises:
            ValueError: if they are not ascending between 0 and 1.
        """
        ends = [0.0, *(self.lr_steps or []), 1.0]
        if not all(a < b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"--lr_steps must be ascending fractions between 0 and 1: {self.lr_steps}")


class Stepped(InOrder):
    """Has a learning rate that falls to a tenth at some fractions of training, if there are any.

    Args:
        *args: as in the parent.
        lr_steps: the fractions.
        **kwargs: as in the parent.
    """

    def __init__(self, *args: Any, lr_steps: list[float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lr_steps = lr_steps

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As the parent's, or in steps.

        Args:
            num_training_steps: the number of training steps.
            optimizer: the optimizer; None takes the trainer's.

        Returns:
            The scheduler.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.lr_steps:
            steps = [fraction * num_training_steps for fraction in self.lr_steps]
            own: Any = optimizer or self.optimizer
            for group in own.param_groups:
                group["lr"] = group["initial_lr"]  # the parent's scheduler may have begun to warm up
            scheduler = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 0.1 ** sum(step >= at for at in steps))
            self.lr_scheduler = scheduler
        return scheduler


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack pictures and classes.

    Args:
        rows: as `Pictures` gives them.

    Returns:
        The batch.
    """
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def main(argv: list[str]) -> None:
    """Run the recipe.

    Args:
        argv: the command line without the program's name.
    """
    require("recipes", "datasets", "matplotlib", "PIL", "scipy", "sklearn", "yaml")
    images, model_arguments, stepped, baseline, args = parse_arguments(
        (ImageArguments, ImageModelArguments, StepArguments, BaselineArguments, EFCPTrainingArguments),
        argv,
        DEFAULTS,
        elsewhere={"do_predict": "a pipeline of transformers on the folder of the model"},
    )
    runs = runs_of(args, baseline)
    name, classes, loaded = load_images(images)
    task = GlueTask(name, (), classes, ("accuracy",), (), test_splits=())
    set_seed(args.seed)  # the weights of the model, or of its head
    processor, model = load_image_model(model_arguments, classes, images.image_size, images.augment == "crop")
    splits = {
        split: Pictures(pictures, preparation(processor, images.image_size, images.augment, split == "train"))
        for split, pictures in loaded.items()
    }
    splits["validation"][0]  # a size that does not fit is better said now

    def metrics(output: EvalPrediction) -> dict[str, float]:
        return compute_metrics(task, first_output(output.predictions).argmax(-1), output.label_ids)

    def build(model: Any, run: EFCPTrainingArguments) -> EFCPTrainer:
        return Stepped(
            model=model,
            args=run,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=processor,
            data_collator=collate,
            compute_metrics=metrics,
            lr_steps=stepped.lr_steps,
        )

    def write(trainer: EFCPTrainer, folder: Path) -> list[str]:
        return []

    source = ModelArguments(model_arguments.model_name_or_path)
    fine_tune(runs, task, splits, model, source, build, write, {"image_size": images.image_size})


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
