"""Second moments of the inputs of products, from text that the float32 graph runs over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import GRAPH, positions_from_mask
from limbeck.registry.core.errors import BadInput

CALIBRATION_TOKENS = 4096  # at most, from all texts together
ROW_TOKENS = 256  # at most, from one text
MOMENTS_BYTES = 2**27  # moments held at a time; the graph runs over the text once for each part of its products


def input_moments(
    artifact: Path, scratch: Path, widths: Mapping[str, int], texts: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor of `widths` with the (K, K) float32 mean of the products of two of its features over the text.

    Args:
        artifact: folder with the float32 graph, its configuration and tokenizer.
        scratch: an empty folder on the same disk, which gets a copy of the graph.
        widths: name of a tensor of shape (..., K) in the graph -> K.
        texts: text to run over, from the last to the first; only beginnings are used.

    Raises BadInput if every text is empty.
    """
    for names in _parts(widths):
        with TemporaryDirectory(dir=scratch) as folder:
            runtime = _with_outputs(artifact, Path(folder), names)
            sums = {name: np.zeros((widths[name],) * 2, np.float32) for name in names}
            tokens = 0
            for row in _rows(runtime, texts):
                tokens += len(row)
                for name, values in zip(names, _run(runtime, row, names), strict=True):
                    values = values.reshape(-1, widths[name])
                    sums[name] += values.T @ values
            if not tokens:
                raise BadInput("no text to calibrate with: every document is empty")
            del runtime
        for name in names:
            yield name, sums.pop(name) / tokens


def _parts(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Split the tensors, in their order, into parts whose moments fit in MOMENTS_BYTES."""
    part: list[str] = []
    size = 0
    for name, width in widths.items():
        size += 4 * width * width
        if part and size > MOMENTS_BYTES:
            yield part
            part, size = [], 4 * width * width
        part.append(name)
    if part:
        yield part


def _with_outputs(artifact: Path, folder: Path, names: Sequence[str]) -> Runtime:
    """Load the graph of `artifact` with more outputs, from `folder`."""
    import onnx

    for path in artifact.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, folder / path.name)
        elif path.name.startswith(GRAPH) and path.name != GRAPH:
            try:
                os.link(path, folder / path.name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(path, folder / path.name)
    model = onnx.load(artifact / GRAPH, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    onnx.save_model(model, folder / GRAPH)
    return Runtime.load(folder, verify=False)


def _rows(runtime: Runtime, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of the beginnings of the texts, the last text first: a search for formats reads the first ones."""
    tokens, length = 0, min(ROW_TOKENS, runtime.max_length)
    for text in reversed(texts):
        row = runtime.encode(text[: 16 * length])[:length]
        if row and tokens < CALIBRATION_TOKENS:
            tokens += len(row)
            yield row


def _run(runtime: Runtime, row: list[int], names: Sequence[str]) -> list[np.ndarray]:
    ids = np.array([row], np.int64)
    mask = np.ones_like(ids)
    arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_from_mask(mask)}
    feeds = {name: arrays[name] for name in runtime.input_names}
    feeds |= {name: value.numpy() for name, value in zip(runtime.past_inputs, runtime.empty_cache(1), strict=True)}
    found: list[np.ndarray] = runtime.onnx_session.run(list(names), feeds)
    return found
