"""The precisions of a variant, and how a float32 graph is converted to each. A new precision is one entry below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.export.graph.save import save_graph
from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.evaluate import CandidateEvaluator
from limbeck.export.quantize.float16 import convert_to_float16, load_as_float16
from limbeck.export.quantize.mixed_precision import choose_plan
from limbeck.export.quantize.sample_texts import CHOICE_CONVERSATIONS, render_conversations
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.export.runtime.session import GRAPH
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import return_freed_memory

# By bits. Larger blocks save little: in 8 bits, blocks of 64 are 6% smaller than blocks of 32, and have 1.5 times their
# KL (SmolLM2-135M).
FORMATS = {8: BlockFormat(8, 32, symmetric=True), 4: BlockFormat(4, 32)}

# The search for parts that need 8 bits aims at this share of the limit: the variant is judged on other text, and on the
# bad end of an interval.
SEARCH_MARGIN = 0.5

# (folder of the float32 artifact, folder to write model.onnx to, settings) -> fields for the manifest
Quantize = Callable[[Path, Path, QuantizationSettings], dict[str, Any]]


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        quantize: converts a graph; None for fp32.
        limits: of the quality, by figure of `Parity.quality`; with 95% confidence a variant is within them, or its user
            has allowed more. {} for fp32, which equals PyTorch.
        recorded_settings: fields of QuantizationSettings in the manifest; a variant with other values is made again.
    """

    quantize: Quantize | None
    limits: dict[str, float]
    recorded_settings: tuple[str, ...] = ("device", "max_change")

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
        BadInput: the graph cannot have this precision, or the texts have too few tokens.
    """
    settings = settings or QuantizationSettings()
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


def _to_float16(artifact: Path, folder: Path, settings: QuantizationSettings) -> dict[str, Any]:
    _replace_graph(folder, load_as_float16(artifact / GRAPH))
    return {"method": "float16"}


def _to_8_bits(artifact: Path, folder: Path, settings: QuantizationSettings) -> dict[str, Any]:
    weights = GraphWeights.from_graph(artifact / GRAPH)
    _check_weights(weights, artifact, 8, settings.device)
    carried = weights.carry_over(8)
    blocks = _formats(settings)[8]
    _save_quantized(weights, dict.fromkeys(weights.groups, blocks), folder, settings)
    return _record("weight-only", carried) | {"chosen": blocks.to_manifest()}


def _to_4_bits(artifact: Path, folder: Path, settings: QuantizationSettings) -> dict[str, Any]:
    with TemporaryDirectory(dir=folder, prefix=".try-") as scratch:
        # Before the weights: it runs the float32 graph, whose session is gone when they are read.
        evaluator = CandidateEvaluator(artifact, Path(scratch), settings.texts)
        return_freed_memory()
        weights = GraphWeights.from_graph(artifact / GRAPH)
        _check_weights(weights, artifact, 4, settings.device)
        carried = weights.carry_over(4)
        if not carried:
            settings.report("  calibrating (GPTQ)")
            (folder_for_calibration := Path(scratch) / "calibration").mkdir()
            conversations = render_conversations(artifact, CHOICE_CONVERSATIONS)
            weights.calibrate(artifact, folder_for_calibration, [*settings.texts, *conversations])
        max_loss, formats = SEARCH_MARGIN * _max_change(settings), _formats(settings)
        choice = choose_plan(weights, evaluator, formats, max_loss=max_loss, report=settings.report)
    _save_quantized(weights, choice.plan, folder, settings)
    return {
        **_record("weight-only" if carried else "weight-only, GPTQ", carried),
        "chosen": formats[4].to_manifest(),
        "chosen_on": settings.text_source,
        "chosen_on_tokens": evaluator.tokens,
        **choice.record,
    }


def _formats(settings: QuantizationSettings) -> dict[int, BlockFormat]:
    """The format of each number of bits, for the device."""
    level = 4 if settings.device == "cpu" else 0  # products compute in float on CUDA
    return {bits: replace(blocks, accuracy_level=level) for bits, blocks in FORMATS.items()}


def _save_quantized(
    weights: GraphWeights, plan: Mapping[str, BlockFormat], folder: Path, settings: QuantizationSettings
) -> None:
    model = weights.quantize(plan)
    weights.clear_packed()
    _replace_graph(folder, convert_to_float16(model) if settings.device == "cuda" else model)


def _record(method: str, carried: Mapping[str, int]) -> dict[str, Any]:
    return {"method": method, **({"carried_over": dict(carried)} if carried else {})}


def _check_weights(weights: GraphWeights, artifact: Path, bits: int, device: str) -> None:
    """Raise BadInput if the graph has no weights that can be quantized for the device."""
    if not weights.weight_nodes:
        raise BadInput(
            f"{artifact.name}: its graph has no product with a constant weight to store in {bits} bits",
            fix="use fp32 or fp16",
        )
    if weights.expert_nodes and device == "cuda":
        raise BadInput("quantized experts have not been tried on CUDA", fix="use fp32 or fp16 on CUDA")


def _max_change(settings: QuantizationSettings) -> float:
    """The limit of int4's relative change of bits per byte: the user's own, or the precision's."""
    return A_LITTLE_WORSE["bits_per_byte_change"] if settings.max_change is None else settings.max_change


def _replace_graph(folder: Path, model: Any) -> None:
    for path in folder.glob(f"{GRAPH}*"):
        path.unlink()
    save_graph(model, folder / GRAPH)


# A variant of 8 or 16 bits should not be told from its model; one of 4 bits is a little worse for half the bytes.
NEARLY_EQUAL = {"bits_per_byte_change": 0.02, "mean_kl": 0.03, "p99_kl": 0.3, "top1_agreement": 0.9}
A_LITTLE_WORSE = {"bits_per_byte_change": 0.05, "mean_kl": 0.1, "p99_kl": 1.0, "top1_agreement": 0.8}

PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(None, {}),
    "fp16": Precision(_to_float16, NEARLY_EQUAL),
    "int8-weight": Precision(_to_8_bits, NEARLY_EQUAL),
    "int4": Precision(_to_4_bits, A_LITTLE_WORSE),
}
