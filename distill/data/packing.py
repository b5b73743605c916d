"""Packing: which documents share a block, and whether a model keeps the documents of a block apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_OPEN_BLOCKS = 256  # more would hardly pack better, and take longer
PROBE_VOCAB_SIZE = 32


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into blocks, each into the first open block that has room for it.

    Args:
        lengths: tokens of each document, none above `capacity`.
        capacity: tokens per block.

    Returns:
        For each block, the numbers of its documents in order.
    """
    blocks: list[list[int]] = []
    room = np.zeros(MAX_OPEN_BLOCKS, dtype=np.int64)  # tokens left in each open block
    number = np.full(MAX_OPEN_BLOCKS, -1)
    for document, length in enumerate(lengths):
        fitting = np.flatnonzero(room >= length)
        if not len(fitting):
            slot = int(room.argmin())  # close the fullest block
            room[slot], number[slot] = capacity, len(blocks)
            blocks.append([])
        else:
            slot = int(fitting[number[fitting].argmin()])
        blocks[number[slot]].append(document)
        room[slot] -= length
    return blocks


def separates_documents(config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether a model of this kind, given `position_ids`, reads a document in a block as it reads it alone.

    Tests it on a fresh model of two layers. A model with a recurrent state, or that counts positions itself (ALiBi),
    sees the earlier documents. Also false if no such model can be made.
    """
    for narrow in (True, False):
        try:
            return _ignores_neighbours(_probe_config(config, narrow), trust_remote_code)
        except Exception:  # a model with changed sizes may fail in many ways
            continue
    return False


def _probe_config(config: PretrainedConfig, narrow: bool) -> PretrainedConfig:
    """The same kind of model with few tokens, and a layer of each type, at least two; `narrow`: also a small MLP."""
    small = copy.deepcopy(config.get_text_config())
    limits = {"num_hidden_layers": 2, "vocab_size": PROBE_VOCAB_SIZE}
    if narrow:
        limits |= {"intermediate_size": 64, "moe_intermediate_size": 64}
    for name, limit in limits.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(getattr(small, name), limit))
    if getattr(small, "layer_types", None):
        each = list(dict.fromkeys(small.layer_types))  # in the order of a model whose last type is the one it must be
        small.layer_types = each if len(each) > 1 else small.layer_types[:2]
        small.num_hidden_layers = len(small.layer_types)
    for token in ("bos", "eos", "pad"):
        setattr(small, f"{token}_token_id", None)
    return small


def _ignores_neighbours(config: PretrainedConfig, trust_remote_code: bool, length: int = 12) -> bool:
    """Whether a document gets the same logits alone and after any other document."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).float().eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)  # the layers of a fresh model add too little to show a neighbour's effect
        one, other, document = torch.randint(PROBE_VOCAB_SIZE, (3, length))
        packed = torch.stack([torch.cat([one, document]), torch.cat([other, document])])
        positions = torch.arange(length).repeat(2).expand(2, -1)
        after = model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, length:]
        alone = model(input_ids=document[None], use_cache=False).logits
    close = torch.isclose(after[0], alone[0], atol=1e-4, rtol=1e-3).all(-1)
    # Rounding may route a token to other experts; then only some positions differ.
    return torch.allclose(after[0], after[1], atol=1e-4, rtol=1e-3) and bool(close.float().mean() > 0.5)
