"""How llama.cpp splits a text by a sentencepiece vocabulary: the reference for the conversion of such a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

SPACE = "\u2581"


def sentencepiece_ids(metadata: Mapping[str, Any], text: str) -> list[int]:
    """Token ids of a short text without special tokens, without BOS and EOS.

    Joins the pair of neighbours with the highest score, the leftmost of equal ones, until no pair is a token; spells
    what is no token in bytes (llama.cpp, llm_tokenizer_spm_session).
    """
    ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    prefix = " " if text and metadata.get("tokenizer.ggml.add_space_prefix", True) else ""
    pieces = list((prefix + text).replace(" ", SPACE))
    while True:
        pairs = [
            (-scores[ids[left + right]], place)
            for place, (left, right) in enumerate(pairwise(pieces))
            if left + right in ids
        ]
        if not pairs:
            break
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found
