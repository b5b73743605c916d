"""Helpers of the export tests: artifacts with another graph or a damaged one, and servers on a host without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from limbeck.export.artifact.variants import Variant
from limbeck.export.graph.save import save_graph
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import extra_manifest_fields, read_manifest, write_manifest

if TYPE_CHECKING:
    import onnx


class Exported(NamedTuple):
    """A torch model and its ONNX variants."""

    torch: Path
    fp32: Path
    int8: Path
    variants: list[Variant]


def rewrite_manifest(folder: Path) -> None:
    """Update the file digests in the manifest."""
    write_manifest(folder, **extra_manifest_fields(read_manifest(folder)))


def corrupt_one_weight(folder: Path) -> None:
    """Change one weight of the graph in `folder`, and update the manifest."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx")
    products = {name for node in graph.graph.node if node.op_type == "MatMul" for name in node.input}
    weight = next(item for item in graph.graph.initializer if item.name in products and len(item.dims) == 2)
    values = numpy_helper.to_array(weight).copy()
    values[3, 5] += 1.0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save_model(graph, folder / "model.onnx")
    rewrite_manifest(folder)


def copy_with_graph(artifact: Path, model: onnx.ModelProto, output_folder: Path) -> Path:
    """Copy an artifact, with another graph."""
    shutil.copytree(artifact, output_folder)
    save_graph(model, output_folder / "model.onnx")
    rewrite_manifest(output_folder)
    return output_folder


def logits_of(artifact: Path) -> np.ndarray:
    """(1, 40, V) logits of one text."""
    ids = np.arange(5, 45)[None]
    return Runtime.load(artifact, verify=False, threads=1).logits(ids, np.ones_like(ids))


# A serving host has none of these packages: importing one fails.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "optimum", "onnx", "mlflow", "datasets", "scipy"}:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocker())
from limbeck.cli import main
main(sys.argv[1:])
"""


def limbeck_without_torch(*args: object) -> list[str]:
    """A command line that runs `limbeck` without torch and the other packages in BLOCKED."""
    return [sys.executable, "-c", BLOCKED, *map(str, args)]


class Served(NamedTuple):
    """A running `limbeck serve`."""

    process: subprocess.Popen[str]
    url: str  # ends with /v1


@contextmanager
def serving(model: Path | str, api_key: str = "", *options: object) -> Iterator[Served]:
    """Run `limbeck serve MODEL` in a separate process, without torch, on a free port."""
    environment = os.environ | {"LIMBECK_API_KEY": api_key}
    command = limbeck_without_torch("serve", model, "--port", 0, "--threads", 1, *options)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert " at http" in first, first + process.stderr.read()
        yield Served(process, first.split(" at ")[1].strip())
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
