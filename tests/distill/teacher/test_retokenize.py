"""What a teacher with other tokens says of the next one, told in the student's."""

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
    """Byte-level ones: of few merges, of many of other text, and of none."""
    return {
        "few": AutoTokenizer.from_pretrained(tokenizer_folder),
        "many": train_tokenizer([Document("", "".join(TEXT * 2) + lines_of_text(80, 9))], 420, 10_000),
        "bytes": train_tokenizer([Document("", "a")], 257, 10_000),
    }


def by_hand(
    probs: np.ndarray, theirs: Any, own: Any, read: list[int], spoken: list[int]
) -> list[dict[int, float] | None]:
    """Of each of the student's tokens but the last, the chances of the next one; None where too little is told."""
    bytes_of = [token_bytes(theirs), token_bytes(own)]

    def spell(token: int) -> list[int]:
        try:
            text = bytes_of[0][token].decode()
        except UnicodeDecodeError:  # half of a character
            raw = bytes_of[0][token]
            return [bytes_of[1].index(raw)] if raw in bytes_of[1] else [bytes_of[1].index(bytes([b])) for b in raw]
        return own(text)["input_ids"] if text else [own.eos_token_id] if token == theirs.eos_token_id else []

    spelt = [spell(token) for token in range(len(theirs))]
    begins = lambda kind, ids: [b"".join(bytes_of[kind][t] for t in ids[: n + 1]) for n in range(len(ids))]  # noqa: E731
    their_ends, own_ends = begins(0, read), begins(1, spoken)
    found: list[dict[int, float] | None] = []
    for now in range(len(spoken) - 1):
        back = next(n for n in range(now, -1, -1) if own_ends[n] in their_ends)
        chance = probs[their_ends.index(own_ends[back])]
        begun = spoken[back + 1 : now + 1]
        row: dict[int, float] = {}
        for token, spelling in enumerate(spelt):
            if len(spelling) > len(begun) and spelling[: len(begun)] == begun:
                row[spelling[len(begun)]] = row.get(spelling[len(begun)], 0.0) + chance[token]
        stop = sum(chance[token] for token, spelling in enumerate(spelt) if begun and spelling == begun)
        told = sum(row.values())
        if told < MIN_MAPPED_SHARE * (told + stop if begun else 1.0) or not row:
            found.append(None)
            continue
        if not begun:  # the text's own next token, spelt by the teacher in several
            first = their_ends.index(own_ends[now]) + 1
            last = next((n for n in range(first, len(read)) if their_ends[n].startswith(own_ends[now + 1])), None)
            if last is not None and last > first and spelt[read[first]] and spelt[read[first]][0] != spoken[now + 1]:
                moved = np.prod([probs[n - 1][read[n]] for n in range(first, last + 1)])
                moved = min(moved, row[spelt[read[first]][0]])
                row[spelt[read[first]][0]] -= moved
                row[spoken[now + 1]] = row.get(spoken[now + 1], 0.0) + moved
        found.append({token: value / told for token, value in row.items()})
    return found


@pytest.mark.parametrize(("theirs", "own"), [("many", "few"), ("few", "many"), ("many", "bytes"), ("few", "bytes")])
@pytest.mark.parametrize("text", [TEXT[1], UNICODE, lines_of_text(5, 2)])
def test_what_is_told_is_what_is_found_by_hand(tokenizers: dict[str, Any], theirs: str, own: str, text: str) -> None:
    teacher, student = tokenizers[theirs], tokenizers[own]
    told = Retokenizer(teacher, student)
    [read] = tokenize_spans([TextSpan(text, 0, True, False)], teacher, told.teacher_bytes)
    spoken = [student.eos_token_id, *student(text)["input_ids"]]
    logits = torch.randn(len(read.ids), len(teacher), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[torch.arange(len(logits) - 1), torch.from_numpy(read.ids[1:])] += 5.0  # the text itself is likely
    ends = np.cumsum([len(told.student_bytes[token]) for token in spoken])
    got = told.span_probs(logits, read, np.array(spoken), ends)
    wanted = by_hand(logits.softmax(-1).numpy(), teacher, student, read.ids.tolist(), spoken)
    assert sum(row is not None for row in wanted) > 0.6 * len(wanted)
    for row, chances in zip(got, wanted, strict=True):
        dense = torch.zeros(len(student), dtype=torch.float64)
        for token, value in (chances or {}).items():
            dense[token] = value
        torch.testing.assert_close(row, dense, rtol=1e-6, atol=1e-9)


def test_equal_tokenizers_are_told_as_they_are(tokenizers: dict[str, Any]) -> None:
    same = tokenizers["few"]
    told = Retokenizer(same, same)
    [read] = tokenize_spans([TextSpan(TEXT[0], 0, True, True)], same, told.teacher_bytes)
    logits = torch.randn(len(read.ids), len(same), generator=torch.Generator().manual_seed(1))
    got = told.span_probs(logits, read, read.ids, read.ends)
    torch.testing.assert_close(got, logits[:-1].softmax(-1))


@pytest.mark.parametrize(("stops", "is_told"), [(0.9, False), (0.1, True)])
def test_amid_a_token_that_may_have_ended_little_is_told(
    tokenizers: dict[str, Any], stops: float, is_told: bool
) -> None:
    told = Retokenizer(tokenizers["many"], tokenizers["bytes"])
    begun = next(spelling for spelling in told.continuations if len(told.ends[spelling]) == 1)
    [[longer, *_], _] = told.continuations[begun].tolist()
    probs = torch.zeros(len(told.spellings))
    probs[told.ends[begun]], probs[longer] = stops, 1 - stops
    row = told.probs_inside_token(probs, begun)
    assert (row is not None) == is_told
    if row is not None:
        assert row.argmax() == told.spellings[longer][len(begun)]
        assert row.sum() == 1
    assert told.probs_inside_token(probs, (-1,)) is None


def layout(tokenizer: PreTrainedTokenizerBase) -> Blocks:
    documents = [Document(str(seed), lines_of_text(6, seed) + UNICODE) for seed in range(3)]
    return make_blocks(documents, tokenizer, 40)


def dense(
    model: Any, theirs: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, blocks: Blocks, folder: Path
) -> np.ndarray:
    """All that is stored of the blocks: probabilities (N, T, V)."""
    cache = TeacherCache({"test": str(folder)}, blocks.ids.shape, Form("topk", len(own), len(own)))
    run = retokenize.retokenized_pass(model, theirs, blocks, own, bf16=False)
    [arrays] = run(np.arange(len(blocks.ids)), [cache])
    probs = np.zeros((*blocks.ids.shape, len(own)))
    np.put_along_axis(probs, arrays["ids"].astype(int), np.exp(arrays["logprobs"].astype(float)), axis=-1)
    return probs


def test_a_teacher_is_told_block_by_block(
    tokenizers: dict[str, Any], tmp_path: Path, limbeck_home: Path, tokenizer_folder: Path
) -> None:
    theirs, own = tokenizers["many"], tokenizers["few"]
    theirs.save_pretrained(tmp_path / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "teacher", tmp_path / "tokenizer", "llama"))
    blocks = layout(own)
    got = dense(model, theirs, own, blocks, tmp_path)
    texts, checked = token_bytes(own), 0
    for number in (0, 1):
        for places, _, piece in document_spans(blocks, number, own, texts):
            if piece.skipped or not piece.begins:
                continue
            read = [theirs.eos_token_id, *theirs(piece.text)["input_ids"]]
            with torch.no_grad():
                probs = model(input_ids=torch.tensor([read])).logits[0].softmax(-1).double().numpy()
            spoken = blocks.ids[number, places].tolist()
            if piece.ends:
                spoken = spoken[:-1]
            for at, chances in enumerate(by_hand(probs, theirs, own, read, spoken)):
                row = got[number, places.start + at]
                wanted = np.full(len(own), SMOOTHING / len(own))
                for token, value in (chances or {spoken[at + 1]: 1.0}).items():  # untold: the label
                    wanted[token] += (1 - SMOOTHING) * value
                np.testing.assert_allclose(row, wanted, rtol=0.02, atol=1e-4)
                checked += 1
    assert checked > 20


def test_where_nothing_is_told_the_label_is(
    tokenizers: dict[str, Any], tiny_llama: Path, tmp_path: Path, limbeck_home: Path
) -> None:
    from tokenizers import normalizers

    own = tokenizers["bytes"]
    theirs = AutoTokenizer.from_pretrained(tiny_llama)
    theirs.backend_tokenizer.normalizer = normalizers.Replace("\n", "#")
    blocks = layout(own)
    probs = dense(AutoModelForCausalLM.from_pretrained(tiny_llama), theirs, own, blocks, tmp_path)
    for number in range(len(blocks.ids)):
        for places, _, piece in document_spans(blocks, number, own, token_bytes(own)):
            if "\n" not in piece.text:
                continue
            following = blocks.ids[number, places][1:]
            likely = probs[number, places.start : places.stop - 1][np.arange(len(following)), following]
            np.testing.assert_allclose(likely, 1.0, atol=1e-3)


# --- recipes


def test_a_student_with_a_tokenizer_of_its_own(
    store: Store, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra="[tokenizer]\nvocab_size = 270\n")
    result = limbeck("distill", recipe, "--set", "teacher.retokenize=true")
    assert result.code == 0, result.err
    distilled = store.get("tiny/2")
    assert len(AutoTokenizer.from_pretrained(store.artifacts.verified_folder(distilled))) == 270
    assert distilled.parent == "tiny/1"
    agreement = store.client.get_metric_history(distilled.run_id, "agreement")
    assert [metric.step for metric in agreement] == [2, 4]
    again = limbeck("distill", recipe, "--set", "teacher.retokenize=true", "--set", "training.max_steps=1")
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
def test_what_cannot_be_retold_is_refused(
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
