"""The tokenizer of a GGUF file, from its metadata.

transformers' conversion takes the rules of a tokenizer class, not those that `tokenizer.ggml.pre` names: for SmolLM2 it
leaves out the splitting of digits and adds a BOS token. So byte-level vocabularies are built here, and sentencepiece
ones are compared with llama.cpp's algorithm on a probe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limbeck.registry.checkpoints.gguf.file import GgufFile
from limbeck.registry.checkpoints.gguf.pre_tokenizers import RULES, Rules, pre_tokenizer_of_rules
from limbeck.registry.checkpoints.gguf.sentencepiece import SPACE, sentencepiece_ids
from limbeck.registry.checkpoints.tokenizers import PROBE
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

GIVE_TOKENIZER = "put the tokenizer.json of the original model beside the file"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of llama.cpp
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Of sentencepiece vocabularies whose metadata does not say so.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}
# Tokens that end a turn, for files without `tokenizer.ggml.eot_token_id`: llama.cpp finds them by their text too.
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|return|>", "<|call|>")


def tokenizer_of_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises BadInput for a kind of vocabulary or a pre-tokenizer that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in metadata:
        raise BadInput(f"{file.path}: tokenizer {kind!r} is not supported, only gpt2 and llama", fix=GIVE_TOKENIZER)
    if kind == "gpt2":
        rules = _rules(file)
        backend, adds_bos = _byte_level(file, rules), rules.adds_bos
    else:
        backend, adds_bos = _sentencepiece(file), True
    special = special_tokens(file)
    adds = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    _add_at_the_ends(backend, {name: special[f"{name}_token"] for name, added in adds.items() if added})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{file.architecture}.context_length"),
        **special,
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def special_tokens(file: GgufFile) -> dict[str, str]:
    """`bos_token`, `eos_token`, `unk_token` and `pad_token`, as far as the file has them."""
    tokens = file.metadata["tokenizer.ggml.tokens"]
    defaults = SENTENCEPIECE_IDS if file.metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {
        name: file.metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(name)) for name, key in SPECIAL.items()
    }
    return {f"{name}_token": tokens[number] for name, number in ids.items() if number is not None}


def ids_that_end_text(file: GgufFile) -> list[int]:
    """Ids of the tokens at which generation stops: the end of a text, and of a turn of the chat template."""
    metadata = file.metadata
    names = ("eos", "eot", "eom")
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    template = str(metadata.get("tokenizer.chat_template", ""))
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    ids += [
        number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED) and token in ENDS_OF_TURN and token in template
    ]
    return list(dict.fromkeys(number for number in ids if number is not None))


def _rules(file: GgufFile) -> Rules:
    name = file.metadata.get("tokenizer.ggml.pre")
    if name not in RULES:
        stated = f"pre-tokenizer {name!r} is not known" if name else "it does not name its pre-tokenizer"
        raise BadInput(
            f"{file.path}: {stated}; known are {', '.join(sorted(RULES))}",
            fix=GIVE_TOKENIZER,
        )
    return RULES[name]


def _byte_level(file: GgufFile, rules: Rules) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if "tokenizer.ggml.merges" not in file.metadata:
        raise BadInput(f"{file.path}: its tokenizer has no merges", fix=GIVE_TOKENIZER)
    # A merge is two tokens with a space between; a token of spaces would be spelled with other letters.
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata["tokenizer.ggml.merges"]]
    model = models.BPE(vocab=_vocabulary(file), merges=merges, ignore_merges=rules.ignore_merges)
    backend = Tokenizer(model)
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer_of_rules(rules)
    backend.decoder = decoders.ByteLevel()
    _add_whole_tokens(file, backend)
    return backend


def _vocabulary(file: GgufFile) -> dict[str, int]:
    """Token -> id, without the placeholders of ids that no token has: [PAD151646]."""
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    tokens = file.metadata["tokenizer.ggml.tokens"]
    placeholders = {i for i, kind in enumerate(types) if kind == UNUSED and tokens[i] == f"[PAD{i}]"}
    return {token: number for number, token in enumerate(tokens) if number not in placeholders}


def _add_whole_tokens(file: GgufFile, backend: Tokenizer) -> None:
    """Keep control and user-defined tokens whole wherever they stand in a text."""
    from tokenizers import AddedToken

    tokens, types = (file.metadata.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
    named = set(special_tokens(file).values())
    for token, kind in zip(tokens, types, strict=False):
        if kind == CONTROL or token in named:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])


def _sentencepiece(file: GgufFile) -> Tokenizer:
    """The tokenizer as transformers converts it, with the original's treatment of leading spaces.

    Raises BadInput if it splits a probe differently from llama.cpp.
    """
    from tokenizers import decoders, normalizers
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    try:
        architecture, fields, _ = get_gguf_tokenizer(str(file.path))
        backend, _ = convert_gguf_tokenizer(architecture, fields)
    except Exception as error:  # transformers raises exceptions of any type
        raise BadInput(f"{file.path}: its tokenizer cannot be converted: {error}", fix=GIVE_TOKENIZER) from error
    backend.post_processor = None
    # transformers' Metaspace joins the added space with one that a text begins with.
    adds_space = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend(SPACE)] if adds_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for text in PROBE:
        if "<" in text:  # may hold special tokens
            continue
        ids, expected = backend.encode(text).ids, sentencepiece_ids(file.metadata, text)
        if ids != expected:
            raise BadInput(
                f"{file.path}: transformers converts its tokenizer wrongly: {text!r} becomes {ids}, not {expected}",
                fix=GIVE_TOKENIZER,
            )
    return backend


def _add_at_the_ends(backend: Tokenizer, added: dict[str, str]) -> None:
    """Let the tokenizer add BOS or EOS. `added` has the tokens by "bos" and "eos"."""
    from tokenizers import processors

    if not added:
        return
    bos, eos = ([f"{added[name]}:{{}}"] if name in added else [] for name in ("bos", "eos"))
    single = [text.format(0) for text in (*bos, "$A:{}", *eos)]
    pair = single + [text.format(1) for text in (*bos, "$B:{}", *eos)]
    ids: list[tuple[str, Any]] = [(token, backend.token_to_id(token)) for token in dict.fromkeys(added.values())]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
