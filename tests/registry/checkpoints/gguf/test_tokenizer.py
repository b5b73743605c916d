"""A tokenizer rebuilt from a GGUF file gives the ids of the tokenizer that was written into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from limbeck.registry.checkpoints.gguf.file import GgufFile, Metadata, read_gguf
from limbeck.registry.checkpoints.gguf.pre_tokenizers import RULES, pre_tokenizer_of_rules
from limbeck.registry.checkpoints.gguf.tokenizer import ids_that_end_text, tokenizer_of_gguf
from limbeck.registry.checkpoints.tokenizers import PROBE
from limbeck.registry.core.errors import BadInput
from tests.registry.checkpoints.gguf.gguf_files import CONTROL, NORMAL, UNUSED, USER_DEFINED, write_tokenizer
from tests.registry.checkpoints.gguf.test_sentencepiece import METADATA

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def trained(name: str) -> Tokenizer:
    """A byte-level BPE tokenizer with the rules of a pre-tokenizer's name, put together without a GGUF file."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=RULES[name].ignore_merges))
    if RULES[name].nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer_of_rules(RULES[name])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PROBE * 3, trainer)
    return tokenizer


def written(tokenizer: Tokenizer, name: str, **changes: Any) -> dict[str, Any]:
    """The metadata of a tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = [CONTROL if token in SPECIAL else NORMAL for token in vocabulary]
    merges = [" ".join(merge) for merge in model["merges"]]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
    return {"model": "gpt2", "pre": name, "tokens": vocabulary, "token_type": types, "merges": merges} | ids | changes


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "deepseek-llm", "tekken", "falcon"])
def test_a_byte_level_vocabulary(name: str, tmp_path: Path) -> None:
    original = trained(name)
    file = write_tokenizer(tmp_path / "t.gguf", **written(original, name, add_bos_token=False))
    rebuilt = tokenizer_of_gguf(read_gguf(file))
    for text in (*PROBE, "<|im_start|>user\n12<|im_end|> <|im_end|>"):
        assert rebuilt(text).input_ids == original.encode(text).ids, text
        assert rebuilt.decode(rebuilt(text).input_ids) == original.decode(
            original.encode(text).ids, skip_special_tokens=False
        )


def test_special_tokens_and_template(tmp_path: Path) -> None:
    original = trained("smollm")
    tokens = written(original, "smollm")
    size = len(tokens["tokens"])
    tokens["tokens"] = [*tokens["tokens"], "<think>", f"[PAD{size + 1}]"]
    tokens["token_type"] = [*tokens["token_type"], USER_DEFINED, UNUSED]
    file = write_tokenizer(tmp_path / "t.gguf", **tokens, add_bos_token=True, add_eos_token=True)
    tokenizer = tokenizer_of_gguf(read_gguf(file))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|im_start|>", "<|im_end|>", SPECIAL[0])
    assert tokenizer.pad_token == "<|im_end|>"
    ids = tokenizer("a <think>").input_ids
    assert (ids[0], ids[-2:]) == (1, [size, 2])
    assert tokenizer("a <think>", add_special_tokens=False).input_ids == ids[1:-1]
    assert len(tokenizer) == size + 1  # no placeholder
    assert "<think>" in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("name", "adds_bos"), [("llama-bpe", True), ("smollm", False)])
def test_a_file_that_does_not_say_whether_it_adds_bos(name: str, adds_bos: bool, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "t.gguf", **written(trained(name), name))
    assert (tokenizer_of_gguf(read_gguf(file))("a").input_ids[0] == 1) == adds_bos


def test_tokens_that_end_a_text() -> None:
    tokens = {"tokens": ["<eos>", "<|im_end|>", "<|eot_id|>", "a"], "token_type": [3, 3, 3, 1], "eos_token_id": 0}
    assert ids_of(tokens) == [0]
    assert ids_of(tokens | {"eot_token_id": 2}) == [0, 2]
    assert ids_of(tokens, TEMPLATE) == [0, 1]  # by its text, since the template ends turns with it


def ids_of(tokens: dict[str, Any], template: str | None = None) -> list[int]:
    values = {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
    if template:
        values["tokenizer.chat_template"] = template
    return ids_that_end_text(GgufFile(Path("x.gguf"), Metadata(values), {}))


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    tokens = {key.removeprefix("tokenizer.ggml."): value for key, value in METADATA.items()}
    types = [2, CONTROL, CONTROL, *[6] * 256, *[NORMAL] * (len(tokens["tokens"]) - 259)]
    file = write_tokenizer(tmp_path / "t.gguf", model="llama", token_type=types, **tokens)
    tokenizer = tokenizer_of_gguf(read_gguf(file))
    assert tokenizer.convert_ids_to_tokens(tokenizer(" abc").input_ids) == ["<s>", "\u2581", "\u2581a", "bc"]
    assert tokenizer.decode(tokenizer(" ab\u00e9").input_ids, skip_special_tokens=True) == " ab\u00e9"
    wrong = write_tokenizer(tmp_path / "w.gguf", model="llama", merges=["a b"], token_type=types, **tokens)
    with pytest.raises(BadInput, match=r"converts its tokenizer wrongly: .*\n.*tokenizer\.json of the original"):
        tokenizer_of_gguf(read_gguf(wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer 'bert' is not supported, only gpt2 and llama"),
        ({"pre": "hunyuan"}, "pre-tokenizer 'hunyuan' is not known; known are command-r, "),
        ({"pre": "default"}, "pre-tokenizer 'default' is not known"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "t.gguf", **written(trained("gpt-2"), "gpt-2", **changes))
    with pytest.raises(BadInput, match=message):
        tokenizer_of_gguf(read_gguf(file))
