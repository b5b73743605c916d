"""Rotary parameters of a GGUF file, in the form of transformers' `rope_parameters`.

What the keys and tensors mean is defined by llama.cpp (src/llama-model.cpp, ggml_rope_ext).
"""

from __future__ import annotations

import math
from typing import Any

from limbeck.registry.checkpoints.gguf.file import GgufFile
from limbeck.registry.core.errors import BadInput

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROTARY_TENSORS = (FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS)  # no parameters of the model
LOW_TURNS, HIGH_TURNS, LLAMA3_CONTEXT = 1.0, 4.0, 8192  # of Llama 3.1 to 3.3


def rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """The rotary parameters of the layers with full attention.

    Raises BadInput for a scaling that transformers does not have, or factors that follow no known rule.
    """
    metadata, prefix = file.metadata, f"{file.architecture}.rope"
    theta = float(metadata.get(f"{prefix}.freq_base", 10000.0))
    rotary_dim = int(metadata.get(f"{prefix}.dimension_count", head_dim))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if rotary_dim != head_dim:
        found["partial_rotary_factor"] = rotary_dim / head_dim
    metadata.get(f"{prefix}.scaling.finetuned")  # describes the training
    if FREQUENCY_FACTORS in file.shapes:
        return found | _llama3(file, theta, rotary_dim)
    factor = float(metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear", 0.0)))
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    if LONG_FACTORS in file.shapes:
        return found | _longrope(file)
    if kind == "yarn" and factor:
        return found | _yarn(file, factor)
    if kind == "linear" and factor not in (0.0, 1.0):
        return found | {"rope_type": "linear", "factor": factor}
    if kind not in ("linear", "none", "yarn"):
        raise BadInput(f"{file.path}: {prefix}.scaling.type is {kind!r}, which Limbeck cannot carry over")
    metadata.get(f"{prefix}.scaling.original_context_length")  # Phi-3 states it without a scaling too
    return found


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    prefix = f"{file.architecture}.rope.scaling"
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(file.metadata[f"{prefix}.original_context_length"]),
    }
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if (value := file.metadata.get(f"{prefix}.{key}")) is not None:
            found[name] = value
    return found


def _longrope(file: GgufFile) -> dict[str, Any]:
    prefix = f"{file.architecture}.rope.scaling"
    return {
        "rope_type": "longrope",
        "long_factor": file.values(LONG_FACTORS),
        "short_factor": file.values(SHORT_FACTORS),
        "original_max_position_embeddings": int(file.metadata[f"{prefix}.original_context_length"]),
        "attention_factor": float(file.metadata.get(f"{prefix}.attn_factor", 1.0)),
    }


def _llama3(file: GgufFile, theta: float, rotary_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3's scaling, from the factor by which each wavelength is stretched.

    The file holds the factors alone. The thresholds are those of every published model, 1 and 4 turns in the original
    context, whose length follows from one factor between them.
    """
    factors = file.values(FREQUENCY_FACTORS)
    turns = [theta ** (-2 * i / rotary_dim) / (2 * math.pi) for i in range(len(factors))]  # per position
    factor = round(max(factors), 4)
    lengths = [LLAMA3_CONTEXT]
    for value, turn in zip(factors, turns, strict=True):
        if 1.001 < value < factor * 0.999:
            share = (1 / value - 1 / factor) / (1 - 1 / factor)  # of the unscaled frequency
            lengths.append(round((LOW_TURNS + share * (HIGH_TURNS - LOW_TURNS)) / turn))
    for length in lengths:
        expected = _llama3_factors(turns, factor, length)
        if all(math.isclose(e, f, rel_tol=1e-4) for e, f in zip(expected, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW_TURNS,
                "high_freq_factor": HIGH_TURNS,
                "original_max_position_embeddings": length,
            }
    raise BadInput(f"{file.path}: {FREQUENCY_FACTORS} does not follow the rule of Llama 3, the only one known")


def _llama3_factors(turns: list[float], factor: float, length: int) -> list[float]:
    shares = [min(1.0, max(0.0, (length * turn - LOW_TURNS) / (HIGH_TURNS - LOW_TURNS))) for turn in turns]
    return [1 / ((1 - share) / factor + share) for share in shares]
