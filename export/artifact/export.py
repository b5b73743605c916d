"""Convert a transformers checkpoint to an ONNX artifact: a graph with key-value cache, ready to run.

The families of limbeck.export.graph.families get a graph of fused operators, others the graph that optimum exports. In
the manifest, `graph` is "fused" or "optimum", and `graph_reason` is why a model got optimum's without asking for it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from limbeck.export.artifact.interop import write_interop_files
from limbeck.export.graph.families.table import FAMILIES, decoder_from_model
from limbeck.export.graph.reader import UnsupportedModel
from limbeck.export.graph.write import write_graph
from limbeck.export.optimum.engine import write_optimum_graph
from limbeck.export.optimum.model_types import MODEL_TYPES
from limbeck.export.quantize.precisions import parse_precisions, quantize
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.runtime.session import GRAPH
from limbeck.registry.catalog.model_ref import engine_of_folder
from limbeck.registry.checkpoints.load import load_config, load_model, load_tokenizer
from limbeck.registry.core.digest import folder_digest, read_manifest, write_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import atomic_write
from limbeck.registry.core.overlay import overlay_versions

Engine = Literal["fused", "optimum"]

# The files that a runtime reads. Others that transformers saves (vocab.json, merges.txt, ...) repeat their content.
RUNTIME_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
}


def export_onnx(
    model: Path,
    output_folder: Path,
    precision: str = "fp32",
    *,
    fp32_artifact: Path | None = None,
    settings: QuantizationSettings | None = None,
    engine: Engine | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write the ONNX artifact of the causal language model in `model` to `output_folder`. Returns its digest.

    The folder holds `model.onnx` (and `model.onnx_data` if the weights are large), the configuration, the tokenizer and
    `limbeck.json`. It is written completely or not at all. The same model gives the same bytes each time.

    Args:
        model: folder with config.json, safetensors and tokenizer files.
        precision: a key of limbeck.export.quantize.precisions.PRECISIONS.
        fp32_artifact: the fp32 artifact of the same model, to quantize without a new export; None makes one.
        settings: of the quantization.
        engine: makes the fp32 graph; None takes "fused" if the model has a fused graph, else "optimum".
        trust_remote_code: run the Python code in the folder, as in transformers.

    Raises:
        BadInput: the folder is not a causal language model, has only pickled weights, has no fast tokenizer, or cannot
            be exported by `engine`; or `fp32_artifact` was made by another one.
        DamagedArtifact: truncated weights.
    """
    parse_precisions([precision])
    model, output_folder = Path(model), Path(output_folder)
    if engine_of_folder(model) != "torch":
        raise BadInput(f"{model} is an ONNX artifact", fix="export the PyTorch model it came from")
    parent = folder_digest(model)
    with atomic_write(output_folder) as folder:
        folder.mkdir()
        fields: dict[str, Any] = {}
        with _silenced():
            if fp32_artifact is None:
                report = (settings or QuantizationSettings()).report
                graph = _export_fp32(model, folder, engine, trust_remote_code, report)
            else:
                graph = _copy_runtime_files(fp32_artifact, folder, model, parent, engine)
            if precision != "fp32":
                fields["quantization"] = quantize(fp32_artifact or folder, folder, precision, settings)
        return write_manifest(
            folder,
            kind="onnx",
            engine="onnxruntime",
            precision=precision,
            parent=parent,
            made_with=_package_versions(graph["graph"]),
            **graph,
            **fields,
            **write_interop_files(folder, graph["graph"]),
        )


def supported_model_types() -> list[str]:
    """List the `model_type`s that can be exported with a key-value cache, as a fused graph or by optimum."""
    return sorted({*FAMILIES, *MODEL_TYPES})


def _copy_runtime_files(
    fp32_artifact: Path, folder: Path, model: Path, parent: str, engine: Engine | None
) -> dict[str, str]:
    """Copy what a quantized variant shares with the fp32 artifact. Returns the fields of its graph in the manifest.

    Raises BadInput if the artifact is not of the model with the digest `parent`, or not made by `engine`.
    """
    manifest = read_manifest(fp32_artifact)
    if manifest.get("parent") != parent:
        raise BadInput(f"{fp32_artifact} is not an export of {model}", fix="leave it out: it will be made again")
    if engine not in (None, manifest["graph"]):
        raise BadInput(f"{fp32_artifact} has the graph of the engine {manifest['graph']}, not {engine}")
    for name in RUNTIME_FILES & {path.name for path in fp32_artifact.iterdir()}:
        shutil.copyfile(fp32_artifact / name, folder / name)
    return {key: manifest[key] for key in ("graph", "graph_reason") if key in manifest}


def _export_fp32(
    model: Path, folder: Path, engine: Engine | None, trust_remote_code: bool, report: Callable[[str], None]
) -> dict[str, str]:
    """Write the graph, the configuration and the tokenizer of `model`. Returns the graph's fields of the manifest."""
    torch_model, tokenizer = _load(model, trust_remote_code)
    torch_model.config.use_cache = True
    reason = None if engine == "optimum" else _write_fused(torch_model, folder)
    fields = {"graph": "optimum" if reason or engine == "optimum" else "fused"}
    if reason:
        fields["graph_reason"] = reason
    if fields["graph"] == "optimum":
        _require_optimum(model, torch_model.config.model_type, engine, reason)
        if reason:
            report(f"  optimum makes the graph, since there is no fused one: {reason}")
        write_optimum_graph(torch_model, folder, str(model), report)
    torch_model.config.save_pretrained(folder)
    torch_model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in RUNTIME_FILES and not path.name.startswith(GRAPH):
            path.unlink()
    return fields


def _load(model: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the model in float32 and in evaluation mode, and its tokenizer. Raises BadInput."""
    config = load_config(model, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    # Of a model with vision, such as Qwen3.5, transformers loads the text part if the family allows it.
    if {config.model_type, config.get_text_config().model_type}.isdisjoint(supported_model_types()):
        raise BadInput(
            f"{model}: the architecture {config.model_type!r} cannot be exported",
            fix=f"supported: {', '.join(supported_model_types())}",
        )
    if not tokenizer.is_fast:
        raise BadInput(f"{model}: its tokenizer has no tokenizer.json and cannot be converted to one")
    # Eager attention, since torch's fused attention ignores what it does not support, such as Gemma 2's soft cap.
    return load_model(model, trust_remote_code, config=config, attn_implementation="eager"), tokenizer


def _write_fused(torch_model: Any, folder: Path) -> str | None:
    """Write the fused graph. Returns None, or the reason if the model has no fused graph.

    Lowers the `max_position_embeddings` of the model's configuration if the graph is right for shorter texts only.
    """
    try:
        decoder = decoder_from_model(torch_model)
    except UnsupportedModel as error:
        return str(error)
    write_graph(decoder, folder / GRAPH)
    if decoder.max_positions:
        torch_model.config.max_position_embeddings = decoder.max_positions
    return None


def _require_optimum(model: Path, model_type: str, engine: Engine | None, reason: str | None) -> None:
    """Raise BadInput unless optimum may make the graph; `reason` is why there is no fused one, None if nobody tried."""
    known = model_type in MODEL_TYPES
    if reason and not known:
        raise BadInput(f"{model} has no fused graph: {reason}", fix=f"optimum does not know {model_type!r} either")
    if reason and engine == "fused":
        raise BadInput(f"{model} has no fused graph: {reason}", fix="use --engine optimum, or leave --engine out")
    if not known:
        raise BadInput(f"{model}: optimum does not know {model_type!r}", fix="leave --engine out, to get a fused graph")


def _package_versions(graph_kind: str) -> dict[str, str]:
    """Return the versions of the packages that made an artifact."""
    versions = {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "torch", "transformers")}
    if graph_kind == "optimum":
        versions |= {name: overlay_versions()[name] for name in ("optimum", "optimum-onnx")}
    return versions


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress tracer warnings, log lines and prints: errors are raised, and parity measures the result."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
