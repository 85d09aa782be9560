"""Tests of the core borrow the tiny vision-language models of `tests/models`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models"))
