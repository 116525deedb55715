"""The examples in the docstrings of all public names: each has one, and it says the truth."""

import doctest

import pytest
from tiny import needs_transformers_5

import hf_efcp

NAMES = [name for name in hf_efcp.__all__ if callable(getattr(hf_efcp, name))]
OF_NEWER = {"for_trainer": needs_transformers_5}


@pytest.mark.parametrize("name", [pytest.param(name, marks=OF_NEWER.get(name, ())) for name in NAMES])
def test_an_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(getattr(hf_efcp, name), name, globs={})
    assert [test for test in found if test.examples], f"{name} has no Examples in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        said = []
        assert runner.run(test, out=said.append).failed == 0, "".join(said)


def test_only_a_table_has_no_example():
    assert set(hf_efcp.__all__) - set(NAMES) == {"OPTIMIZERS"}
