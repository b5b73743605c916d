"""Converts a GGUF file to a checkpoint."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.checkpoints.conversions import (
    CARD,
    TOKENIZER_FILES,
    Converted,
    converted_checkpoint,
    copy_tokenizer,
    require_disk,
)
from limbeck.registry.checkpoints.gguf.config import config_of_gguf
from limbeck.registry.checkpoints.gguf.file import GgufFile, read_gguf
from limbeck.registry.checkpoints.gguf.rotary import ROTARY_TENSORS
from limbeck.registry.checkpoints.gguf.tokenizer import ids_that_end_text, tokenizer_of_gguf
from limbeck.registry.checkpoints.load import load_tokenizer
from limbeck.registry.checkpoints.weights import check_finite, check_loading
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MULTI_TOKEN = "nextn_predict_layers"  # layers for multi-token prediction, which transformers does not have


def checkpoint_of_gguf(path: Path) -> Converted:
    """The checkpoint that a GGUF file holds, with weights in float32; converts it if it is not stored.

    A tokenizer.json beside the file is taken instead of the tokenizer in it.

    Raises:
        BadInput: an architecture, tokenizer or metadata that Limbeck cannot carry over.
        DamagedArtifact: the file is truncated, or not a GGUF file.
    """
    file = read_gguf(path)
    files: dict[str, Path | str] = {path.name: path}
    if (path.parent / "tokenizer.json").is_file():
        files |= {name: path.parent / name for name in TOKENIZER_FILES if (path.parent / name).is_file()}
    return converted_checkpoint("gguf", files, lambda folder: _convert(file, folder), path.name)


def _convert(file: GgufFile, folder: Path) -> None:
    require_disk(folder, 4 * file.element_count, file.path.name)
    config = config_of_gguf(file)
    _write_tokenizer(file, folder)
    model = _load(file, config)
    ends = ids_that_end_text(file)
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(folder)
    licence = file.metadata.get("general.license")
    if licence:
        (folder / CARD).write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")


def _load(file: GgufFile, config: PretrainedConfig) -> PreTrainedModel:
    """Load the weights with transformers. Raises BadInput if tensors are missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"gguf_file": file.path.name, "config": config, "dtype": torch.float32}
    options |= {"local_files_only": True, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # check_loading refuses them by name
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(file.path.parent, **options)
    except Exception as error:  # transformers raises exceptions of any type
        raise BadInput(f"{file.path}: transformers cannot load it: {error}") from error
    loaded, info = found
    check_loading(loaded, info, str(file.path))
    check_finite(loaded, str(file.path))
    _check_all_used(file, loaded)
    # A model that was loaded from GGUF refuses to be saved; one made from the same config and weights does not.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _check_all_used(file: GgufFile, model: PreTrainedModel) -> None:
    """Raise BadInput if the file has weights that the model has no place for: transformers skips them silently."""
    prefix = file.architecture
    ignored = [name for name in ROTARY_TENSORS if name in file.shapes]
    extra_layers = int(file.metadata.get(f"{prefix}.{MULTI_TOKEN}", 0))
    first_extra = model.config.get_text_config().num_hidden_layers
    for layer in range(first_extra, first_extra + extra_layers):
        ignored += [name for name in file.shapes if name.startswith(f"blk.{layer}.")]
    stated = file.element_count - sum(prod(file.shapes[name]) for name in ignored)
    used = sum(parameter.numel() for parameter in model.parameters())
    if stated != used:
        raise BadInput(
            f"{file.path} has {stated:,} weights, and {type(model).__name__} takes {used:,} of them",
            fix="give the original checkpoint, with config.json and safetensors",
        )


def _write_tokenizer(file: GgufFile, folder: Path) -> None:
    beside = file.path.parent
    if not (beside / "tokenizer.json").is_file():
        tokenizer_of_gguf(file).save_pretrained(folder)
        return
    copy_tokenizer(beside, folder)
    (folder / CARD).unlink(missing_ok=True)  # of the folder, which may hold other models
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    vocabulary = load_tokenizer(folder, label=str(beside)).get_vocab()
    known = [(token, number) for number, token in enumerate(tokens) if token in vocabulary]
    moved = next(((token, number) for token, number in known if vocabulary[token] != number), None)
    if moved or len(known) < len(tokens) / 2:
        reason = f"{moved[0]!r} is {vocabulary[moved[0]]}, not {moved[1]}" if moved else "few tokens are the same"
        raise BadInput(
            f"{beside / 'tokenizer.json'} is not the tokenizer of {file.path.name}: {reason}",
            fix="give the tokenizer.json of the original model, or move it away",
        )
