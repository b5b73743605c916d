"""Teachers and students as transformers models: loading, building from a config, checking tokenizers."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.blocks import Blocks
from distill.recipe import Student
from registry.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises BadInput where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder} has no tokenizer that transformers can load: {error}") from error


def load_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM in float32 from safetensors. Raises BadInput where transformers cannot load it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"{folder} cannot be loaded as a causal language model: {error}") from error


def build_student(
    name: str, student: Student, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int, folder: Path | None
) -> PreTrainedModel:
    """The student before training: pretrained from `folder`, or fresh from its config.

    Raises BadInput for a config key that the architecture does not have, naming the near one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder is not None:
        return load_model(folder)
    given = dict(student.config)
    model_type = given.pop("model_type")
    where = f"students.{name}.config"
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise BadInput(
            f"{where}.model_type {model_type!r} is no architecture that transformers knows",
            fix="use llama, qwen2, gpt2, gpt_neox or another causal one",
        ) from None
    known = default.to_dict().keys() | default.attribute_map.keys()
    for key in given.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        raise BadInput(f"{where}.{key} is no setting of {model_type}", fix=f"did you mean {near[0]}?" if near else None)
    end = tokenizer.eos_token_id
    settings = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    }
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | given)))
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise BadInput(f"{where} does not make a model: {error}") from error


def check_vocabulary(student: PreTrainedModel, teacher_vocab_size: int, name: str) -> None:
    """Logits are compared entry by entry. Raises BadInput where student and teacher have unlike vocabularies."""
    size = student.config.vocab_size
    if size < teacher_vocab_size:
        raise BadInput(
            f"students.{name} has a vocabulary of {size} tokens, its teacher one of {teacher_vocab_size}",
            fix="a divergence needs one tokenizer: take the teacher's vocab_size, or learn from labels",
        )


def capture_topk(model: PreTrainedModel, top_k: int, batch_size: int = 8) -> object:
    """A function of blocks (n, T) that runs the teacher: ids (n, T, k) and log-probabilities (n, T, k)."""
    import torch

    @torch.inference_mode()
    def capture(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, logprobs = [], []
        for start in range(0, len(blocks), batch_size):
            batch = torch.from_numpy(blocks[start : start + batch_size]).long().to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits.float()
            values, indices = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
            logprobs.append((values - logits.logsumexp(-1, keepdim=True)).cpu().numpy())
            ids.append(indices.cpu().numpy())
        return np.concatenate(ids), np.concatenate(logprobs)

    return capture


def bits_per_byte(model: PreTrainedModel, blocks: Blocks, batch_size: int = 8, limit: int = 128) -> float:
    """Bits per byte of text over at most `limit` evenly spread blocks; the first token of a block is given."""
    import torch
    import torch.nn.functional as F

    chosen = blocks.ids[np.unique(np.linspace(0, len(blocks.ids) - 1, limit).astype(int))]
    nats = 0.0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(chosen), batch_size):
            ids = torch.from_numpy(chosen[start : start + batch_size]).long().to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    tokens = chosen[:, 1:].size
    return nats / tokens / np.log(2) * blocks.ids.size / blocks.text_bytes
