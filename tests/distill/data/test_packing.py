"""Packing: a document's loss does not depend on its neighbours, and every document is in one block."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from limbeck.distill.data.blocks import Blocks, make_blocks
from limbeck.distill.data.document import Document
from limbeck.distill.data.packing import first_fit, separates_documents
from limbeck.distill.models.loading import logits_of
from limbeck.registry.core.errors import BadInput
from tests.conftest import SIZES, make_model
from tests.distill.conftest import lines_of_text

SEPARATING = ["llama", "qwen2", "gpt2", "gpt_neox", "mistral", "gemma2"]
# Short and long; the last is longer than mistral's window.
TEXTS = ["drops of spirit", "class Vessel:\n    pass\n", "def add(a, b):\n    return a + b\n" * 2]


def whole_documents(*texts: str) -> list[Document]:
    """Documents that stay whole: a prompt of one character, and the rest as its completion."""
    return [Document(str(number), text, prompt=text[0]) for number, text in enumerate(texts)]


def losses_of_documents(model: PreTrainedModel, blocks: Blocks) -> dict[bytes, tuple[float, torch.Tensor]]:
    """The loss in nats and the gradient for each document, by its tokens."""
    batch = blocks.batch(np.arange(len(blocks.ids)))
    found = {}
    for row, segments in enumerate(blocks.segments):
        for segment in range(1, segments.max() + 1):
            model.zero_grad()
            labels = batch["labels"].masked_fill(torch.from_numpy(blocks.segments != segment), -100)
            logits = logits_of(model, batch)
            nats = F.cross_entropy(logits[row, :-1], labels[row, 1:], reduction="sum")
            nats.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found[blocks.ids[row][segments == segment].tobytes()] = (nats.item(), gradient)
    return found


@pytest.mark.parametrize("model_type", [*SEPARATING, "bloom", "mamba", "qwen3_5_text"])
def test_a_documents_loss_does_not_depend_on_its_neighbours(
    tmp_path: Path, tokenizer_folder: Path, model_type: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, tokenizer_folder, model_type))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    separates = separates_documents(model.config)
    assert separates == (model_type in SEPARATING)

    packed = make_blocks(whole_documents(*TEXTS), tokenizer, 96, one_document_per_block=not separates)
    other = make_blocks(whole_documents(TEXTS[2], TEXTS[0]), tokenizer, 96, one_document_per_block=not separates)
    single = [make_blocks(whole_documents(text), tokenizer, 96) for text in TEXTS]
    assert len(packed.ids) == (1 if separates else 3)
    found, again = losses_of_documents(model, packed), losses_of_documents(model, other)
    for blocks in single:
        ((tokens, (nats, gradient)),) = losses_of_documents(model, blocks).items()
        for each in (found, again):
            if tokens in each:
                assert each[tokens][0] == pytest.approx(nats, rel=1e-5)
                torch.testing.assert_close(each[tokens][1], gradient, rtol=1e-3, atol=1e-4 * float(gradient.max()))
    assert len(found) == 3


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "qwen3_5_text"])
def test_models_that_get_one_document_per_block_need_it(
    tmp_path: Path, tokenizer_folder: Path, model_type: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, tokenizer_folder, model_type))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    packed = losses_of_documents(model, make_blocks(whole_documents(*TEXTS), tokenizer, 96))
    alone = losses_of_documents(model, make_blocks(whole_documents(*TEXTS), tokenizer, 96, one_document_per_block=True))
    assert any(abs(packed[tokens][0] - nats) > 1e-4 * nats for tokens, (nats, _) in alone.items())


def test_the_probe_has_no_side_effects_and_distrusts_models_it_cannot_make() -> None:
    config = AutoConfig.for_model("llama", vocab_size=300, **SIZES["llama"])
    before, state = config.to_dict(), torch.get_rng_state()
    assert separates_documents(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not separates_documents(AutoConfig.for_model("t5"))


def test_a_recurrence_in_a_later_layer_is_found() -> None:
    layers = dict(num_hidden_layers=3, layer_types=["full_attention", "full_attention", "conv"])
    assert not separates_documents(AutoConfig.for_model("lfm2", vocab_size=300, **SIZES["lfm2"] | layers))


def test_texts_with_one_document_per_block(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = [Document(str(n), lines_of_text(n + 1, seed=n)) for n in range(5)]
    blocks = make_blocks(documents, tokenizer, 16, one_document_per_block=True)
    assert blocks.segments.max() == 1
    assert "position_ids" not in blocks.batch(np.arange(3))
    end = tokenizer.eos_token_id
    expected = []
    for document in documents:
        ids = [end, *tokenizer(document.text)["input_ids"], end]
        expected += [ids[first : first + 16] for first in range(0, len(ids), 16) if len(ids) - first > 1]
    rows = [row[segments > 0].tolist() for row, segments in zip(blocks.ids, blocks.segments, strict=True)]
    assert rows == expected
    assert blocks.text_bytes == pytest.approx(sum(len(d.text.encode()) for d in documents), abs=len(rows))
    assert blocks.text_tokens == (blocks.segments > 0).sum() - len(documents)
    assert blocks.targets.sum() == (blocks.segments > 0).sum() - len(rows)


def test_first_fit_matches_a_simple_implementation() -> None:
    chance = random.Random(0)
    lengths = [chance.randint(1, 40) for _ in range(400)]
    expected: list[list[int]] = []
    for number, length in enumerate(lengths):
        room = [40 - sum(lengths[each] for each in block) for block in expected]
        place = next((place for place, left in enumerate(room) if left >= length), None)
        if place is None:
            expected.append([number])
        else:
            expected[place].append(number)
    assert first_fit(lengths, 40) == expected
    many = first_fit([25] * 1000, 40)  # more blocks than MAX_OPEN_BLOCKS
    assert sorted(itertools.chain(*many)) == list(range(1000))
    assert first_fit([], 40) == []


def test_prompts_with_completions_stay_whole(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = [lines_of_text(1 + n % 5, seed=n) for n in range(40)]
    documents = [Document(str(n), text, prompt=text[:7]) for n, text in enumerate(texts)]
    blocks = make_blocks(documents, tokenizer, 64)
    end = tokenizer.eos_token_id
    pieces = [[end, *tokenizer(t[:7])["input_ids"], *tokenizer(t[7:])["input_ids"], end] for t in texts]
    fitting = [piece for piece in pieces if len(piece) <= 64]
    assert 0 < blocks.too_long == len(pieces) - len(fitting)
    laid_out = [
        ids[segments == n].tolist()
        for ids, segments in zip(blocks.ids, blocks.segments, strict=True)
        for n in range(1, segments.max() + 1)
    ]
    assert sorted(laid_out) == sorted(fitting)
    assert (blocks.segments == 0).any()
    assert not blocks.targets[blocks.segments == 0].any()
    batch = blocks.batch(np.arange(len(blocks.ids)))
    assert (batch["labels"][torch.from_numpy(blocks.segments == 0)] == -100).all()
    kept = [text for text, piece in zip(texts, pieces, strict=True) if len(piece) <= 64]
    assert blocks.text_bytes == sum(len(text[7:].encode()) for text in kept)
    assert blocks.text_tokens == blocks.targets.sum()


def test_max_tokens_takes_the_first_whole_documents(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = whole_documents(*(lines_of_text(1, seed=n) for n in range(40)))
    whole = make_blocks(documents, tokenizer, 64)
    fewer = make_blocks(iter(documents), tokenizer, 64, max_tokens=200)
    used = int((fewer.segments > 0).sum())
    assert 150 < used <= 200
    assert (fewer.ids[0] == whole.ids[0]).all()
    assert fewer.digest != whole.digest


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "there is no document"),
        ([Document("a", "short")], {}, "do not fill one block of 64"),
        (whole_documents("long " * 100, "longer " * 100), {}, "all 2 documents are longer than 64 tokens"),
        (whole_documents("drops of spirit"), {"max_tokens": 8}, "data.max_tokens 8 is less than the first document"),
        ([Document("q.jsonl:3", "prompt", prompt="prompt")], {}, "q.jsonl:3: there is no answer to learn"),
    ],
)
def test_unusable_documents_are_an_error(
    tokenizer_folder: Path, documents: list[Document], options: dict[str, int], message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with pytest.raises(BadInput, match=message):
        make_blocks(documents, tokenizer, 64, **options)
