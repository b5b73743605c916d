"""Peak memory of `limbeck export`, over the bytes of the float32 weights: a random Llama of 81M, each precision alone.

The peak is that of the whole command: Python and its libraries, the export, and the comparison with PyTorch. Libraries
take some 350 MB, so the ratio of a larger model is lower. `python -m tests.bench.export_memory MODEL` measures yours.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from limbeck.registry.core.terminal import print_table
from tests.bench.decode import make_llama

PRECISIONS = ("fp32", "int8-weight", "int4")
# The limit is the test's own: random weights have no quality to keep.
EXPORT = """
import resource, sys
from limbeck.cli import main
try:
    main(["export", *sys.argv[1:], "--max-change", "1", "--format", "json"])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""


def main(model: Path | None = None) -> None:
    """Measure and print a table."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if model is None:
            model = folder / "torch"
            make_llama(model)
        rows = []
        for precision in PRECISIONS:
            command = [sys.executable, "-c", EXPORT, model, "--precision", precision, "--output", folder / "onnx"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            peak = int(done.stderr.split()[-1])
            weights = sum(path.stat().st_size for path in (folder / "onnx/fp32").glob("model.onnx*"))
            rows.append((precision, f"{weights / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{peak / weights:.2f}"))
    print_table("peak memory of an export", ["precision", "float32 weights, MB", "peak, MB", "times"], rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
