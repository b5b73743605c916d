"""Tokenizers whose class in transformers builds other rules than tokenizer.json has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from limbeck.registry.checkpoints.checked import checked_facts
from limbeck.registry.checkpoints.load import load_tokenizer
from limbeck.registry.checkpoints.tokenizers import EQUAL, NO_FILE
from limbeck.registry.core.errors import BadInput

TEXT = ["In 2024 and 1234567890, 42 people said: don't we've 12 34 56", "def f(x):\n    return x**2 + 10"] * 10
HARD = ("  in 2024,  12345\n\n3.14 ", "<|im_start|>user\nHi 10<|im_end|> <|im_end|>x", "Ünïcode 你好 🙂 é")
END = "<|endoftext|>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def byte_level(digits: bool) -> Tokenizer:
    """A byte-level BPE whose merges span digits; with `digits`, its pre-tokenizer splits them, as in SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if digits:
        rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A BPE with Llama 2's rules: a normalizer puts a space before the text and replaces spaces; adds BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, model_type: str = "llama", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


SMOLLM2 = dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=False, bos_token="<|im_start|>",
               eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token=END,
               additional_special_tokens=["<|im_start|>", "<|im_end|>"],
               chat_template=TEMPLATE, clean_up_tokenization_spaces=True, model_max_length=8192)  # fmt: skip
LLAMA2 = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, bos_token="<s>",
              eos_token="</s>", unk_token="<unk>", legacy=False, padding_side="left")  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        (byte_level(digits=True), SMOLLM2),
        (byte_level(digits=True), SMOLLM2 | dict(add_prefix_space=None)),  # GPT2Tokenizer raises TypeError
        (byte_level(digits=False), SMOLLM2 | dict(add_prefix_space=True)),
        (byte_level(digits=False), SMOLLM2 | dict(tokenizer_class="Qwen2Tokenizer")),
        (byte_level(digits=False), SMOLLM2 | dict(tokenizer_class="GPTNeoXTokenizerFast")),
        (byte_level(digits=True), SMOLLM2 | dict(tokenizer_class="PreTrainedTokenizerFast")),
        (byte_level(digits=True), SMOLLM2 | dict(tokenizer_class="TokenizersBackend")),
        (byte_level(digits=True), SMOLLM2 | dict(tokenizer_class="NobodysTokenizer")),
        (sentencepiece(), LLAMA2),
        (sentencepiece(), LLAMA2 | dict(tokenizer_class="LlamaTokenizerFast", add_bos_token=False)),
    ],
    ids=lambda value: value.get("tokenizer_class") if isinstance(value, dict) else "",
)
def test_the_ids_are_those_of_tokenizer_json(tokenizer: Tokenizer, config: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "first", tokenizer, **config)
    loaded = load_tokenizer(folder)
    assert checked_facts(folder).tokenizer.startswith(EQUAL)
    loaded.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    artifact = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    for text in HARD:
        for special in (True, False):
            expected = tokenizer.encode(text, add_special_tokens=special).ids
            assert loaded(text, add_special_tokens=special).input_ids == expected
            assert again(text, add_special_tokens=special).input_ids == expected
            assert artifact.encode(text, add_special_tokens=special).ids == expected
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "padding_side"):
        assert getattr(loaded, name) == getattr(again, name) == config.get(name, getattr(loaded, name))


def test_the_probe_finds_digits_that_transformers_does_not_split(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path, byte_level(digits=True), **SMOLLM2)
    misread = AutoTokenizer.from_pretrained(folder)
    assert misread("In 2024").input_ids != byte_level(digits=True).encode("In 2024").ids
    assert load_tokenizer(folder)("In 2024").input_ids == byte_level(digits=True).encode("In 2024").ids
    assert checked_facts(folder).tokenizer == f"{EQUAL}, loaded as it is since GPT2Tokenizer has other rules"


def test_settings_survive_that_the_file_is_loaded_as_it_is(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "smol", byte_level(digits=True), **SMOLLM2))
    assert tokenizer.clean_up_tokenization_spaces
    assert tokenizer.model_max_length == 8192
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<|im_start|>a<|im_end|>"
    )
    assert tokenizer.decode(tokenizer("a<|im_end|>b").input_ids, skip_special_tokens=True) == "ab"
    llama = load_tokenizer(write(tmp_path / "llama", sentencepiece(), **LLAMA2))
    assert (llama.init_kwargs["legacy"], llama.padding_side) == (False, "left")


def test_special_tokens_that_only_the_class_has_survive(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, byte_level(digits=True), tokenizer_class="GPT2Tokenizer"))
    assert checked_facts(tmp_path).tokenizer.endswith("GPT2Tokenizer has other rules")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == (END, END, 0)


def test_templates_in_files_of_their_own_survive(tmp_path: Path) -> None:
    config = {name: value for name, value in SMOLLM2.items() if name != "chat_template"}
    folder = write(tmp_path, byte_level(digits=True), **config)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    assert load_tokenizer(folder).chat_template == {"default": TEMPLATE, "tools": "tools"}


def test_a_limit_in_tokenizer_json_does_not_cut_prompts(tmp_path: Path) -> None:
    cut = byte_level(digits=True)
    cut.enable_truncation(4)
    cut.enable_padding(length=8)
    tokenizer = load_tokenizer(write(tmp_path / "cut", cut, **SMOLLM2 | dict(tokenizer_class="TokenizersBackend")))
    tokenizer.save_pretrained(tmp_path / "artifact")
    artifact = Tokenizer.from_file(str(tmp_path / "artifact" / "tokenizer.json"))
    for text in ("a", "a b c d e f"):
        assert artifact.encode(text).ids == byte_level(digits=True).encode(text).ids


def test_files_that_contradict_each_other_are_refused_with_both_ids(tmp_path: Path) -> None:
    strip = dict(content=END, lstrip=True, rstrip=True, normalized=False, single_word=False, special=True)
    folder = write(tmp_path, byte_level(digits=True), **SMOLLM2 | dict(added_tokens_decoder={"0": strip}))
    with pytest.raises(BadInput, match=r"splits '.*' into \[.*\], tokenizer.json into \[.*\]"):
        load_tokenizer(folder)


def test_a_tokenizer_without_tokenizer_json_is_not_checked(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(digits=False), "gpt2", tokenizer_class="GPT2Tokenizer")
    byte_level(digits=False).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder)("a").input_ids
    assert checked_facts(folder).tokenizer == NO_FILE


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadInput, match="has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
