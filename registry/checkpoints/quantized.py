"""Checkpoints that transformers loads as another model than their files look: quantized, or a part of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.registry.checkpoints.conversions import Converted, converted_checkpoint, copy_tokenizer
from limbeck.registry.checkpoints.kinds import has_other_inputs, quantization_method
from limbeck.registry.checkpoints.load import load_model


def needs_conversion(config: dict[str, Any]) -> str | None:
    """What a conversion does with a checkpoint of this config.json, which `refuse_other_kinds` let pass.

    Returns the method of its quantization, "text part" for a language model inside a multimodal one, or None.
    """
    return quantization_method(config) or ("text part" if has_other_inputs(config) else None)


def plain_checkpoint(folder: Path, digest: str, kind: str, label: str) -> Converted:
    """The checkpoint with float weights and without parts for images; converts it if it is not stored.

    Args:
        digest: of the files in `folder`.
        kind: what `needs_conversion` returned.

    Raises BadInput if transformers cannot load it.
    """
    return converted_checkpoint(kind, {"checkpoint": digest}, lambda target: _save(folder, target, kind, label), label)


def _save(folder: Path, target: Path, kind: str, label: str) -> None:
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    methods: dict[str, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    options = {"quantization_config": methods[kind](dequantize=True)} if kind in methods else {}
    model = load_model(folder, label=label, **options)
    model.save_pretrained(target)
    copy_tokenizer(folder, target)
