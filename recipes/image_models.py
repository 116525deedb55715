"""The models of the image recipe: from scratch by a short name, or pretrained, each with its image processor."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from data import NO_HUB
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ViTConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetForImageClassification

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
_CROP = 0.875  # of the shorter side, at evaluation, for models that are trained on crops


@dataclasses.dataclass
class ImageModelArguments:
    """What to train."""

    model_name_or_path: str = dataclasses.field(
        default="resnet18",
        metadata={"help": "a folder or a name on the Hub, or resnet18, resnet20 or vit_tiny for a model from scratch"},
    )
    from_scratch: bool = dataclasses.field(
        default=False, metadata={"help": "take the configuration of the folder or name only, and random weights"}
    )


class CifarResNetForImageClassification(ResNetForImageClassification):
    """A ResNet whose first convolution is 3 x 3 and keeps the size, without pooling: for pictures of 8 to 64 pixels.

    Args:
        config: as of `ResNetForImageClassification`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        first: Any = self.resnet.embedder
        first.embedder = ResNetConvLayer(config.num_channels, config.embedding_size, 3, 1, config.hidden_act)
        first.pooler = torch.nn.Identity()
        self.post_init()  # type: ignore[no-untyped-call]


def _resnet(cls: Any, widths: list[int], depths: list[int], head: dict[str, Any]) -> Any:
    config = ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=widths,
        depths=depths,
        layer_type="basic",
        downsample_in_first_stage=False,
    )
    config.update(head)
    return cls(config)


def _vit(size: int, head: dict[str, Any]) -> Any:
    config = ViTConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=3,
        image_size=size,
        patch_size=max(1, size // 14),
    )
    config.update(head)
    return transformers.ViTForImageClassification(config)


FROM_SCRATCH = {
    "resnet18": lambda size, head: _resnet(ResNetForImageClassification, [64, 128, 256, 512], [2, 2, 2, 2], head),
    "resnet20": lambda size, head: _resnet(CifarResNetForImageClassification, [16, 32, 64], [3, 3, 3], head),
    "vit_tiny": _vit,
}


def load_image_model(
    arguments: ImageModelArguments, classes: tuple[str, ...], size: int, cropped: bool
) -> tuple[Any, Any]:
    """Load an image processor and a model with a head for the classes, in float32.

    Args:
        arguments: which model.
        classes: the names of the classes.
        size: height and width of its pictures.
        cropped: whether a model from scratch is trained on crops: it is then evaluated on the middle of a picture.

    Returns:
        The processor and the model.

    Raises:
        FileNotFoundError: if the model is a path that does not exist.
        OSError: if the model is neither a folder here nor found on the Hub.
    """
    name = arguments.model_name_or_path
    head: dict[str, Any] = {"id2label": dict(enumerate(classes))}
    head |= {"label2id": {label: number for number, label in enumerate(classes)}}
    if name in FROM_SCRATCH:
        return _processor(size, cropped), FROM_SCRATCH[name](size, head)
    path = Path(name).expanduser()
    if not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"--model_name_or_path {name} is not a folder, and no name of a model on the Hub")
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source, **head)
        auto: Any = (
            CifarResNetForImageClassification
            if config.architectures == ["CifarResNetForImageClassification"]
            else AutoModelForImageClassification
        )
        if arguments.from_scratch:
            make = auto if auto is CifarResNetForImageClassification else auto.from_config
            return _processor(size, cropped), make(config)
        # Imported from its module: transformers 5.17 has it at the top only where there is torchvision.
        processor = AutoImageProcessor.from_pretrained(source)  # type: ignore[no-untyped-call]
        model = auto.from_pretrained(source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    except OSError as error:
        raise OSError(
            f"could not load {name}: it is no folder with a model here, and the Hub did not give it ({error}). "
            f"{NO_HUB}: --model_name_or_path FOLDER, or {', '.join(FROM_SCRATCH)}"
        ) from error
    return processor, model


def _processor(size: int, cropped: bool) -> Any:
    # Those of PIL: the others need torchvision.
    options: dict[str, Any] = {"image_mean": _MEAN, "image_std": _STD}
    kind = "ConvNextImageProcessor" if cropped else "ViTImageProcessor"
    cls = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    if cropped:
        return cls(size={"shortest_edge": size}, crop_pct=_CROP, **options)
    return cls(size={"height": size, "width": size}, **options)
