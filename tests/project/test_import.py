"""`import hf_efcp` is light, and every public name is there."""

import subprocess
import sys

import hf_efcp


def test_public_names_exist():
    for name in hf_efcp.__all__:
        assert getattr(hf_efcp, name) is not None
    assert set(hf_efcp.__all__) <= set(dir(hf_efcp))
    assert not hasattr(hf_efcp, "nonsense")


def test_import_loads_neither_transformers_nor_numba():
    code = """
import sys, torch, torch.optim.optimizer
before = set(sys.modules)
import hf_efcp
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "['hf_efcp']"
