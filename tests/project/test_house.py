"""The house: no file that takes a day to read, and no two modules that need each other to be imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "hf_efcp").rglob("*.py"))


def length(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short():
    assert not [f"{path}: {length(path)}" for path in PACKAGE if length(path) > 400]
    assert not [f"{path}: {length(path)}" for path in (ROOT / "tests").rglob("*.py") if length(path) > 300]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE}


def needed(name, path):
    """The modules of the package that are imported before the first line below the imports of a module can run."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not those in functions, nor for types alone
        if isinstance(node, ast.ImportFrom) and node.level:
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            base = f"{above}.{node.module}" if node.module else above
            for alias in node.names:
                found = f"{base}.{alias.name}"
                yield found if found in MODULES else base


def test_no_two_modules_need_each_other():
    graph = {name: {other for other in needed(name, path) if other != name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 200
    done, path = set(), []

    def visit(name):
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)
