"""Labels in files of one's own: classes are matched by their names, and rows without a label are counted."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def parquet(recipe, tmp_path):
    """Arguments for .parquet files with these labels; those that come with names are classes that the file names."""

    def write_labels(name, labels, names=None):
        columns = {"text": [f"text {number}" for number in range(len(labels))], "label": labels}
        features = names and Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{name}.parquet")
        return str(tmp_path / f"{name}.parquet")

    def make(train, validation):
        return recipe.own_data.FileArguments(write_labels("train", *train), write_labels("validation", *validation))

    return make


NAMED = ([0, 1, 2, 1], ["neg", "neutral", "pos"])


@pytest.mark.parametrize(
    ("train", "validation", "numbers"),
    [
        (NAMED, ([1, 0], ["neg", "neutral", "pos"]), [1, 0]),
        (NAMED, ([0, 0], ["pos"]), [2, 2]),
        (NAMED, ([1, 0, 1], ["neg", "pos"]), [2, 0, 2]),
        (NAMED, ([1, 0], ["pos", "neg", "unused"]), [0, 2]),
        (NAMED, (["pos", "neutral"],), [2, 1]),
        ((["pos", "neg", "pos"],), ([0, 1], ["pos", "neg"]), [1, 0]),
    ],
)
def test_classes_are_the_same_by_name(recipe, parquet, train, validation, numbers):
    task, splits = recipe.own_data.load_files(parquet(train, validation))
    assert task.labels == (("neg", "neutral", "pos") if train is NAMED else ("neg", "pos"))
    assert splits["train"]["label"] == ([0, 1, 2, 1] if train is NAMED else [1, 0, 1])
    assert splits["validation"]["label"] == numbers


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (NAMED, ([0, 1], ["pos", "good"]), r"has not: good; it has neg, neutral, pos$"),
        (NAMED, ([0, 1],), "has not: 0, 1; it has neg, neutral, pos. Labels .*: names of classes there, int64 here"),
        (([0, 1],), ([0, 1], ["0", "1"]), "has not: 0, 1; it has 0, 1. Labels .*: int64 there, names of classes here"),
        (([0.5, 1.5],), ([0, 1], ["neg", "pos"]), "floats, a regression, but .*validation.parquet holds names of"),
        (NAMED, ([0, -1, -1], ["neg", "pos"]), r"validation.parquet has rows without a label, 2 of 3.* is row 2,"),
        (([0, 0], ["neg", "pos"]), NAMED, "train.parquet has the label 'neg' only"),
    ],
)
def test_classes_that_do_not_fit_by_name(recipe, parquet, train, validation, message):
    with pytest.raises(ValueError, match=message):
        recipe.own_data.load_files(parquet(train, validation))


def test_a_class_beyond_the_names_is_refused(recipe, parquet):
    files = parquet(NAMED, ([0, 1], ["neg", "pos"]))
    table = pq.read_table(files.validation_file)
    pq.write_table(table.set_column(1, table.schema.field(1), pa.array([0, 7])), files.validation_file)
    with pytest.raises(ValueError, match="validation.parquet has the class 7, but names for 2 only"):
        recipe.own_data.load_files(files)


@pytest.mark.parametrize("cell", ["", " ", "NA", "nan", "NaN"])
@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [0.5, 1.5, 2.0, 0.5], [True, False, True, True]])
def test_rows_without_a_label_are_counted(recipe, files, labels, cell):
    whole = {"text": list("abcd"), "label": labels}
    broken = {"text": list("abcd"), "label": [labels[0], cell, cell, labels[3]]}
    for columns, name in (((broken, whole), "train"), ((whole, broken), "validation")):
        message = rf"{name}.csv has rows without a label, 2 of 4: leave them out; the first is row 2, .* with '{cell}'"
        with pytest.raises(ValueError, match=message):
            recipe.own_data.load_files(files(*columns))


@pytest.mark.parametrize(
    ("train", "validation", "names", "numbers"),
    [
        ((["NA", "US", "1"],), (["1", "NA"],), ("1", "NA", "US"), [0, 1]),
        ((["NA", "None", "NA"],), (["None", "NA"],), ("NA", "None"), [1, 0]),
        (([0, 1, 2], ["1", "NA", "0"]), (["0", "NA"],), ("1", "NA", "0"), [2, 1]),
    ],
)
def test_na_among_names_is_a_name(recipe, parquet, train, validation, names, numbers):
    task, splits = recipe.own_data.load_files(parquet(train, validation))
    assert (task.labels, splits["validation"]["label"]) == (names, numbers)


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_numbers_that_are_missing_are_rows_without_a_label(recipe, parquet, nothing):
    whole, broken = [0.5, 1.5, 2.5], [0.5, 1.5, nothing]
    for train, validation in ((broken, whole), (whole, broken)):
        with pytest.raises(ValueError, match=rf"1 of 3: leave them out; the first is row 3, .* with {nothing}$"):
            recipe.own_data.load_files(parquet((train,), (validation,)))
