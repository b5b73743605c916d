"""The precisions of a variant, and how a float32 graph is converted to each. A new precision is one entry below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from limbeck.export.graph.save import save_graph
from limbeck.export.quantize.evaluate import CandidateEvaluator
from limbeck.export.quantize.float16 import convert_to_float16, load_as_float16
from limbeck.export.quantize.int8 import quantize_dynamic_int8, quantize_static_int8
from limbeck.export.quantize.mixed_precision import choose_plan
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import GRAPH, NUMPY_TYPES, empty_past_shape
from limbeck.registry.core.errors import BadInput

CALIBRATION_TEXTS = 16
CALIBRATION_TOKENS = 128  # at most, per text

# (folder of the float32 artifact, folder to write model.onnx to, settings) -> fields for the manifest
Quantize = Callable[[Path, Path, QuantizationSettings], dict[str, Any]]


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        quantize: converts a graph; None for fp32.
        on_cuda: whether CUDA runs it.
        recorded_settings: fields of QuantizationSettings in the manifest; a variant with other values is made again.
        kl_limit_factor: parity's limit for a text in a batch, padded or cached, against the same text alone: this
            many times the variant's mean KL from PyTorch.
    """

    quantize: Quantize | None
    on_cuda: bool = False
    recorded_settings: tuple[str, ...] = ("device",)
    kl_limit_factor: float = 1.0

    def settings_for_manifest(self, settings: QuantizationSettings) -> dict[str, Any]:
        """Return the recorded settings by name."""
        return {name: getattr(settings, name) for name in self.recorded_settings}


def quantize(
    artifact: Path, folder: Path, precision: str, settings: QuantizationSettings | None = None
) -> dict[str, Any]:
    """Write `folder/model.onnx`, the float32 artifact's graph in `precision`. Returns `quantization` of the manifest.

    Args:
        artifact: folder with a float32 graph, its configuration and its tokenizer; may be the same as `folder`.
        precision: a key of PRECISIONS other than fp32.

    Raises:
        BadInput: the device or the graph cannot have this precision, or the texts have too few tokens.
    """
    settings = settings or QuantizationSettings()
    check_device([precision], settings.device)
    entry = PRECISIONS[precision]
    if entry.quantize is None:
        raise ValueError(f"{precision} is the precision that the others are made from")
    return {
        **entry.quantize(artifact, folder, settings),
        "requested": entry.settings_for_manifest(settings),
    }


def parse_precisions(names: Sequence[str]) -> list[str]:
    """Strip the names of precisions. Raises BadInput for an unknown one."""
    stripped = [name.strip() for name in names]
    for name in stripped:
        if name not in PRECISIONS:
            raise BadInput(f"precision {name!r} is unknown", fix=f"use one of: {', '.join(PRECISIONS)}")
    return stripped


def check_device(precisions: Sequence[str], device: str) -> None:
    """Raise BadInput if the device cannot run one of the precisions."""
    on_cuda = [name for name, entry in PRECISIONS.items() if entry.on_cuda]
    for precision in precisions:
        if device == "cuda" and precision not in on_cuda:
            raise BadInput(f"{precision} is for the CPU", fix=f"on CUDA use one of: {', '.join(on_cuda)}")


def _to_float16(artifact: Path, folder: Path, settings: QuantizationSettings) -> dict[str, Any]:
    _replace_graph(folder, load_as_float16(artifact / GRAPH))
    return {"method": "float16"}


def _to_dynamic_int8(artifact: Path, folder: Path, settings: QuantizationSettings) -> dict[str, Any]:
    _refuse_experts(artifact, "int8")
    quantize_dynamic_int8(artifact / GRAPH, folder)
    return {"method": "dynamic int8"}


def _to_static_int8(artifact: Path, folder: Path, settings: QuantizationSettings) -> dict[str, Any]:
    _refuse_experts(artifact, "int8-static")
    runtime = Runtime.load(artifact, verify=False)
    if not any(runtime.encode(text) for text in settings.texts[:CALIBRATION_TEXTS]):
        raise BadInput("no text to calibrate with: every document is empty")
    quantize_static_int8(artifact / GRAPH, folder, _calibration_inputs(runtime, settings.texts))
    return {"method": "static int8", "calibration": settings.text_source}


def _to_weight_only(artifact: Path, folder: Path, settings: QuantizationSettings, bits: int) -> dict[str, Any]:
    weights = GraphWeights.from_graph(artifact / GRAPH)
    if not weights.weight_nodes:
        raise BadInput(
            f"{artifact.name}: its graph has no product with a constant weight to store in {bits} bits",
            fix="use fp32 or fp16",
        )
    if weights.expert_nodes and settings.device == "cuda":
        raise BadInput("quantized experts have not been tried on CUDA", fix="use fp32 or fp16 on CUDA")
    with TemporaryDirectory(dir=folder, prefix=".try-") as scratch:
        evaluator = CandidateEvaluator(artifact, Path(scratch), settings.texts)
        choice = choose_plan(
            weights,
            evaluator,
            bits,
            max_loss=settings.max_change,
            on_cpu=settings.device == "cpu",
            report=settings.report,
        )
    model = weights.quantize(choice.plan)
    if settings.device == "cuda":
        model = convert_to_float16(model)
    _replace_graph(folder, model)
    return {
        "method": "weight-only",
        "chosen_on": settings.text_source,
        "chosen_on_tokens": evaluator.tokens,
        **choice.record,
    }


def _refuse_experts(artifact: Path, precision: str) -> None:
    """Raise BadInput if the graph has experts, whose weights would stay in float32."""
    import onnx

    if any(node.op_type == "MoE" for node in onnx.load(artifact / GRAPH, load_external_data=False).graph.node):
        raise BadInput(
            f"the model is a mixture of experts, and {precision} has no operator for experts",
            fix="use int8-weight or int4",
        )


def _replace_graph(folder: Path, model: Any) -> None:
    for path in folder.glob(f"{GRAPH}*"):
        path.unlink()
    save_graph(model, folder / GRAPH)


def _calibration_inputs(runtime: Runtime, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the graph's inputs for the beginning of each of the first texts, with an empty cache."""
    max_tokens = min(CALIBRATION_TOKENS, runtime.max_length)
    for text in texts[:CALIBRATION_TEXTS]:
        row = runtime.encode(text[: 16 * max_tokens])[:max_tokens]
        if not row:
            continue
        ids = np.array([row], np.int64)
        values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
        cache = {
            name: np.zeros(empty_past_shape(item, 1), NUMPY_TYPES[item.type])
            for name, item in runtime.past_inputs.items()
        }
        yield {name: values[name] for name in runtime.input_names} | cache


# Dynamic int8 quantizes the activations of a whole batch with one scale, so the other texts of a batch change a text's
# results about as much as quantization does: 0.8 to 2.2 times the mean KL from PyTorch, measured on a trained model and
# on random ones of four families; the limit is 4. The other precisions quantize most activations per token: at most 0.3
# times (int8-static, whose tied head is dynamic).
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(None, on_cuda=True),
    "fp16": Precision(_to_float16, on_cuda=True),
    "int8": Precision(_to_dynamic_int8, kl_limit_factor=4.0),
    "int8-static": Precision(_to_static_int8),
    "int8-weight": Precision(partial(_to_weight_only, bits=8), on_cuda=True),
    "int4": Precision(partial(_to_weight_only, bits=4), on_cuda=True, recorded_settings=("device", "max_change")),
}
