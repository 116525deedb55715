"""The notebooks as they are committed: whole, run from top to bottom, and nothing of the machine in them."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
FIGURES = {
    "01_quickstart": 1,
    "02_inside_efcp": 4,
    "03_memory_and_speed": 2,
    "04_own_training_loop": 1,
    "05_learning_rates": 1,
}
MACHINE = re.compile(r"(?<![\w.])/(tmp|root|home|work|Users|opt|var|mnt)/")
MIME_TEXT = ("text/plain", "text/html", "text/markdown")


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(name):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def outputs(name):
    return [output for cell in code_cells(name) for output in cell["outputs"]]


def text_of(output):
    parts = [output.get("text", ""), *(output.get("data", {}).get(mime, "") for mime in MIME_TEXT)]
    return "".join("".join(part) for part in parts)


def test_all_are_there_and_the_readme_leads_to_them():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(FIGURES)
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert "[notebooks](notebooks)" in readme
    # And one notebook to the others.
    said = "".join("".join(cell["source"]) for cell in read("01_quickstart")["cells"])
    assert all(f"`{name}.ipynb`" in said for name in FIGURES if name != "01_quickstart")


@pytest.mark.parametrize("name", FIGURES)
def test_every_cell_was_run_in_order_without_an_error_or_a_warning(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(name) if output["output_type"] == "error"]
    assert not [output for output in outputs(name) if output.get("name") == "stderr"]


@pytest.mark.parametrize(("name", "figures"), FIGURES.items())
def test_figures_are_kept(name, figures):
    drawn = [output["data"]["image/png"] for output in outputs(name) if "image/png" in output.get("data", {})]
    assert len(drawn) == figures
    assert all(len(png) > 10_000 for png in drawn)


@pytest.mark.parametrize("name", FIGURES)
def test_code_parses_and_asserts_what_the_text_says(name):
    nodes = [node for cell in code_cells(name) for node in ast.walk(ast.parse("".join(cell["source"])))]
    assert sum(isinstance(node, ast.Assert) for node in nodes) >= 3


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_of_the_machine_is_left(name):
    notebook = read(name)
    texts = ["".join(cell["source"]) for cell in notebook["cells"]] + [text_of(output) for output in outputs(name)]
    assert not [found.group() for text in texts for found in MACHINE.finditer(text)]
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell["metadata"] for cell in notebook["cells"])


def test_paths_of_machines_are_seen():
    assert all(map(MACHINE.search, ["in /home/me/x", "'/tmp/a'", "~ at /work/"]))
    assert not any(map(MACHINE.search, ["../outputs/tmp/x", "and/or/var/x"]))
