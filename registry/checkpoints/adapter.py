"""Merges a LoRA adapter of peft into its base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.checkpoints.conversions import (
    CARD,
    TOKENIZER_FILES,
    Converted,
    converted_checkpoint,
    copy_tokenizer,
    has_tokenizer,
)
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.errors import BadInput, DamagedArtifact

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = ("LORA",)
PREFIX = "base_model.model."  # of the names of tensors in an adapter
LONGEST_REASON = 300
TOLERANCE = 1e-4  # of the largest logit: what the merging may change, in float32


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises BadInput for an adapter that cannot be merged: another method than LoRA, another task than language
    modelling, or weights in a pickle file. Raises DamagedArtifact if the file is not JSON.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedArtifact(folder, [f"{CONFIG} is not JSON: {error}"]) from None
    if not isinstance(config, dict):
        raise DamagedArtifact(folder, [f"{CONFIG} is not a JSON object"])
    method, task = config.get("peft_type"), config.get("task_type")
    if method not in METHODS:
        raise BadInput(
            f"{folder} is an adapter of type {method}; Limbeck merges {', '.join(METHODS)}",
            fix="merge it with peft, if it can be merged, and give the whole model",
        )
    if task not in (None, "CAUSAL_LM"):
        raise BadInput(f"{folder} is an adapter for {task}: Limbeck takes causal (decoder-only) language models")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise BadInput(
            f"{folder} has its weights in a pickle file (adapter_model.bin), and loading those can run any code"
            if pickled
            else f"{folder} has an {CONFIG}, and no {WEIGHTS}",
            fix="save it with save_pretrained of peft, which writes safetensors" if pickled else None,
        )
    return config


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, as a path or a MODEL, and its revision on the hub or None.

    A path is taken from the adapter's folder, else from the current one. Raises BadInput if it names none.
    """
    config = read_adapter_config(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BadInput(f"{folder}: its {CONFIG} names no base model", fix=f"name it: BASE+{folder}")
    beside = folder / base
    return (str(beside) if beside.exists() else base), config.get("revision")


def merged_checkpoint(adapter: Path, base: Path, base_digest: str) -> Converted:
    """The checkpoint of a base model with an adapter merged into it; merges them if the result is not stored.

    The adapter's own tokenizer is taken, if it has one, else the base's.

    Args:
        base_digest: of the files of the base model.

    Raises BadInput if the adapter does not fit the base model.
    """
    read_adapter_config(adapter)
    used = (CONFIG, WEIGHTS, *TOKENIZER_FILES, CARD)
    files: dict[str, Path | str] = {name: adapter / name for name in used if (adapter / name).is_file()}
    files["base model"] = base_digest
    return converted_checkpoint("adapter", files, lambda folder: _merge(adapter, base, folder), adapter.name)


def _merge(adapter: Path, base: Path, folder: Path) -> None:
    model = load_model(base)
    merged = _merged(model, adapter)
    merged.save_pretrained(folder)
    copy_tokenizer(adapter if has_tokenizer(adapter) else base, folder)
    if not (folder / CARD).is_file() and (base / CARD).is_file():
        shutil.copy(base / CARD, folder / CARD)


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The base model with the adapter's changes added to its weights."""
    import torch
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    try:
        weights = _without_copies(load_peft_weights(str(adapter), device="cpu"))
        _prepare_embedding(model, weights)
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        wrapped = PeftModel(model, config)
        result = set_peft_model_state_dict(wrapped, weights)
    except Exception as error:  # peft raises exceptions of any type
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise BadInput(
            f"{adapter} does not fit its base model: {reason}",
            fix=f"name the base model that it was trained on: BASE+{adapter}",
        ) from error
    _check_all_used(wrapped, result, adapter)
    wrapped.eval()
    ids = torch.arange(32)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        try:
            merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise BadInput(f"{adapter} cannot be merged: {error}") from error
        difference = (merged(input_ids=ids).logits - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():
        raise BadInput(f"{adapter} cannot be merged exactly: the logits change by {float(difference):.2g}")
    return merged


def _prepare_embedding(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give the base model as many tokens as the adapter was trained with, and a head of its own if it needs one."""
    import torch

    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names = {module: f"{PREFIX}{name}" for name, module in model.named_modules() if module in (embedding, head)}
    saved = weights.get(f"{names[embedding]}.weight")
    if saved is not None and saved.shape[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(saved.shape[0], mean_resizing=False)
    changes_one = any(key.startswith(f"{name}.lora_") for key in weights for name in names.values())
    if changes_one and head is not None and head.weight is embedding.weight:
        # peft changes the embedding or the head, and not the tensor that both share.
        head.weight = torch.nn.Parameter(head.weight.clone())
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _without_copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second and third copy that peft saves of an embedding whose number of tokens was changed."""
    copies = {f".{copy}.": "." for copy in ("modules_to_save", "original_module")}
    return {
        key: tensor
        for key, tensor in weights.items()
        if not any(copy in key and key.replace(copy, plain) in weights for copy, plain in copies.items())
    }


def _check_all_used(wrapped: PeftModel, result: Any, adapter: Path) -> None:
    """Raise BadInput if the adapter has tensors that the base model has no place for, or lacks some."""
    if result.unexpected_keys:
        raise BadInput(
            f"{adapter} has weights that its base model has no place for: {', '.join(result.unexpected_keys[:5])}",
            fix=f"name the base model that it was trained on: BASE+{adapter}",
        )
    trained = {name for name, parameter in wrapped.named_parameters() if _belongs_to_adapter(name)}
    missing = sorted(trained.intersection(result.missing_keys))
    if missing:
        raise BadInput(f"{adapter} lacks weights that its {CONFIG} asks for: {', '.join(missing[:5])}")


def _belongs_to_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name
