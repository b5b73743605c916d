"""Constrained decoding: texts that follow a grammar or a JSON schema, by llguidance's token masks.

A grammar is in llguidance's dialect of Lark, which takes JSON schemas as `%json`:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from limbeck.registry.core.errors import BadInput

CACHED_GRAMMARS = 64
# A grammar that needs more is refused, or fails its text, since all rows of a batch wait for a mask (20 ms at most).
LIMITS = LLParserLimits(max_grammar_size=20_000, verbose_errors=False)


class GrammarCompiler:
    """Compiles grammars for one artifact's tokenizer, and keeps the latest. Thread-safe.

    Args:
        tokenizer: the artifact's.
        vocab_size: width of the logits.
        end_token_ids: the tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self._vocab_size, self._end_token_ids = vocab_size, sorted(end_token_ids)
        self._readable: LLTokenizer | None = None  # made when first needed: it takes half a second
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> CompiledGrammar:
        """Compile a grammar. Raises BadInput if it is invalid, or the tokenizer is of a kind without constraints."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
            self._readable = self._readable or self._read_tokenizer()
            matcher = LLMatcher(self._readable, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise BadInput(matcher.get_error().strip())
            compiled = CompiledGrammar(matcher, self._vocab_size)
            self._compiled[grammar] = compiled
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            return compiled

    def _read_tokenizer(self) -> LLTokenizer:
        """llguidance's form of the tokenizer. Raises BadInput if it cannot read it."""
        try:
            return LLTokenizer(self.tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=self._end_token_ids or None)
        except Exception as error:  # llguidance raises plain exceptions
            reason = str(error).strip().splitlines()[0]
            raise BadInput(f"this model's tokenizer cannot constrain its texts: {reason}") from None


class CompiledGrammar:
    """A grammar over the tokens of one tokenizer.

    Args:
        matcher: llguidance's, at the start of a text.
        vocab_size: width of the logits.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> GrammarState:
        """The state of a new, empty text."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size)


class GrammarState:
    """Where one text is in its grammar.

    Raises:
        BadInput: from each method, if the grammar exceeds its limits of time and memory at this text.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._mask = np.zeros((vocab_size + 31) // 32, np.int32)  # a bit for each token, the lowest bit first

    def allowed_tokens(self) -> np.ndarray:
        """(V,) bool: the tokens that may follow; an end-of-text token where the text may end."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(bool)

    def accept(self, token: int) -> bool:
        """Append an allowed token; return whether the text is complete: nothing can follow."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadInput(f"the constraint failed: {self._matcher.get_error().strip()}")
