"""Importing this puts `recipes/` on the path: the programs here share its modules, and are started from anywhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
