"""The image recipe: folders and datasets of pictures, what is done to them, models, and whole runs on digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as Pixels
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetConfig, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("private_cache")


def picture(shade, size=(12, 8)):
    return Image.new("RGB", size, (shade, shade // 2, 255 - shade))


@pytest.fixture
def folder(tmp_path):
    """Dark and light pictures, of which the model must tell which is which."""
    for split, count in (("train", 16), ("val", 6)):
        for name, shade in (("dark", 10), ("light", 200)):
            place = tmp_path / "pictures" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                picture(shade + number).save(place / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def tiny_model(recipe, tmp_path):
    """The configuration of a ResNet of two small stages, with its processor."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    recipe.image_models._processor(16, False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(recipe, **arguments):
    return recipe.image_data.load_images(recipe.image_data.ImageArguments(**arguments))


def run(recipe, *flags, **options):
    common = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": "true", "use_cpu": "true"}
    common |= {"dataloader_pin_memory": "false", **options}
    recipe.run_image_classification.main([*map(str, flags), *(f"--{name}={value}" for name, value in common.items())])


# Data


def test_a_folder_has_its_classes_in_order(recipe, folder):
    name, classes, splits = load(recipe, image_folder=str(folder))
    assert (name, classes) == ("pictures", ("dark", "light"))
    assert splits["train"].labels == [0] * 16 + [1] * 16
    assert splits["validation"].labels == [0] * 6 + [1] * 6
    assert splits["train"].read(16).getpixel((0, 0)) == (200, 100, 55)


def test_digits_are_the_same_every_time(recipe):
    name, classes, splits = load(recipe, dataset_name="digits")
    assert (name, classes, len(splits["train"].labels)) == ("digits", tuple("0123456789"), 1297)
    assert len(splits["validation"].labels) == 500
    assert set(splits["validation"].labels) == set(range(10))
    image = splits["validation"].read(0)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.asarray(image).max() > 200


def test_a_dataset_of_the_hub_is_told_from_its_columns(recipe, monkeypatch):
    rows = {"img": [picture(9), picture(99)], "fine": [1, 0], "note": ["a", "b"]}
    features = Features({"img": Pixels(), "fine": ClassLabel(names=["no", "yes"]), "note": Value("string")})
    data = DatasetDict(dict.fromkeys(("train", "test"), Dataset.from_dict(rows, features=features)))
    monkeypatch.setattr("datasets.load_dataset", lambda name: data)
    name, classes, splits = load(recipe, dataset_name="some/pictures")
    assert (name, classes, list(splits["validation"].labels)) == ("pictures", ("no", "yes"), [1, 0])
    assert splits["train"].read(1).getpixel((0, 0)) == (99, 49, 156)
    del data["test"]
    with pytest.raises(ValueError, match="must have a split train and one of validation.*; it has train"):
        load(recipe, dataset_name="some/pictures")


def test_what_does_not_fit_is_said(recipe, folder, tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        load(recipe)
    with pytest.raises(ValueError, match="got both"):
        load(recipe, dataset_name="digits", image_folder=str(folder))
    with pytest.raises(FileNotFoundError, match="must hold a folder train; it holds nothing"):
        load(recipe, image_folder=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="image_size must be at least 1: 0"):
        recipe.image_data.ImageArguments(image_size=0)
    (folder / "val" / "grey").mkdir()
    picture(5).save(folder / "val" / "grey" / "0.png")
    with pytest.raises(ValueError, match=r"val has folders that .*train has not: grey"):
        load(recipe, image_folder=str(folder))
    (folder / "train" / "grey").mkdir()
    (folder / "train" / "grey" / "0.png").write_text("no picture")
    split = load(recipe, image_folder=str(folder))[2]["train"]
    with pytest.raises(ValueError, match=r"grey/0.png is not a picture that can be read"):
        split.read(split.labels.index(1))


# What is done to a picture


def test_pictures_are_normalised(recipe):
    processor = recipe.image_models._processor(4, False)
    pixels = recipe.image_data.preparation(processor, 4, "none", False)(picture(51))
    want = (np.array([51, 25, 204]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert pixels.shape == (3, 4, 4)
    torch.testing.assert_close(pixels[:, 2, 1].double(), torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_a_shift_moves_by_an_eighth_at_most_and_mirrors_half_of_the_pictures(recipe):
    image = Image.new("RGB", (16, 16))
    image.putpixel((3, 8), (255, 255, 255))
    torch.manual_seed(0)
    places = []
    for _ in range(200):
        rows, columns = np.nonzero(np.asarray(recipe.image_data.shifted(image, 16))[:, :, 0])
        places.append((int(rows[0]), int(columns[0])))
    assert {row for row, _ in places} == {6, 7, 8, 9, 10}
    assert {column for _, column in places} == {1, 2, 3, 4, 5} | {10, 11, 12, 13, 14}
    assert 70 < sum(column < 8 for _, column in places) < 130


def test_a_crop_is_a_part_of_the_picture(recipe):
    """Of a ramp from left to right: the part's share of the width and its sides, over many draws."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype("uint8"), (64, 1))).convert("RGB")
    torch.manual_seed(0)
    spans, mirrored = [], 0
    for _ in range(200):
        row = np.asarray(recipe.image_data.cropped(ramp, 32))[16, :, 0].astype(int)
        mirrored += row[0] > row[-1]
        spans.append(abs(row[-1] - row[0]) / 255)
    assert 70 < mirrored < 130
    assert min(spans) < 0.45
    assert max(spans) > 0.9
    assert np.mean(spans) == pytest.approx(0.70, abs=0.05)  # the mean root of areas from 0.08 to 1


def test_training_pictures_are_augmented_and_others_are_not(recipe):
    processor = recipe.image_models._processor(16, True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype="uint8"))
    train, judge = (recipe.image_data.preparation(processor, 16, "crop", training) for training in (True, False))
    assert not torch.equal(train(image), train(image))
    assert torch.equal(judge(image), judge(image))
    assert train(image).shape == judge(image).shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"pictures of shape \(3, 16, 16\), not \(3, 8, 8\): give --image_size 16"):
        recipe.image_data.preparation(processor, 8, "none", False)(image)


# Models


def test_models_from_scratch(recipe):
    """As many parameters as the papers' have; the published count of ResNet-20 is 272 thousand."""
    counts = {}
    for name, classes in (("resnet18", 1000), ("resnet20", 10), ("vit_tiny", 10)):
        arguments = recipe.image_models.ImageModelArguments(name)
        _, model = recipe.image_models.load_image_model(arguments, tuple(map(str, range(classes))), 32, False)
        counts[name] = sum(p.numel() for p in model.parameters())
        assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape == (2, classes)
    assert counts["resnet18"] == 11_689_512
    assert counts["resnet20"] // 1000 == 272
    assert 5_000_000 < counts["vit_tiny"] < 6_000_000


def test_resnet20_keeps_the_size_of_its_pictures(recipe, tmp_path):
    arguments = recipe.image_models.ImageModelArguments("resnet20")
    processor, model = recipe.image_models.load_image_model(arguments, ("a", "b"), 8, False)
    seen = model.eval()(pixel_values=torch.randn(2, 3, 8, 8), output_hidden_states=True)
    assert [tuple(state.shape[1:]) for state in seen.hidden_states] == [
        *((16, 8, 8), (16, 8, 8)),
        *((32, 4, 4), (64, 2, 2)),
    ]
    for part in (processor, model):
        part.save_pretrained(tmp_path)
    again = recipe.image_models.ImageModelArguments(str(tmp_path))
    loaded = recipe.image_models.load_image_model(again, ("a", "b"), 8, False)[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_weights_are_loaded_unless_from_scratch(recipe, tiny_model):
    saved = AutoModelForImageClassification.from_pretrained(tiny_model)
    for scratch in (False, True):
        arguments = recipe.image_models.ImageModelArguments(str(tiny_model), from_scratch=scratch)
        _, model = recipe.image_models.load_image_model(arguments, ("a", "b", "c"), 16, False)
        assert model.classifier[1].out_features == 3
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
        first = [m.resnet.embedder.embedder.convolution.weight for m in (saved, model)]
        assert torch.equal(*first) != scratch
    with pytest.raises(FileNotFoundError, match="is not a folder, and no name of a model"):
        recipe.image_models.load_image_model(recipe.image_models.ImageModelArguments("/missing/x"), ("a",), 16, False)


# Whole runs


def test_a_folder_is_learned_and_the_model_is_of_use(recipe, folder, tiny_model, tmp_path):
    flags = {"image_folder": folder, "model_name_or_path": tiny_model, "from_scratch": "true", "image_size": 16}
    flags |= {"output_dir": tmp_path / "out", "learning_rate": 1e-2, "optim_args": "trust_lr=1.0", "max_steps": 12}
    run(recipe, **flags)
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (record["task"], record["steps"], record["optimizer"]) == ("pictures", 12, "lowrank_mfac")
    assert (record["image_size"], record["train_examples"], record["layers"]) == (16, 32, None)
    assert record["metrics"]["accuracy"] == 1.0
    assert (tmp_path / "out" / "training.png").stat().st_size > 10_000
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    classify = pipeline("image-classification", str(tmp_path / "out"), image_processor=processor, device="cpu")
    told = classify(picture(205))
    assert told[0]["label"] == "light"


def test_digits_beside_a_baseline(recipe, tmp_path):
    config = ROOT / "recipes" / "configs" / "digits.yaml"
    run(recipe, config, output_dir=tmp_path / "out", baseline="adamw_torch", baseline_learning_rate=3e-3, max_steps=30)
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (record["metrics"]["accuracy"] > 0.3, record["baseline"]["metrics"]["accuracy"] > 0.3) == (True, True)
    assert record["optimizer_memory"]["total"] < record["baseline"]["optimizer_memory"]["total"]


def test_the_learning_rate_falls_in_steps(recipe, folder, tiny_model, tmp_path):
    flags = {"image_folder": folder, "model_name_or_path": tiny_model, "image_size": 16, "augment": "shift"}
    flags |= {"output_dir": tmp_path / "out", "learning_rate": 1e-3, "max_steps": 8, "warmup_steps": 4}
    run(recipe, "--lr_steps", "0.5", "0.75", **flags)
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    rates = [row["learning_rate"] for row in history if "learning_rate" in row]
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [1e-5] * 2)
    with pytest.raises(ValueError, match=r"lr_steps must be ascending fractions between 0 and 1: \[0.75, 0.5\]"):
        recipe.run_image_classification.StepArguments([0.75, 0.5])
