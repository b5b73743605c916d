# ruff: noqa: RUF001 (a probe of characters that look alike)
"""Checks that a loaded tokenizer splits text as its tokenizer.json says, and loads that file as it is if not."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

EQUAL = "equal to tokenizer.json"
NO_FILE = "not checked: no tokenizer.json"
FILE = "tokenizer.json"
# What the rules of tokenizers treat differently: digits, spaces, lines, scripts, marks, joined characters, code.
PROBE = (
    "Hello world",
    " leading and trailing ",
    "  two   and    more spaces \t tabs\t\t",
    "one\ntwo\n\nthree\r\n\r\n  \n",
    "\n",
    " ",
    "7 12 345 6789 1234567890 3.14159 1,000,000 0x1F 10:45 ½ ² Ⅷ ٣٤ १२",
    "year2024 v1.2.3 a1b22c333",
    "I'll we've they'd don't IT'S the dog’s “quoted” — dash… café cafe\u0301 ﬁ ﬀ Å Å",
    "UPPER lower Mixed CamelCase snake_case kebab-case x_1",
    "def f(x):\n    return x**2  # a comment\n\tif x != 0 && y <= 1 || !z { a[i] += b->c; }\n",
    '<p class="x">a &amp; b</p> {"key": [1, -2.5e10, null]} https://host.example/a?b=c#d',
    "Привет мир, Γειά σου, שלום עולם, مرحبا بالعالم, नमस्ते दुनिया, สวัสดีชาวโลก",
    "你好，世界。こんにちは世界、カタカナ 안녕하세요 mixed中文text",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽 e\u0301 \u00a0nbsp\u2003em\u200bzero\u2028line\ufeff",
    "...!!!??? ,,, ;;; ((())) [[]] $100 50% #tag @name a/b\\c ~`^",
    "<s></s><unk><pad> <|endoftext|> [INST] [CLS]",
    "",
)
MODEL_FLAGS = ("unk_token", "byte_fallback", "fuse_unk", "ignore_merges", "dropout", "continuing_subword_prefix")
MOST_SPECIAL = 20  # of either end of the list of added tokens


def load_as_stated(folder: Path, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, str]:
    """Load the tokenizer of a folder with the rules of its tokenizer.json.

    Args:
        options: of transformers' `from_pretrained`.

    Returns the tokenizer and what `check_tokenizer` found. Raises what transformers raises, and BadInput if the files
    contradict each other.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises exceptions of any type
        if not (folder / FILE).is_file() or "trust_remote_code" in str(error):
            raise
        tokenizer, found = check_tokenizer(load_exactly(folder), folder)
        return tokenizer, f"{found}, loaded as it is since its class cannot be loaded"
    return check_tokenizer(tokenizer, folder)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[PreTrainedTokenizerBase, str]:
    """Compare a tokenizer with the tokenizer.json of its folder: its rules, and the token ids of a few hard texts.

    A tokenizer class of transformers may build rules of its own instead of those of the file. Then the file is loaded
    as it is, with the special tokens, the chat template and the settings of tokenizer_config.json.

    Returns the tokenizer to use and what was found: EQUAL, NO_FILE, or what was done. Raises BadInput with the text
    and both token ids if the file as it is differs too.
    """
    if not (folder / FILE).is_file():
        return tokenizer, NO_FILE
    found = EQUAL
    if _first_difference(tokenizer, folder) is not None:
        found = f"{EQUAL}, loaded as it is since {type(tokenizer).__name__} has other rules"
        tokenizer = load_exactly(folder, like=tokenizer)
        difference = _first_difference(tokenizer, folder)
        if difference is not None:
            raise BadInput(
                f"{folder}: its {FILE} contradicts its other tokenizer files: {difference}",
                fix="save the tokenizer anew with save_pretrained, or delete added_tokens_decoder from "
                "tokenizer_config.json",
            )
    # A limit saved in the file would cut prompts.
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer, found


def load_exactly(folder: Path, like: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """Load tokenizer.json as it is, with the settings of tokenizer_config.json.

    Args:
        like: the tokenizer that a class of transformers made; special tokens and sides that only the class sets are
            taken from it.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if like is not None:
        vocabulary = tokenizer.get_vocab()
        missing = {name: token for name, token in like.special_tokens_map.items() if not getattr(tokenizer, name, None)}
        tokenizer.add_special_tokens({name: token for name, token in missing.items() if token in vocabulary})
        tokenizer.padding_side, tokenizer.truncation_side = like.padding_side, like.truncation_side
        tokenizer.model_input_names = like.model_input_names
    return tokenizer


_found: dict[tuple[str, ...], str | None] = {}


def _first_difference(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Describe the first difference between a tokenizer and the tokenizer.json of its folder; None if there is none."""
    key = (type(tokenizer).__module__, type(tokenizer).__name__, *_digests(folder))
    if key not in _found:
        stated = _read(folder / FILE)
        _found[key] = _different_ids(tokenizer, stated) or _different_rules(tokenizer, stated)
    return _found[key]


def _digests(folder: Path) -> tuple[str, ...]:
    """Digests of the files that a tokenizer is made of."""
    names = (FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return tuple(sha256(path.read_bytes()).hexdigest() for name in names if (path := folder / name).is_file())


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    stated = Tokenizer.from_file(str(path))
    stated.no_truncation()
    stated.no_padding()
    return stated


def _different_ids(tokenizer: PreTrainedTokenizerBase, stated: Tokenizer) -> str | None:
    for text in _texts(stated):
        for special in (True, False):
            ids = list(tokenizer(text, add_special_tokens=special).input_ids)
            expected = stated.encode(text, add_special_tokens=special).ids
            if ids != expected:
                return f"the loaded tokenizer splits {text!r} into {ids}, {FILE} into {expected}"
    return None


def _texts(stated: Tokenizer) -> Iterator[str]:
    yield from PROBE
    tokens = [token.content for token in stated.get_added_tokens_decoder().values()]
    for token in dict.fromkeys(tokens[:MOST_SPECIAL] + tokens[-MOST_SPECIAL:]):
        yield f"{token}a {token} b  {token}\n{token}{token} x{token}y"


def _different_rules(tokenizer: PreTrainedTokenizerBase, stated: Tokenizer) -> str | None:
    """The first part of a tokenizer that differs: a rule for a rare text would not show in the probe."""
    if not tokenizer.is_fast:
        return None
    loaded = tokenizer.backend_tokenizer
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if _state(getattr(loaded, part)) != _state(getattr(stated, part)):
            return f"its {part} is {getattr(loaded, part)}, in {FILE} {getattr(stated, part)}"
    for flag in MODEL_FLAGS:
        values = getattr(loaded.model, flag, None), getattr(stated.model, flag, None)
        if values[0] != values[1]:
            return f"its {flag} is {values[0]!r}, in {FILE} {values[1]!r}"
    return None


def _state(part: Normalizer | PreTokenizer | Decoder | None) -> bytes | None:
    return None if part is None else part.__getstate__()
