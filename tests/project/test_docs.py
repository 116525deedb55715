"""README.md and the pages under docs/: their Python runs, their commands parse, and the site has what they refer to."""

import argparse
import importlib
import json
import re
import shlex
import socket
import tomllib
from pathlib import Path

import pytest
import torch
from test_configs import SCRIPTS
from tiny import tiny_bert, toy_rows

from hf_efcp import OPTIMIZERS, cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<note>[a-z: ]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


# They have names for what others have made.
INITS = {
    "__init__.py",
    "compressors/__init__.py",
    "preconditioners/__init__.py",
    "trainer/__init__.py",
    "variants/__init__.py",
}
# Its blocks take models and data of many kinds: tests/trainer/test_any_trainer.py runs them.
ELSEWHERE = {"docs/trainers.md"}


def blocks(path, language):
    """The code blocks of a page in a language: the line they start at, the comment above them, their text."""
    text = path.read_text(encoding="utf-8")
    return [
        (text[: found.start("code")].count("\n") + 1, found["note"], found["code"])
        for found in FENCE.finditer(text)
        if found["language"] == language
    ]


def pages_with(language):
    return [str(path.relative_to(ROOT)) for path in PAGES if blocks(path, language)]


# Python


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """A folder and a process group of one's own; what a page registers is forgotten."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    monkeypatch.chdir(tmp_path)
    registered = dict(OPTIMIZERS)
    yield {name: str(value) for name, value in variables.items()}
    OPTIMIZERS.clear()
    OPTIMIZERS.update(registered)


@pytest.mark.parametrize("page", sorted(set(pages_with("python")) - ELSEWHERE))
def test_python_runs(page, surroundings, monkeypatch):
    """Each block alone, with a `model` and a `dataset`; under `<!-- continues -->` with the names of the one above."""
    names = {}
    for line, note, code in blocks(ROOT / page, "python"):
        if note != "continues":
            torch.manual_seed(0)
            names = {"__name__": "__page__", "model": tiny_bert(), "dataset": toy_rows(16)}
        with monkeypatch.context() as patched:
            if "init_process_group" in code:  # Trainer would take the variables for torchrun's
                for name, value in surroundings.items():
                    patched.setenv(name, value)
            exec(compile("\n" * line + code, ROOT / page, "exec"), names)  # errors show the page's own line


# Commands


class ParsedError(Exception):
    """A command line was read; nothing was done."""


@pytest.fixture
def read_only(monkeypatch, recipe):
    """The scripts of recipes/ as modules whose `main` ends where the command line is read."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise ParsedError

    def main(script, argv):
        monkeypatch.setattr("sys.argv", [script, *argv])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(ParsedError):
            importlib.import_module(script).main()

    return main


def commands(code):
    """The commands of a block, without comments, as lists of words; programs of `.venv` by their bare names."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield [words[0].removeprefix(".venv/bin/"), *words[1:end]]
            words = words[end + 1 :]


def extras():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def sessions():
    return set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE))


def check_script(place, argv, read_only):
    """That a recipe exists and takes the arguments, and the YAML that they name."""
    assert (ROOT / place).is_file()
    script = Path(place).stem
    if script in SCRIPTS:
        config, *flags = argv
        assert SCRIPTS[script](ROOT / config, *flags)
    else:
        read_only(script, argv)


def check_hf_efcp(command, argv, read_only):
    """That a command takes its arguments, and the configuration that they name."""
    script = cli.program(command, argv)
    if script == "memory_plan":
        read_only(script, argv)
    else:
        named = importlib.import_module("cli").find_config(argv[0]) if argv[0][0] != "-" else None
        assert SCRIPTS[script](*([named, *argv[1:]] if named else argv))


def check_install(argv):
    asked = [word for word in argv if word.startswith(".")]
    assert argv == ["-c", "constraints.txt", "-e", *asked]
    assert (ROOT / "constraints.txt").is_file()
    wanted = re.findall(r"\w+", asked[0])
    assert set(wanted) <= set(extras())


def check_pytest(argv):
    places = [word for before, word in zip(["", *argv], argv, strict=False) if before != "-m" and word[0] != "-"]
    assert all((ROOT / place).exists() for place in places)


def check_command(words, read_only):
    match words:
        case ["python3", "-m", "venv", ".venv"]:
            pass
        case ["pip", "install", *argv]:
            check_install(argv)
        case ["python", "-m", "pytest", *argv]:
            check_pytest(argv)
        case ["hf-efcp", command, *argv] | ["torchrun", "--nproc_per_node", "2", "-m", "hf_efcp", command, *argv]:
            check_hf_efcp(command, argv, read_only)
        case ["python", place, *argv] | ["torchrun", "--nproc_per_node", "2", place, *argv]:
            check_script(place, argv, read_only)
        case ["nox", *argv]:
            assert set(argv) - {"-s"} <= sessions()
        case [program] if "/" in program:
            assert (ROOT / program).is_file()
        case [program, *_]:
            assert any(re.match(rf"{program}\b", requirement) for extra in extras().values() for requirement in extra)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_parse(page, read_only):
    for _, _, code in blocks(ROOT / page, "bash"):
        for words in commands(code):
            check_command(words, read_only)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python recipes/run_glue.py recipes/configs/missing.yaml", (OSError, SystemExit, ValueError)),
        ("python recipes/missing.py", AssertionError),
        ("python recipes/benchmarks/soak.py --no_such_flag 1", SystemExit),
        ("python -m pytest no_such_folder", AssertionError),
        ('pip install -c constraints.txt -e ".[nothing]"', AssertionError),
        ("nox -s nothing", AssertionError),
        ("hf-efcp train missing", OSError),
        ("hf-efcp train quickstart --no_such_flag 1", SystemExit),
        ("hf-efcp plan bert --memory_limit 1", SystemExit),
        ("hf-efcp trian quickstart", ValueError),
        ("no-such-tool run", AssertionError),
    ],
)
def test_wrong_commands_are_found(command, error, read_only):
    (words,) = commands(command)
    with pytest.raises(error):
        check_command(words, read_only)


def test_commands_are_cut_and_joined():
    code = 'a "b && c" \\\n  d && .venv/bin/e f  # g\n# h\ni\n'
    assert list(commands(code)) == [["a", "b && c", "d"], ["e", "f"], ["i"]]


def test_every_block_has_a_language_that_is_checked():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
        assert set(fences[::2]) <= {"python", "bash", "yaml"}, path
        assert len(fences) == 2 * sum(len(blocks(path, language)) for language in ("python", "bash", "yaml"))


def test_the_tree_has_every_file():
    """Of the package and the recipes, by the name that CONTRIBUTING.md calls it."""
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = [path.relative_to(ROOT / "hf_efcp") for path in (ROOT / "hf_efcp").rglob("*.py")]
    recipes = [
        Path(path.name) for path in (*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes/benchmarks").glob("*.py"))
    ]
    named = [str(path) for path in (*package, *recipes) if not path.name.startswith("bench_")]
    assert not [name for name in named if f"`{name}`" not in tree and name not in INITS]
    found = re.findall(r"`([\w/]+\.py)`", tree)
    assert not [
        name
        for name in found
        if not any((ROOT / folder / name).exists() for folder in ("", "hf_efcp", "recipes", "recipes/benchmarks"))
    ]


# Tables


def run(seed, rate, accuracy, loss, optim_args=None, **options):
    group = OPTIMIZERS["lowrank_mfac"]([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    settings = {name: group[name] for name in ("num_grads", "rank", "metric", "metric_dtype", "trust_lr")}
    return {
        "key": {"options": {**settings, **options}},
        "task": "sst2",
        "headline": "accuracy",
        "metrics": {"accuracy": accuracy, "loss": loss},
        "optimizer": "lowrank_mfac",
        "optim_args": optim_args,
        "learning_rate": rate,
        "seed": seed,
        "optimizer_memory": {"total": 26},
        "parameters": 10,
    }


def test_tables_are_means_over_seeds_by_what_an_optimizer_is_today(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    runs = [
        run(1, 1e-4, 0.8, 0.5),
        run(2, 1e-4, 0.9, 0.3, optim_args="num_grads=16"),  # the same in other words
        run(1, 8e-4, 0.5, None),
        run(1, 1e-4, 0.7, 0.4, optim_args="rank=8", rank=8),
        run(1, 1e-4, 0.6, 0.4, rank=2),  # what was a default then
        {**run(2, 8e-4, 0.6, 0.4, rank=2), "selection_loss": 0.3},
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, runs)), encoding="utf-8")
    table = importlib.import_module("hooks").runs_table(tmp_path / "runs.jsonl")
    assert table.splitlines() == [
        "`sst2`",
        "",
        "| optimizer | bytes per parameter | 0.0001 | 0.0008 | seeds |",
        "| --- | --- | --- | --- | --- |",
        "| `lowrank_mfac` | 2.6 | 0.850 (0.400) | 1 of 1 diverged | 1, 2 |",
        "| `lowrank_mfac`, `rank=8` | 2.6 | 0.700 (0.400) |  | 1 |",
        "| `lowrank_mfac`, `rank=2` | 2.6 | 0.600 (0.400) | 0.600 (0.300) | 1, 2 |",
    ]
