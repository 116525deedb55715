"""What .ci/run checks, one session each, in the environment that nox is started from: `nox`, or `nox -s lint types`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"  # an environment for each session would hold torch five times
nox.options.stop_on_first_error = True


def _module(session: nox.Session, *words: str, **variables: str) -> None:
    session.run(sys.executable, "-m", *words, env=variables)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, docstrings and format."""
    _module(session, "ruff", "check", ".")
    _module(session, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    _module(session, "mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site; a link or a reference that leads nowhere is an error."""
    _module(session, "mkdocs", "build", "--strict", NO_MKDOCS_2_WARNING="1")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests; `nox -s tests -- -m slow` those that take minutes."""
    _module(session, "pytest", *session.posargs)


@nox.session
def notebooks(session: nox.Session) -> None:
    """The notebooks, from top to bottom."""
    _module(session, "pytest", "--nbmake", "--nbmake-timeout=300", "notebooks")


# All that needs no recipes: those are written for transformers 5.
LIBRARY = (
    *("math", "state", "trainer", "distributed", "projected", "gpu"),
    *("project/test_import.py", "project/test_examples.py"),
)


@nox.session(venv_backend="venv", default=False)
def oldest(session: nox.Session) -> None:
    """The library's tests with the oldest versions that pyproject.toml admits; `-- tests/math` those of a folder."""
    session.install("-c", "constraints-oldest.txt", "-e", ".", "hypothesis", "peft", "pytest")
    session.run("pytest", *(session.posargs or (f"tests/{place}" for place in LIBRARY)))


@nox.session(venv_backend="venv", default=False)
def newest(session: nox.Session) -> None:
    """All tests with the newest versions that there are; `-- tests/math` those of a folder."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Source distribution and wheel, in dist/, and whether the package index would take them."""
    shutil.rmtree("dist", ignore_errors=True)
    _module(session, "build")
    _module(session, "twine", "check", "--strict", *map(str, Path("dist").iterdir()))
