"""Where the image recipe's pictures come from, what is done to them, and the checks they must pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from data import NO_HUB
from PIL import Image, ImageOps, UnidentifiedImageError

DIGITS = "digits"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_VALIDATION = ("validation", "val", "valid", "test")
_HELD_OUT = 500  # of the 1,797 digits
_AREA, _ASPECT = (0.08, 1.0), 4 / 3  # of random crops, as networks for ImageNet are trained with


@dataclasses.dataclass(kw_only=True)
class ImageArguments:
    """What to train on."""

    dataset_name: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"a dataset on the Hub with a column of images and one of classes, or {DIGITS}: scikit-learn's"
        },
    )
    image_folder: str | None = dataclasses.field(
        default=None,
        metadata={"help": "a folder with train and validation (or val, test), and in each a folder for every class"},
    )
    image_size: int = dataclasses.field(default=224, metadata={"help": "height and width of what the model sees"})
    augment: Literal["none", "shift", "crop"] = dataclasses.field(
        default="none",
        metadata={
            "help": "to training pictures: shift by up to an eighth and mirror (CIFAR), or crop 8 to 100 % of the area "
            "and mirror (ImageNet)"
        },
    )

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to see.

        Raises:
            ValueError: if the size is too small.
        """
        if self.image_size < 1:
            raise ValueError(f"--image_size must be at least 1: {self.image_size}")


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures and their classes.

    Args:
        read: gives the picture of a number, as PIL has it.
        labels: the number of the class of each.
    """

    read: Callable[[int], Any]
    labels: Sequence[int]


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """A split as the model takes it: `pixel_values` of shape `(3, image_size, image_size)`, and `labels`.

    Args:
        split: the pictures.
        prepare: turns a picture in RGB into pixel values.
    """

    def __init__(self, split: Split, prepare: Callable[[Any], torch.Tensor]) -> None:
        self.split, self.prepare = split, prepare

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"pixel_values": self.prepare(self.split.read(number)), "labels": int(self.split.labels[number])}


def load_images(arguments: ImageArguments) -> tuple[str, tuple[str, ...], dict[str, Split]]:
    """Load what the command line says.

    Args:
        arguments: a dataset, or a folder.

    Returns:
        What to call the task, the names of the classes, and the splits `train` and `validation`.

    Raises:
        ValueError: if there is neither, or both.
    """
    name, folder = arguments.dataset_name, arguments.image_folder
    if (name is None) == (folder is None):
        raise ValueError(
            f"give --image_folder FOLDER, or --dataset_name with a dataset on the Hub or {DIGITS}; got "
            f"{'neither' if name is None else 'both'}"
        )
    if folder is not None:
        return (Path(folder).resolve().name, *_folder(Path(folder)))
    assert name is not None
    return (name.rpartition("/")[2], *(_digits() if name == DIGITS else _hub(name)))


def _digits() -> tuple[tuple[str, ...], dict[str, Split]]:
    """Scikit-learn's: 1,797 of 8 x 8 pixels, in an order of no meaning; the last ones are held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = (found.images * 15.9).astype("uint8"), found.target.tolist()
    train = len(labels) - _HELD_OUT
    splits = {
        "train": Split(lambda number: Image.fromarray(pixels[number]).convert("RGB"), labels[:train]),
        "validation": Split(lambda number: Image.fromarray(pixels[train + number]).convert("RGB"), labels[train:]),
    }
    return tuple("0123456789"), splits


def _folder(folder: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    places = {"train": folder / "train"}
    places["validation"] = next((folder / name for name in _VALIDATION if (folder / name).is_dir()), folder / "none")
    for name, place in places.items():
        if not place.is_dir():
            held = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
            wanted = " or ".join(("train",) if name == "train" else _VALIDATION)
            raise FileNotFoundError(
                f"--image_folder {folder} must hold a folder {wanted}; it holds {held or 'nothing'}"
            )
    classes = tuple(sorted(path.name for path in places["train"].iterdir() if path.is_dir()))
    if len(classes) < 2:
        raise ValueError(f"{places['train']} must hold a folder for each of two or more classes; it holds {classes}")
    splits = {}
    for name, place in places.items():
        files = [(path, path.parent.name) for path in sorted(place.glob("*/*")) if path.suffix.lower() in _SUFFIXES]
        if unknown := sorted({label for _, label in files} - set(classes)):
            raise ValueError(f"{place} has folders that {places['train']} has not: {', '.join(unknown)}")
        if not files:
            raise ValueError(f"{place} holds no {', '.join(_SUFFIXES)} in the folders of its classes")
        splits[name] = _files([path for path, _ in files], [classes.index(label) for _, label in files])
    return classes, splits


def _files(paths: list[Path], labels: list[int]) -> Split:
    def read(number: int) -> Any:
        try:
            with Image.open(paths[number]) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{paths[number]} is not a picture that can be read: {error}; delete it") from error

    return Split(read, labels)


def _hub(name: str) -> tuple[tuple[str, ...], dict[str, Split]]:
    from datasets import ClassLabel, load_dataset
    from datasets import Image as Pixels

    try:
        found = load_dataset(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"could not load {name} from the Hub ({error}). {NO_HUB}: --image_folder FOLDER, or --dataset_name {DIGITS}"
        ) from error
    held_out = next((split for split in _VALIDATION if split in found), None)
    if "train" not in found or held_out is None:
        raise ValueError(
            f"{name} must have a split train and one of {', '.join(_VALIDATION)}; it has {', '.join(found)}"
        )
    features = found["train"].features
    images = [column for column, feature in features.items() if isinstance(feature, Pixels)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(images) != 1 or not labels:
        raise ValueError(f"{name} must have one column of images and one of classes; it has {features}")
    # Of several the first is the one that others name finer or coarser classes of.
    image, label = images[0], labels[0]
    splits = {}
    for split, source in (("train", "train"), ("validation", held_out)):
        numbers = found[source][label][:]
        if min(numbers) < 0:
            raise ValueError(f"the split {source} of {name} is not labelled: it has the class {min(numbers)}")
        splits[split] = Split(_reader(found[source], image), numbers)
    return tuple(features[label].names), splits


def _reader(rows: Any, column: str) -> Callable[[int], Any]:
    return lambda number: rows[number][column].convert("RGB")


def preparation(processor: Any, size: int, augment: str, training: bool) -> Callable[[Any], torch.Tensor]:
    """What is done to a picture before the model sees it.

    Args:
        processor: the model's image processor, which resizes (unless the augmentation has) and normalises.
        size: height and width.
        augment: as in `ImageArguments`.
        training: whether to augment at all.

    Returns:
        A function of a picture. Random numbers are torch's, which a resumed training continues.
    """
    change = {"none": None, "shift": shifted, "crop": cropped}[augment] if training else None

    def prepare(image: Any) -> torch.Tensor:
        image = image if change is None else change(image, size)
        pixels: torch.Tensor = processor(image, do_resize=change is None, return_tensors="pt")["pixel_values"][0]
        if pixels.shape != (3, size, size):
            raise ValueError(
                f"the model's image processor makes pictures of shape {tuple(pixels.shape)}, not (3, {size}, {size}): "
                f"give --image_size {pixels.shape[-1]}"
            )
        return pixels

    return prepare


def shifted(image: Any, size: int) -> Any:
    """Shift a picture by up to an eighth of its size, with black where it was not, and mirror every second one.

    Args:
        image: the picture.
        size: height and width of the result.

    Returns:
        The picture.
    """
    room = max(1, size // 8)
    wide = ImageOps.expand(image.resize((size, size), Image.Resampling.BILINEAR), room)
    left, top = (int(torch.randint(2 * room + 1, ())) for _ in range(2))
    return _mirrored(wide.crop((left, top, left + size, top + size)))


def cropped(image: Any, size: int) -> Any:
    """Resize a random part of a picture, 8 to 100 % of its area at sides of 3:4 to 4:3, and mirror every second one.

    Args:
        image: the picture.
        size: height and width of the result.

    Returns:
        The picture.
    """
    width, height = image.size
    area = width * height * float(torch.empty(()).uniform_(*_AREA))
    ratio = _ASPECT ** float(torch.empty(()).uniform_(-1.0, 1.0))
    w, h = min(width, max(1, round((area * ratio) ** 0.5))), min(height, max(1, round((area / ratio) ** 0.5)))
    left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
    return _mirrored(image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + w, top + h)))


def _mirrored(image: Any) -> Any:
    return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image
