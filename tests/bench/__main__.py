"""Run the benchmarks of this folder, or those that are named: `python -m tests.bench decode`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent

for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("[!_]*.py")):
    import_module(f"tests.bench.{name}").main()
