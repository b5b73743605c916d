"""The GGUF file and the checkpoints that transformers 4 and 5 write of it are one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.checkpoints.load import load_model, load_tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "In 1969 it cost $3,141.59, about 27% of what 12 of them cost.",
    "  def add(a, b):\n\t\treturn a + b\n\n\n",
    "na\u00efve caf\u00e9 \u2603 \U0001f600 \u0928\u092e\u0938\u094d\u0924\u0947 \u65e5\u672c\u8a9e",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="session")
def loaded_folders(gguf: Path, smollm2: Path, smollm2_v4: Path) -> dict[str, Path]:
    """Form -> the folder that Limbeck loads."""
    forms = {"gguf": gguf, "transformers 4": smollm2_v4, "transformers 5": smollm2}
    return {form: resolve_model(str(path)).path for form, path in forms.items()}


def test_all_forms_have_the_same_logits(loaded_folders: dict[str, Path], smollm2: Path) -> None:
    ids = [torch.tensor([load_tokenizer(smollm2)(text)["input_ids"]]) for text in TEXTS]
    logits = {}
    for form, folder in loaded_folders.items():
        model = load_model(folder)
        with torch.inference_mode():
            logits[form] = torch.cat([model(row).logits[0] for row in ids])
    assert torch.equal(logits["gguf"], logits["transformers 5"])
    assert torch.equal(logits["transformers 4"], logits["transformers 5"])


def test_all_forms_have_the_same_tokens(loaded_folders: dict[str, Path], smollm2: Path, paragraphs: list[str]) -> None:
    """The reference is tokenizer.json itself, read by the tokenizers library."""
    texts = TEXTS + paragraphs
    raw = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    expected = [encoding.ids for encoding in raw.encode_batch(texts)]
    for form, folder in loaded_folders.items():
        found = load_tokenizer(folder)(texts)["input_ids"]
        different = [text for text, ids, wanted in zip(texts, found, expected, strict=True) if ids != wanted]
        assert not different, (form, different[:3])


def test_all_forms_end_a_turn_alike(loaded_folders: dict[str, Path]) -> None:
    for form, folder in loaded_folders.items():
        tokenizer, model = load_tokenizer(folder), load_model(folder)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        text = tokenizer.decode(answer[0, ids.shape[1] :])
        assert text == "The capital of France is Paris.<|im_end|>", form
