"""Convert a transformers checkpoint to an ONNX artifact: a graph with key-value cache, ready to run.

The families of limbeck.export.graph.families get a graph of fused operators, others the graph that optimum exports. In
the manifest, `graph` is "fused" or "optimum".
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.export.artifact.interop import write_interop_files
from limbeck.export.graph.decoder import write_graph
from limbeck.export.graph.families import FAMILIES, decoder_from_model
from limbeck.export.graph.reader import UnsupportedModel
from limbeck.export.quantize.precisions import parse_precisions, quantize
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.runtime.session import GRAPH
from limbeck.registry.catalog.model_ref import engine_of_folder
from limbeck.registry.checkpoints.load import load_config, load_model, load_tokenizer
from limbeck.registry.core.digest import folder_digest, read_manifest, write_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import atomic_write

TASK = "text-generation-with-past"
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
    fused: bool = True,
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
        fused: False takes optimum's graph even if the fused one can be written, to compare the two.
        trust_remote_code: run the Python code in the folder, as in transformers.

    Raises:
        BadInput: the folder is not a causal language model, has only pickled weights, has no fast tokenizer, or has an
            architecture that neither the fused writer nor optimum exports.
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
                graph_kind = _export_fp32(model, folder, fused, trust_remote_code)
            else:
                graph_kind = _copy_runtime_files(fp32_artifact, folder, model, parent)
            if precision != "fp32":
                fields["quantization"] = quantize(fp32_artifact or folder, folder, precision, settings)
        return write_manifest(
            folder,
            kind="onnx",
            engine="onnxruntime",
            precision=precision,
            graph=graph_kind,
            parent=parent,
            made_with=_package_versions(),
            **fields,
            **write_interop_files(folder, graph_kind),
        )


def supported_model_types() -> list[str]:
    """List the `model_type`s that can be exported with a key-value cache, as a fused graph or by optimum."""
    return sorted({*FAMILIES, *_optimum_model_types()})


def _optimum_model_types() -> list[str]:
    return []


def _copy_runtime_files(fp32_artifact: Path, folder: Path, model: Path, parent: str) -> str:
    """Copy what a quantized variant shares with the fp32 artifact. Returns the kind of its graph.

    Raises BadInput if the artifact is not of the model with the digest `parent`.
    """
    manifest = read_manifest(fp32_artifact)
    if manifest.get("parent") != parent:
        raise BadInput(f"{fp32_artifact} is not an export of {model}", fix="leave it out: it will be made again")
    for name in RUNTIME_FILES & {path.name for path in fp32_artifact.iterdir()}:
        shutil.copyfile(fp32_artifact / name, folder / name)
    return str(manifest["graph"])


def _export_fp32(model: Path, folder: Path, fused: bool, trust_remote_code: bool) -> str:
    """Write the graph, the configuration and the tokenizer of `model` to `folder`. Returns the kind of the graph."""
    torch_model, tokenizer = _load(model, trust_remote_code)
    torch_model.config.use_cache = True
    graph_kind = "fused" if fused and _write_fused(torch_model, folder) else "optimum"
    if graph_kind == "optimum":
        _write_optimum(model, torch_model, folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in RUNTIME_FILES and not path.name.startswith(GRAPH):
            path.unlink()
    return graph_kind


def _load(model: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the model in float32 and in evaluation mode, and its tokenizer. Raises BadInput."""
    config = load_config(model, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    if config.model_type not in supported_model_types():
        raise _unsupported(model, config.model_type)
    if not tokenizer.is_fast:
        raise BadInput(f"{model}: its tokenizer has no tokenizer.json and cannot be converted to one")
    return load_model(model, trust_remote_code, config=config), tokenizer


def _write_fused(torch_model: Any, folder: Path) -> bool:
    """Write the fused graph and the configuration files. Returns False if the model has no fused graph."""
    try:
        decoder = decoder_from_model(torch_model)
    except UnsupportedModel:
        return False
    write_graph(decoder, folder / GRAPH)
    torch_model.config.save_pretrained(folder)
    torch_model.generation_config.save_pretrained(folder)
    return True


def _write_optimum(model: Path, torch_model: Any, folder: Path) -> None:
    """Write optimum's graph, without optimum's validation: limbeck.export.artifact.parity checks more, on real text."""
    from optimum.exporters.onnx.convert import onnx_export_from_model

    if torch_model.config.model_type not in _optimum_model_types():
        raise _unsupported(model, torch_model.config.model_type)
    try:
        onnx_export_from_model(model=torch_model, output=folder, task=TASK, do_validation=False, device="cpu")
    except Exception as error:  # the model's own code may raise anything while it is traced
        raise BadInput(
            f"{model}: optimum cannot export this {torch_model.config.model_type} model: {_first_line(error)}",
            fix="another model of the family may work; `pip install -U optimum-onnx` may support this one",
        ) from error


def _unsupported(model: Path, model_type: str) -> BadInput:
    return BadInput(
        f"{model}: the architecture {model_type!r} cannot be exported",
        fix=f"supported: {', '.join(supported_model_types())}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _package_versions() -> dict[str, str]:
    packages = ("onnx", "onnxruntime", "torch", "transformers")
    return {package: importlib.metadata.version(package) for package in packages}


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
