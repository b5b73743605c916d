"""Text chunks that two tokenizers share, and the teacher's log-probability of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.distill.data.blocks import make_blocks, train_tokenizer
from limbeck.distill.data.document import Document
from limbeck.distill.models import alignment
from limbeck.distill.models.alignment import TextSpan
from limbeck.distill.teacher import text_chunks as chunks
from limbeck.distill.teacher.text_chunks import SpanLogprobs
from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model
from tests.distill.conftest import lines_of_text
from tests.distill.tokenizer_kinds import TEXTS, UNICODE, make_tokenizers


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    return make_tokenizers(tokenizer_folder)


def shared_chunks(one: list[bytes], other: list[bytes]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The shared chunks by brute force: (first, last) tokens of both with the same bytes, as few as possible."""
    same = [
        (i, j) for i in range(len(one) + 1) for j in range(len(other) + 1) if b"".join(one[:i]) == b"".join(other[:j])
    ]
    return [((a, c), (b, d)) for (a, b), (c, d) in pairwise(same)]


@pytest.mark.parametrize("own", ["small", "bytes", "other merges"])
@pytest.mark.parametrize("other", ["small", "other merges", "bytes"])
@pytest.mark.parametrize("text", TEXTS[2:])
def test_chunks_equal_those_found_by_brute_force(tokenizers: dict[str, Any], own: str, other: str, text: str) -> None:
    pair = []
    for name in (own, other):
        texts = alignment.token_bytes(tokenizers[name])
        pair.append([texts[token] for token in tokenizers[name](text)["input_ids"]])
    mine, theirs = pair
    wanted = shared_chunks(mine, theirs)
    logprobs = np.random.default_rng(0).normal(-2, 1, len(theirs))
    ends = [np.cumsum([0, *map(len, tokens)]) for tokens in pair]  # the first token starts the text
    numbers, chunk_logprobs = chunks.align(ends[0], SpanLogprobs(ends[1], np.concatenate([[np.nan], logprobs])))
    assert numbers[0] == 0
    got = [np.flatnonzero(numbers[1:] == chunk) for chunk in range(1, numbers.max() + 1)]
    assert [(int(places[0]), int(places[-1]) + 1) for places in got] == [first for first, _ in wanted]
    np.testing.assert_allclose(chunk_logprobs, [logprobs[first:last].sum() for _, (first, last) in wanted])


def test_text_that_a_normalizer_changes_has_no_chunks(tokenizers: dict[str, Any], tiny_llama: Path) -> None:
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizers["small"].backend_tokenizer.to_str()), eos_token="<|endoftext|>"
    )
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    read = chunks.local_reader(AutoModelForCausalLM.from_pretrained(tiny_llama), lower, bf16=False)
    changed, unchanged = read([TextSpan("Upper case", 0, True, True), TextSpan("lower case", 0, True, True)])
    assert len(changed.ends) == 0
    assert unchanged.ends[-1] == len("lower case") + 1
    numbers, logprobs = chunks.align(np.arange(12), changed)
    assert not numbers.any()
    assert len(logprobs) == 0


def blocks_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    documents = [Document(str(seed), lines_of_text(6, seed) + UNICODE) for seed in range(4)]
    return make_blocks(documents, tokenizer, 48)


@pytest.mark.parametrize("teachers", ["other merges", "sentencepiece"])
@pytest.mark.parametrize("own", ["small", "bytes"])
def test_stored_logprobs_equal_those_of_the_teacher(
    tokenizers: dict[str, Any], own: str, teachers: str, tmp_path: Path
) -> None:
    tokenizer, theirs = tokenizers[own], tokenizers[teachers]
    theirs.save_pretrained(tmp_path / "tokenizer")
    sizes = {"vocab_size": len(theirs), "max_position_embeddings": 512}
    folder = make_model(tmp_path / "teacher", tmp_path / "tokenizer", "llama", **sizes)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    blocks = blocks_of(tokenizer)
    stored = chunks.capture(blocks, tokenizer, chunks.local_reader(teacher, theirs, bf16=False))(
        np.arange(len(blocks.ids))
    )
    texts = alignment.token_bytes(theirs)
    start = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.eos_token_id
    checked = 0
    for row in range(len(blocks.ids)):
        for segment in range(1, blocks.segments[row].max() + 1):
            places = np.flatnonzero(blocks.segments[row] == segment)
            own_bytes = [alignment.token_bytes(tokenizer)[token] for token in blocks.ids[row, places]]
            raw = b"".join(own_bytes)
            text = raw.decode("utf-8", "ignore")
            missing = raw.index(text.encode()) if text else 0
            ids = [start, *theirs(text, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                logprobs = teacher(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            token_logprobs = [0.0] + [float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids))]
            ends = np.cumsum([len(texts[token]) for token in ids]) + missing
            if teachers == "sentencepiece":
                ends[1:] -= 1
            for chunk in np.unique(stored["chunks"][row, places]):
                at = np.flatnonzero(stored["chunks"][row] == chunk)
                at = at[(at >= places[0]) & (at <= places[-1])]
                if chunk == 0 or not len(at) or blocks.ids[row, at[-1] + 1] == tokenizer.eos_token_id:
                    continue
                first = len(b"".join(own_bytes[: at[0] + 1 - places[0]]))
                last = len(b"".join(own_bytes[: at[-1] + 2 - places[0]]))
                # SentencePiece's space before a text is a token without bytes, and belongs to the next chunk.
                within = [
                    token_logprobs[n]
                    for n in range(1, len(ids))
                    if first < ends[n] <= last or (n == 1 and ends[n] == first == missing)
                ]
                got = stored["logprobs"][row, at]
                assert not got[:-1].any()
                assert float(got[-1]) == pytest.approx(sum(within), rel=2e-3, abs=2e-3)
                checked += 1
    assert checked > 100


def test_equal_tokenizers_make_each_token_a_chunk(tiny_llama: Path, tokenizers: dict[str, Any]) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    blocks = blocks_of(tokenizers["small"])
    # The reader reads a document that a block's edge cuts as if it began there: compare whole documents only.
    reader = chunks.local_reader(teacher, tokenizers["small"], bf16=False)
    stored = chunks.capture(blocks, tokenizers["small"], reader)(np.arange(len(blocks.ids)))
    batch = blocks.batch(np.arange(len(blocks.ids)))
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = teacher(**batch, use_cache=False).logits[:, :-1].double()
    expected = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").numpy()
    whole = np.zeros(labels.shape, dtype=bool)
    for row, segments in enumerate(blocks.segments):
        for segment in np.unique(segments):
            places = np.flatnonzero(segments == segment)
            if blocks.ids[row, places[0]] == 0:  # the document begins here
                whole[row, places[:-1]] = True
    whole &= (labels != -100).numpy()
    assert whole.sum() > 100
    compared = whole & (stored["chunks"][:, :-1] > 0)
    assert compared.sum() > 0.95 * whole.sum()  # all but characters that an edge cuts
    np.testing.assert_allclose(stored["logprobs"][:, :-1][compared], expected[compared], rtol=2e-3, atol=2e-3)
    for row in range(len(labels)):
        numbers = stored["chunks"][row][stored["chunks"][row] > 0]
        assert list(numbers) == list(range(1, len(numbers) + 1))


CHUNKS = '[objectives.across]\ndivergence = "chunks"\n'


def test_a_student_with_its_own_tokenizer(
    store: Store, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path, tiny_gpt2: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=CHUNKS, extra="[tokenizer]\nvocab_size = 270\n")
    sets = ["--set", "training.max_steps=40", "--set", "training.eval_steps=100"]
    result = limbeck("distill", recipe, *sets)
    assert result.code == 0, result.err
    assert "teacher cache: chunks" in result.err
    student = store.get("tiny/2")
    tokenizer = AutoTokenizer.from_pretrained(store.artifacts.verified_folder(student))
    assert len(tokenizer) == 270
    assert AutoModelForCausalLM.from_pretrained(store.artifacts.verified_folder(student)).config.vocab_size == 270
    assert student.parent == "tiny/1"
    losses = [metric.value for metric in store.client.get_metric_history(student.run_id, "loss")]
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    # Another student does not run the teacher again.
    again = limbeck("distill", recipe, *sets, "--set", "training.max_steps=1")
    assert again.code == 0, again.err
    assert " 0 of them captured now" in again.err


def test_a_pretrained_student_keeps_its_tokenizer(
    store: Store, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    train_tokenizer([Document("", lines_of_text(100))], 280, 64).save_pretrained(tmp_path / "own")
    make_model(tmp_path / "student", tmp_path / "own", "llama", num_hidden_layers=1)
    recipe = write_recipe(tiny_llama, objectives=CHUNKS)
    text = recipe.read_text()
    before, _, rest = text.partition("[students.small.config]")
    recipe.write_text(f'{before}[students.small]\nmodel = "student"\n\n[objectives{rest.partition("[objectives")[2]}')
    result = limbeck("distill", recipe, "--set", "data.max_tokens=2048")
    assert result.code == 0, result.err
    assert len(AutoTokenizer.from_pretrained(store.artifacts.verified_folder(store.get("tiny/2")))) == 280
    # No other divergence can compare it with this teacher.
    refused = limbeck("distill", recipe, "--set", 'objectives.across.divergence="forward_kl"')
    assert refused.code == 2
    assert 'set teacher.retokenize = true, or divergence = "chunks"' in refused.err


@pytest.mark.parametrize(
    ("objectives", "extra", "message"),
    [
        (CHUNKS + '[objectives.b]\ndivergence = "forward_kl"\n', "", "put it in a recipe of its own"),
        ('[objectives.a]\ndivergence = "forward_kl"\n', "[tokenizer]\nvocab_size = 300\n", "across tokenizers"),
    ],
)
def test_recipes_that_mix_tokenizers_are_refused(
    store: Store,
    limbeck: Callable[..., Any],
    write_recipe: Callable[..., Path],
    tiny_llama: Path,
    objectives: str,
    extra: str,
    message: str,
) -> None:
    result = limbeck("distill", write_recipe(tiny_llama, objectives=objectives, extra=extra))
    assert result.code == 2
    assert message in result.err
