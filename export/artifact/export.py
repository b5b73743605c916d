"""A transformers checkpoint as an ONNX artifact: a graph with key-value cache, ready to run.

The families of export.graph.families get a graph with fused operators, others the graph that optimum exports. The
manifest says which: `graph` is "fused" or "optimum".
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.export.artifact import interop
from limbeck.export.graph.decoder import write_graph
from limbeck.export.graph.families import FAMILIES, UnsupportedModel, decoder_from_model
from limbeck.export.quantize.quantize import quantize
from limbeck.registry.catalog.model_ref import engine_of_folder
from limbeck.registry.core.digest import folder_digest, read_manifest, write_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import atomic_write

if TYPE_CHECKING:
    from limbeck.export.quantize.quantize import QuantizationSettings

PRECISIONS = ("fp32", "fp16", "int8", "int8-static", "int8-weight", "int4")
TASK = "text-generation-with-past"
GRAPH = "model.onnx"
# All a runtime reads. What else the exporter saves (vocab.json, merges.txt, ...) says the same a second time.
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

    The folder holds `model.onnx` (with `model.onnx_data` where the weights are large), the configuration, the
    tokenizer and `limbeck.json`; it is written whole or not at all. The same model gives the same bytes each time.

    Args:
        model: folder with config.json, safetensors and tokenizer files.
        precision: one of PRECISIONS.
        fp32_artifact: the fp32 artifact of the same model where there is one; a quantised one is made from it.
        settings: of the quantization.
        fused: False takes optimum's graph even where the fused one can be written, to compare the two.
        trust_remote_code: run the Python code in the folder, as in transformers.

    Raises:
        BadInput: a folder that is no causal language model, has pickled weights only, has no fast tokenizer,
            or is of an architecture that can be exported in neither way. DamagedArtifact: truncated weights.
    """
    parse_precisions([precision])
    model, output_folder = Path(model), Path(output_folder)
    if engine_of_folder(model) != "torch":
        raise BadInput(f"{model} is an ONNX artifact", fix="export the PyTorch model it came from")
    parent = folder_digest(model)
    with atomic_write(output_folder) as folder:
        folder.mkdir()
        if fp32_artifact is not None:
            if read_manifest(fp32_artifact).get("parent") != parent:
                raise BadInput(f"{fp32_artifact} is no export of {model}", fix="leave it away: it will be made again")
            for name in RUNTIME_FILES & {path.name for path in fp32_artifact.iterdir()}:
                shutil.copyfile(fp32_artifact / name, folder / name)
            graph, kind = fp32_artifact / GRAPH, str(read_manifest(fp32_artifact).get("graph", "optimum"))
        else:
            with _quiet():
                kind = _export_fp32(model, folder, fused, trust_remote_code)
            graph = folder / GRAPH
        made = {}
        if precision != "fp32":
            with _quiet():
                made = {"quantization": quantize(graph.parent, folder, precision, settings)}
        return write_manifest(
            folder,
            kind="onnx",
            engine="onnxruntime",
            precision=precision,
            graph=kind,
            parent=parent,
            made_with=_versions(),
            **made,
            **interop.write_interop_files(folder, kind),
        )


def parse_precisions(precisions: Sequence[str]) -> list[str]:
    """The names without blanks around them. Raises BadInput for one that is none."""
    names = [precision.strip() for precision in precisions]
    for name in names:
        if name not in PRECISIONS:
            raise BadInput(f"precision {name!r} is unknown", fix=f"use one of: {', '.join(PRECISIONS)}")
    return names


def supported_model_types() -> list[str]:
    """The `model_type`s that can be exported with a key-value cache, by optimum or as a fused graph."""
    return sorted({*FAMILIES, *_optimum_model_types()})


def _optimum_model_types() -> list[str]:
    import optimum.exporters.onnx.model_configs  # noqa: F401  (fills the table)
    from optimum.exporters.tasks import TasksManager

    return list(TasksManager.get_supported_model_type_for_task(TASK, "onnx"))


def _export_fp32(model: Path, folder: Path, fused: bool, trust_remote_code: bool) -> str:
    """Write the graph, the configuration and the tokenizer of `model` to `folder`. Returns which graph it is."""
    torch_model, tokenizer = _load(model, trust_remote_code)
    torch_model.config.use_cache = True
    kind = "fused" if fused and _write_fused(torch_model, folder) else "optimum"
    if kind == "optimum":
        _write_optimum(model, torch_model, folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in RUNTIME_FILES and not path.name.startswith(GRAPH):
            path.unlink()
    return kind


def _load(model: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """The float32 model in `model`, ready to evaluate, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model, **trust)
        tokenizer = AutoTokenizer.from_pretrained(model, **trust)
    except Exception as error:  # transformers raises whatever it trips over, AttributeError for no tokenizer
        raise BadInput(
            f"{model}: its configuration or tokenizer cannot be read: {_first_line(error)}",
            fix="the folder needs config.json and the tokenizer's files, as save_pretrained writes them",
        ) from error
    if config.model_type not in supported_model_types():
        raise _unsupported(model, config.model_type)
    if not tokenizer.is_fast:
        raise BadInput(f"{model}: its tokenizer has no tokenizer.json and none can be made from it")
    try:
        torch_model = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=torch.float32, use_safetensors=True, **trust
        )
    except Exception as error:  # safetensors raises a type of its own, not one of a family
        raise BadInput(f"{model} cannot be loaded: {_first_line(error)}") from error
    return torch_model.eval(), tokenizer


def _write_fused(torch_model: Any, folder: Path) -> bool:
    """Write the fused graph and what else optimum would write; False where the model has no such graph."""
    try:
        decoder = decoder_from_model(torch_model)
    except UnsupportedModel:
        return False
    write_graph(decoder, folder / GRAPH)
    torch_model.config.save_pretrained(folder)
    torch_model.generation_config.save_pretrained(folder)
    return True


def _write_optimum(model: Path, torch_model: Any, folder: Path) -> None:
    """Write optimum's export. Without optimum's own validation: export.artifact.parity compares more, on real text."""
    from optimum.exporters.onnx.convert import onnx_export_from_model

    if torch_model.config.model_type not in _optimum_model_types():
        raise _unsupported(model, torch_model.config.model_type)
    try:
        onnx_export_from_model(model=torch_model, output=folder, task=TASK, do_validation=False, device="cpu")
    except Exception as error:  # whatever the model's own code raises while it is traced
        raise BadInput(
            f"{model}: optimum cannot export this {torch_model.config.model_type} model: {_first_line(error)}",
            fix="other members of the family may be exported; `pip install -U optimum-onnx` may know this one",
        ) from error


def _unsupported(model: Path, model_type: str) -> BadInput:
    return BadInput(
        f"{model}: the architecture {model_type!r} cannot be exported",
        fix=f"supported: {', '.join(supported_model_types())}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _versions() -> dict[str, str]:
    packages = ("optimum-onnx", "onnx", "onnxruntime", "torch", "transformers")
    return {package: importlib.metadata.version(package) for package in packages}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No tracer warnings, no log lines, nothing printed: what matters is raised or measured by parity."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
