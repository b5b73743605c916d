"""The hidden states before the last projection: fused graphs name that tensor, but do not return it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from limbeck.registry.core.errors import BadInput

HIDDEN_STATES = "last_hidden_state"  # (B, T, H): the tensor's name in a fused graph (limbeck.export.graph.write)


def graph_with_hidden_states(path: Path, options: ort.SessionOptions) -> bytes:
    """The graph in `path` with the hidden states as its last output; sets where `options` look for its weights.

    Raises BadInput if the graph does not name them.
    """
    graph = path.read_bytes()
    if HIDDEN_STATES.encode() not in graph:
        raise BadInput(
            f"the graph in {path.parent} has no tensor {HIDDEN_STATES}, so it gives no embeddings",
            fix="export the model again, with --engine fused",
        )
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    # Protocol buffers that are concatenated are merged: this adds ModelProto.graph.output[-1].name.
    name = _field(1, HIDDEN_STATES.encode())
    return graph + _field(7, _field(12, name))


def _field(number: int, value: bytes) -> bytes:
    """A field of a protocol buffer; `value` has less than 128 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value
