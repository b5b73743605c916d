"""The one place where the files of a checkpoint become a config, a tokenizer or a model.

What is loaded is compared with the files without transformers' own reading; `checked_facts` returns what was found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.checkpoints.checked import check_model, note_facts
from limbeck.registry.checkpoints.tokenizers import load_as_stated
from limbeck.registry.core.errors import BadInput, LimbeckError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(folder: Path, trust_remote_code: bool = False, *, label: str | None = None) -> PretrainedConfig:
    """Load the config of a causal language model.

    Args:
        trust_remote_code: run the Python code in the folder, as in transformers.
        label: what messages call the model; None for the folder.

    Raises BadInput if transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **_options(trust_remote_code))
    except Exception as error:  # transformers raises exceptions of any type
        raise BadInput(f"{label or folder}: its config.json cannot be read: {_first_line(error)}") from error


def load_tokenizer(
    folder: Path, trust_remote_code: bool = False, *, label: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, with the rules of its tokenizer.json.

    For the arguments see `load_config`. Raises BadInput if it has none, or if its files contradict each other.
    """
    try:
        tokenizer, found = load_as_stated(folder, _options(trust_remote_code))
    except LimbeckError:
        raise
    except Exception as error:  # transformers raises exceptions of any type, AttributeError without a tokenizer
        raise BadInput(
            f"{label or folder} has no tokenizer that transformers can load: {_first_line(error)}",
            fix="the folder needs the tokenizer files that save_pretrained writes",
        ) from error
    note_facts(folder, tokenizer=found)
    return tokenizer


def load_model(
    folder: Path, trust_remote_code: bool = False, *, label: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a causal language model in float32 and in evaluation mode, from safetensors only.

    Args:
        **options: others of transformers' `from_pretrained`, such as `attn_implementation`.

    For the other arguments see `load_config`. Raises BadInput if transformers cannot load it, or if the loaded model is
    another than the files say: rotary tables, unread keys, missing or unused weights, NaN.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading and writing weights: it would mix with Limbeck's own

    options = {"dtype": torch.float32, "use_safetensors": True, **_options(trust_remote_code), **options}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # check_model refuses them by name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # safetensors and transformers errors have no common base class
        reason = _first_line(error)
        raise BadInput(f"{label or folder} cannot be loaded as a causal language model: {reason}") from error
    model, info = loaded
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    note_facts(folder, **check_model(model, info, raw, str(label or folder)))
    return model.eval()


def _options(trust_remote_code: bool) -> dict[str, Any]:
    # trust_remote_code must be set: without it, transformers asks on standard input.
    return {"local_files_only": True, "trust_remote_code": trust_remote_code}


def _first_line(error: Exception) -> str:
    name = type(error).__name__
    line = (str(error).strip().splitlines() or [name])[0]
    return f"{name}: {line}" if isinstance(error, KeyError) else line  # a KeyError has no more text than the key
