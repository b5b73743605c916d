"""Which documents share a block, and whether a model keeps those of one block apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPEN = 256  # blocks that still take documents; more would fill hardly better and take longer
VOCABULARY = 32  # of a probed model


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Documents put into blocks, each whole into the first open block with room for it.

    Args:
        lengths: tokens of each, none above `capacity`.
        capacity: tokens a block.

    Returns:
        Of each block its documents' numbers, in order.
    """
    blocks: list[list[int]] = []
    room = np.zeros(OPEN, dtype=np.int64)  # of each open block
    number = np.full(OPEN, -1)
    for document, length in enumerate(lengths):
        fitting = np.flatnonzero(room >= length)
        if not len(fitting):
            place = int(room.argmin())  # the fullest is closed
            room[place], number[place] = capacity, len(blocks)
            blocks.append([])
        else:
            place = int(fitting[number[fitting].argmin()])
        blocks[number[place]].append(document)
        room[place] -= length
    return blocks


def separates_documents(config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether a model of this kind reads a document in a block as it reads it alone, given `position_ids`.

    Found out on a fresh model of two layers: one that has a state from token to token, or counts places in its own
    way, sees the documents before. Also false where no such model can be made.
    """
    for narrow in (True, False):
        try:
            return _ignores_neighbours(_small(config, narrow), trust_remote_code)
        except Exception:  # a model may not fit together with other sizes, and fails in a way of its own
            continue
    return False


def _small(config: PretrainedConfig, narrow: bool) -> PretrainedConfig:
    """The same kind of model with two layers and few tokens; `narrow`: with little between attention and attention."""
    small = copy.deepcopy(config.get_text_config())
    most = {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
    if narrow:
        most |= {"intermediate_size": 64, "moe_intermediate_size": 64}
    for name, value in most.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(getattr(small, name), value))
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    for token in ("bos", "eos", "pad"):
        setattr(small, f"{token}_token_id", None)
    return small


def _ignores_neighbours(config: PretrainedConfig, trust_remote_code: bool, length: int = 12) -> bool:
    """Whether a document gives the same logits whichever comes before it, and as alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).float().eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)  # in a fresh model a layer adds so little that a neighbour would not show
        one, other, document = torch.randint(VOCABULARY, (3, length))
        packed = torch.stack([torch.cat([one, document]), torch.cat([other, document])])
        places = torch.arange(length).repeat(2).expand(2, -1)
        after = model(input_ids=packed, position_ids=places, use_cache=False).logits[:, length:]
        alone = model(input_ids=document[None], use_cache=False).logits
    close = torch.isclose(after[0], alone[0], atol=1e-4, rtol=1e-3).all(-1)
    # Rounding may send a token to other experts, and then it is one position that differs and not all.
    return torch.allclose(after[0], after[1], atol=1e-4, rtol=1e-3) and bool(close.float().mean() > 0.5)
