"""Retokenized distributions equal those worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.data.blocks import Blocks, make_blocks, train_tokenizer
from limbeck.distill.data.document import Document
from limbeck.distill.models.alignment import TextSpan, document_spans, token_bytes, tokenize_spans
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.teacher import retokenize
from limbeck.distill.teacher.retokenize import MIN_MAPPED_SHARE, SMOOTHING, Retokenizer
from limbeck.registry.mlflow.store import Store
from tests.conftest import TEXT, make_model
from tests.distill.conftest import DISTILLED, lines_of_text

UNICODE = "na\u00efve \u65e5\u672c\u8a9e caf\u00e9 \U0001f9ea\n"


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    """Byte-level tokenizers: with few merges, with many merges from other text, and without merges."""
    return {
        "few": AutoTokenizer.from_pretrained(tokenizer_folder),
        "many": train_tokenizer([Document("", "".join(TEXT * 2) + lines_of_text(80, 9))], 420, 10_000),
        "bytes": train_tokenizer([Document("", "a")], 257, 10_000),
    }


def spell_all(teacher: Any, student: Any) -> list[list[int]]:
    """The student tokens that spell each teacher token."""
    student_bytes = token_bytes(student)
    spellings = [spell(raw, student, student_bytes) for raw in token_bytes(teacher)]
    spellings[teacher.eos_token_id] = [student.eos_token_id]
    return spellings


def spell(raw: bytes, student: Any, student_bytes: list[bytes]) -> list[int]:
    """The student tokens of the same bytes; empty if there are no bytes."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:  # half of a character
        if raw in student_bytes:
            return [student_bytes.index(raw)]
        return [student_bytes.index(bytes([byte])) for byte in raw]
    return student(text)["input_ids"] if text else []


def prefixes(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """The bytes up to the end of each token."""
    texts = token_bytes(tokenizer)
    return [b"".join(texts[token] for token in ids[: count + 1]) for count in range(len(ids))]


def continue_spellings(probs: np.ndarray, spellings: list[list[int]], since: list[int]) -> dict[int, float] | None:
    """The probability of each student token after the tokens `since` a shared end; None if too little is mapped."""
    row: dict[int, float] = {}
    for token, spelling in enumerate(spellings):
        if len(spelling) > len(since) and spelling[: len(since)] == since:
            row[spelling[len(since)]] = row.get(spelling[len(since)], 0.0) + probs[token]
    ending = sum(probs[token] for token, spelling in enumerate(spellings) if since and spelling == since)
    mapped = sum(row.values())
    return row if row and mapped >= MIN_MAPPED_SHARE * (mapped + ending if since else 1.0) else None


def by_hand(
    probs: np.ndarray, teacher: Any, student: Any, teacher_ids: list[int], student_ids: list[int]
) -> list[dict[int, float] | None]:
    """The next-token probabilities after each student token but the last; None if too little can be mapped."""
    spellings = spell_all(teacher, student)
    teacher_ends, student_ends = prefixes(teacher, teacher_ids), prefixes(student, student_ids)
    rows: list[dict[int, float] | None] = []
    for now in range(len(student_ids) - 1):
        shared = next(n for n in range(now, -1, -1) if student_ends[n] in teacher_ends)
        predicted = probs[teacher_ends.index(student_ends[shared])]
        row = continue_spellings(predicted, spellings, student_ids[shared + 1 : now + 1])
        rows.append(row)
        if row is None:
            continue
        mapped = sum(row.values())
        if shared == now:  # the teacher may need several tokens for the text's own next token
            first = teacher_ends.index(student_ends[now]) + 1
            following = (n for n in range(first, len(teacher_ids)) if teacher_ends[n].startswith(student_ends[now + 1]))
            last = next(following, 0)
            spelling = spellings[teacher_ids[first]] if last > first else []
            if spelling and spelling[0] != student_ids[now + 1]:
                product = np.prod([probs[n - 1][teacher_ids[n]] for n in range(first, last + 1)])
                moved = min(product, row[spelling[0]])
                row[spelling[0]] -= moved
                row[student_ids[now + 1]] = row.get(student_ids[now + 1], 0.0) + moved
        rows[-1] = {token: value / mapped for token, value in row.items()}
    return rows


@pytest.mark.parametrize(("theirs", "own"), [("many", "few"), ("few", "many"), ("many", "bytes"), ("few", "bytes")])
@pytest.mark.parametrize("text", [TEXT[1], UNICODE, lines_of_text(5, 2)])
def test_retokenized_spans_equal_those_by_hand(tokenizers: dict[str, Any], theirs: str, own: str, text: str) -> None:
    teacher, student = tokenizers[theirs], tokenizers[own]
    retokenizer = Retokenizer(teacher, student)
    [span] = tokenize_spans([TextSpan(text, 0, True, False)], teacher, retokenizer.teacher_bytes)
    student_ids = [student.eos_token_id, *student(text)["input_ids"]]
    logits = torch.randn(len(span.ids), len(teacher), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[torch.arange(len(logits) - 1), torch.from_numpy(span.ids[1:])] += 5.0  # the text itself is likely
    ends = np.cumsum([len(retokenizer.student_bytes[token]) for token in student_ids])
    got = retokenizer.span_probs(logits, span, np.array(student_ids), ends)
    wanted = by_hand(logits.softmax(-1).numpy(), teacher, student, span.ids.tolist(), student_ids)
    assert sum(row is not None for row in wanted) > 0.6 * len(wanted)
    for row, chances in zip(got, wanted, strict=True):
        dense = torch.zeros(len(student), dtype=torch.float64)
        for token, value in (chances or {}).items():
            dense[token] = value
        torch.testing.assert_close(row, dense, rtol=1e-6, atol=1e-9)


def test_equal_tokenizers_change_nothing(tokenizers: dict[str, Any]) -> None:
    same = tokenizers["few"]
    retokenizer = Retokenizer(same, same)
    [span] = tokenize_spans([TextSpan(TEXT[0], 0, True, True)], same, retokenizer.teacher_bytes)
    logits = torch.randn(len(span.ids), len(same), generator=torch.Generator().manual_seed(1))
    got = retokenizer.span_probs(logits, span, span.ids, span.ends)
    torch.testing.assert_close(got, logits[:-1].softmax(-1))


@pytest.mark.parametrize(("ending", "is_mapped"), [(0.9, False), (0.1, True)])
def test_nothing_is_mapped_inside_a_token_that_has_likely_ended(
    tokenizers: dict[str, Any], ending: float, is_mapped: bool
) -> None:
    retokenizer = Retokenizer(tokenizers["many"], tokenizers["bytes"])
    prefix = next(spelling for spelling in retokenizer.continuations if len(retokenizer.ends[spelling]) == 1)
    [[longer, *_], _] = retokenizer.continuations[prefix].tolist()
    probs = torch.zeros(len(retokenizer.spellings))
    probs[retokenizer.ends[prefix]], probs[longer] = ending, 1 - ending
    row = retokenizer.probs_inside_token(probs, prefix)
    assert (row is not None) == is_mapped
    if row is not None:
        assert row.argmax() == retokenizer.spellings[longer][len(prefix)]
        assert row.sum() == 1
    assert retokenizer.probs_inside_token(probs, (-1,)) is None


def make_test_blocks(tokenizer: PreTrainedTokenizerBase) -> Blocks:
    documents = [Document(str(seed), lines_of_text(6, seed) + UNICODE) for seed in range(3)]
    return make_blocks(documents, tokenizer, 40)


def stored_probs(
    model: Any, theirs: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, blocks: Blocks, folder: Path
) -> np.ndarray:
    """The stored probabilities of the blocks, (N, T, V)."""
    cache = TeacherCache({"test": str(folder)}, blocks.ids.shape, Form("topk", len(own), len(own)))
    run = retokenize.retokenized_pass(model, theirs, blocks, own, bf16=False)
    [arrays] = run(np.arange(len(blocks.ids)), [cache])
    probs = np.zeros((*blocks.ids.shape, len(own)))
    np.put_along_axis(probs, arrays["ids"].astype(int), np.exp(arrays["logprobs"].astype(float)), axis=-1)
    return probs


def test_stored_probabilities_equal_those_by_hand(
    tokenizers: dict[str, Any], tmp_path: Path, limbeck_home: Path, tokenizer_folder: Path
) -> None:
    theirs, own = tokenizers["many"], tokenizers["few"]
    theirs.save_pretrained(tmp_path / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "teacher", tmp_path / "tokenizer", "llama"))
    blocks = make_test_blocks(own)
    got = stored_probs(model, theirs, own, blocks, tmp_path)
    texts, checked = token_bytes(own), 0
    for number in (0, 1):
        for places, _, span in document_spans(blocks, number, own, texts):
            if span.skipped or not span.begins:
                continue
            teacher_ids = [theirs.eos_token_id, *theirs(span.text)["input_ids"]]
            with torch.no_grad():
                probs = model(input_ids=torch.tensor([teacher_ids])).logits[0].softmax(-1).double().numpy()
            student_ids = blocks.ids[number, places].tolist()
            if span.ends:
                student_ids = student_ids[:-1]
            for at, chances in enumerate(by_hand(probs, theirs, own, teacher_ids, student_ids)):
                row = got[number, places.start + at]
                wanted = np.full(len(own), SMOOTHING / len(own))
                for token, value in (chances or {student_ids[at + 1]: 1.0}).items():  # unmapped: the label
                    wanted[token] += (1 - SMOOTHING) * value
                np.testing.assert_allclose(row, wanted, rtol=0.02, atol=1e-4)
                checked += 1
    assert checked > 20


def test_the_label_is_stored_if_nothing_can_be_mapped(
    tokenizers: dict[str, Any], tiny_llama: Path, tmp_path: Path, limbeck_home: Path
) -> None:
    from tokenizers import normalizers

    own = tokenizers["bytes"]
    theirs = AutoTokenizer.from_pretrained(tiny_llama)
    theirs.backend_tokenizer.normalizer = normalizers.Replace("\n", "#")
    blocks = make_test_blocks(own)
    probs = stored_probs(AutoModelForCausalLM.from_pretrained(tiny_llama), theirs, own, blocks, tmp_path)
    for number in range(len(blocks.ids)):
        for places, _, span in document_spans(blocks, number, own, token_bytes(own)):
            if "\n" not in span.text:
                continue
            following = blocks.ids[number, places][1:]
            likely = probs[number, places.start : places.stop - 1][np.arange(len(following)), following]
            np.testing.assert_allclose(likely, 1.0, atol=1e-3)


def test_a_student_with_its_own_tokenizer(
    store: Store, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra="[tokenizer]\nvocab_size = 270\n")
    sets = ["--set", "teacher.retokenize=true", "--set", "data.max_tokens=2048"]
    result = limbeck("distill", recipe, *sets)
    assert result.code == 0, result.err
    distilled = store.get("tiny/2")
    assert len(AutoTokenizer.from_pretrained(store.artifacts.verified_folder(distilled))) == 270
    assert distilled.parent == "tiny/1"
    agreement = store.client.get_metric_history(distilled.run_id, "agreement")
    assert [metric.step for metric in agreement] == [2, 4]
    again = limbeck("distill", recipe, *sets, "--set", "training.max_steps=1")
    assert again.code == 0, again.err
    assert " 0 of them captured now" in again.err


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["objectives.distilled.layers={}"], "leave its layers out"),
        (['cache.form="online"'], 'cache.form = "online" out'),
        (['teacher.model="http://127.0.0.1:9/v1"'], 'set divergence = "chunks"'),
    ],
)
def test_recipes_that_retokenizing_cannot_serve_are_refused(
    store: Store,
    limbeck: Callable[..., Any],
    write_recipe: Callable[..., Path],
    tiny_llama: Path,
    sets: list[str],
    message: str,
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED)
    given = [part for each in ["teacher.retokenize=true", *sets] for part in ("--set", each)]
    result = limbeck("distill", recipe, *given)
    assert result.code == 2
    assert message in result.err
