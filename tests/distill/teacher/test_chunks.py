"""A teacher with another tokenizer: the same text in chunks that both share, and how likely each finds them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import models as kinds
from torch.distributions import Bernoulli, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.distill.data.blocks import make_blocks, train_tokenizer
from limbeck.distill.data.document import Document
from limbeck.distill.losses import text_chunks as loss_module
from limbeck.distill.losses.chunked_head import LazyLogits
from limbeck.distill.models import alignment
from limbeck.distill.models.alignment import TextSpan
from limbeck.distill.recipe.schema import Objective
from limbeck.distill.teacher import text_chunks as chunks
from limbeck.distill.teacher.text_chunks import SpanLogprobs
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from tests.conftest import TEXT, make_model
from tests.distill.conftest import lines_of_text

UNICODE = (
    "na\u00efve \u65e5\u672c\u8a9e\u306e\u6587 \U0001f9ea\U0001f469\u200d\U0001f52c\u2028e\u0301 \u00df\t\n  "
    "\u0928\u092e\u0938\u094d\u0924\u0947!\r\n"
)
TEXTS = [*TEXT, UNICODE, lines_of_text(12, 3), " leading and trailing  ", "x" * 30]


def sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama 2's: spaces are letters, one is put before a text, and what is not known is spelt in bytes."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=[], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator([lines_of_text(100, 5), *TEXT], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    whole = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def trimming() -> PreTrainedTokenizerBase:
    """As GPT-2's: byte-level, words apart, offsets without the spaces; merges of other text."""
    tokenizer = train_tokenizer([Document("", "".join(TEXT[2:] * 3) + lines_of_text(50, 8))], 420, 10_000)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    return {
        "small": AutoTokenizer.from_pretrained(tokenizer_folder),
        "other merges": trimming(),
        "bytes": train_tokenizer([Document("", "a")], 257, 10_000),
        "sentencepiece": sentencepiece(),
    }


@pytest.mark.parametrize("name", ["small", "other merges", "bytes", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_bytes_of_the_text(tokenizers: dict[str, Any], name: str, text: str) -> None:
    texts = alignment.token_bytes(tokenizers[name])
    ids = tokenizers[name](text, add_special_tokens=False)["input_ids"]
    before = b" " if name == "sentencepiece" else b""
    assert b"".join(texts[token] for token in ids) == before + text.encode()
    assert texts[tokenizers[name].eos_token_id] == b""


def test_wordpiece_is_bad_input() -> None:
    backend = Tokenizer(kinds.WordPiece({"[UNK]": 0, "word": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(BadInput, match="not bytes of the text"):
        alignment.token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def shared(one: list[bytes], other: list[bytes]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """By brute force: (first, last) tokens of either that make the same bytes, after the same bytes, and as few."""
    same = [
        (i, j) for i in range(len(one) + 1) for j in range(len(other) + 1) if b"".join(one[:i]) == b"".join(other[:j])
    ]
    return [((a, c), (b, d)) for (a, b), (c, d) in pairwise(same)]


@pytest.mark.parametrize("own", ["small", "bytes", "other merges"])
@pytest.mark.parametrize("other", ["small", "other merges", "bytes"])
@pytest.mark.parametrize("text", TEXTS[2:])
def test_chunks_are_what_brute_force_finds(tokenizers: dict[str, Any], own: str, other: str, text: str) -> None:
    pair = []
    for name in (own, other):
        texts = alignment.token_bytes(tokenizers[name])
        pair.append([texts[token] for token in tokenizers[name](text)["input_ids"]])
    mine, theirs = pair
    wanted = shared(mine, theirs)
    logprobs = np.random.default_rng(0).normal(-2, 1, len(theirs))
    ends = [np.cumsum([0, *map(len, tokens)]) for tokens in pair]  # each after a token that starts the text
    numbers, said = chunks.align(ends[0], SpanLogprobs(ends[1], np.concatenate([[np.nan], logprobs])))
    assert numbers[0] == 0
    got = [np.flatnonzero(numbers[1:] == chunk) for chunk in range(1, numbers.max() + 1)]
    assert [(int(places[0]), int(places[-1]) + 1) for places in got] == [first for first, _ in wanted]
    np.testing.assert_allclose(said, [logprobs[first:last].sum() for _, (first, last) in wanted])


def test_text_that_a_normalizer_changed_has_no_chunks(tokenizers: dict[str, Any], tiny_llama: Path) -> None:
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizers["small"].backend_tokenizer.to_str()), eos_token="<|endoftext|>"
    )
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    read = chunks.local_reader(AutoModelForCausalLM.from_pretrained(tiny_llama), lower, bf16=False)
    changed, kept = read([TextSpan("Upper case", 0, True, True), TextSpan("lower case", 0, True, True)])
    assert len(changed.ends) == 0
    assert kept.ends[-1] == len("lower case") + 1
    numbers, said = chunks.align(np.arange(12), changed)
    assert not numbers.any()
    assert len(said) == 0


def blocks_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    documents = [Document(str(seed), lines_of_text(6, seed) + UNICODE) for seed in range(4)]
    return make_blocks(documents, tokenizer, 48)


@pytest.mark.parametrize("teachers", ["other merges", "sentencepiece"])
@pytest.mark.parametrize("own", ["small", "bytes"])
def test_what_is_stored_is_what_the_teacher_says_of_the_text(
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
            said = [0.0] + [float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids))]
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
                # SentencePiece's space before a text is a token of no bytes, and belongs to what follows.
                within = [
                    said[n]
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
    # What a block's edge cuts is read as if a text began there, so only whole documents are the same to both.
    reader = chunks.local_reader(teacher, tokenizers["small"], bf16=False)
    stored = chunks.capture(blocks, tokenizers["small"], reader)(np.arange(len(blocks.ids)))
    batch = blocks.batch(np.arange(len(blocks.ids)))
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = teacher(**batch, use_cache=False).logits[:, :-1].double()
    said = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").numpy()
    whole = np.zeros(labels.shape, dtype=bool)
    for row, segments in enumerate(blocks.segments):
        for segment in np.unique(segments):
            places = np.flatnonzero(segments == segment)
            if blocks.ids[row, places[0]] == 0:  # begins here
                whole[row, places[:-1]] = True
    whole &= (labels != -100).numpy()
    assert whole.sum() > 100
    kept = whole & (stored["chunks"][:, :-1] > 0)
    assert kept.sum() > 0.95 * whole.sum()  # all but characters that an edge cuts
    np.testing.assert_allclose(stored["logprobs"][:, :-1][kept], said[kept], rtol=2e-3, atol=2e-3)
    for row in range(len(labels)):
        numbers = stored["chunks"][row][stored["chunks"][row] > 0]
        assert list(numbers) == list(range(1, len(numbers) + 1))


# --- the loss


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_the_divergence_is_that_of_two_coins(temperature: float) -> None:
    log_p, log_q = -torch.rand(2, 50, dtype=torch.float64).mul(3).exp() + 0.9
    log_q.requires_grad_()
    got = loss_module.divergence(log_p, log_q, temperature)
    p, q = ((x / temperature).exp() for x in (log_p, log_q))
    wanted = temperature * kl_divergence(Bernoulli(probs=p), Bernoulli(probs=q))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    one, other = (torch.autograd.grad(each.sum(), log_q, retain_graph=True)[0] for each in (got, wanted))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert float(loss_module.divergence(log_p, log_p, temperature).abs().max()) == 0


def test_certain_chunks_are_finite() -> None:
    certain, unlikely = torch.tensor([0.0, 0.0, -1e4]), torch.tensor([-1e4, 0.0, 0.0])
    for temperature in (1.0, 100.0):
        assert loss_module.divergence(certain.double(), unlikely.double(), temperature).isfinite().all()


@pytest.mark.parametrize(("labels", "temperature"), [(0.0, 1.0), (0.0, 100.0), (0.3, 10.0)])
def test_the_loss_against_a_plain_one(labels: float, temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    rows = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)[:, :5]
    numbers = torch.tensor([[1, 1, 2, 0, 3], [1, 0, 1, 2, 0], [0, 0, 0, 0, 1]])
    said = torch.tensor([[0, -2.5, -0.5, 0, -4], [0, 0, -1.5, -0.1, 0], [0, 0, 0, 0, -3]])
    ids = torch.randint(20, (9,))
    objective = Objective(divergence="chunks", labels=labels, temperature=temperature)
    student = LazyLogits(hidden, weight)
    loss = loss_module.loss(student, ids, rows, {"chunks": numbers, "logprobs": said}, objective)
    got = torch.autograd.grad(loss, (hidden, weight))

    own = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(9), ids]
    places = {tuple(place): number for number, place in enumerate(rows.nonzero().tolist())}
    total = -labels * own.sum()
    for row in range(3):
        for chunk in range(1, int(numbers[row].max()) + 1):
            at = [column for column in range(5) if numbers[row, column] == chunk]
            log_q = sum(own[places[row, column]] for column in at)
            log_p = said[row, at].double().sum()
            coins = [Bernoulli(probs=(x / temperature).exp()) for x in (log_p, log_q)]
            total = total + (1 - labels) * temperature * kl_divergence(*coins)
    wanted = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- recipes

CHUNKS = '[objectives.across]\ndivergence = "chunks"\n'


def test_a_student_with_a_tokenizer_of_its_own(
    store: Store, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path, tiny_gpt2: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=CHUNKS, extra="[tokenizer]\nvocab_size = 270\n")
    sets = ["--set", "training.max_steps=24", "--set", "training.eval_steps=100"]
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
    # Another student, and the teacher does not run again.
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
    result = limbeck("distill", recipe)
    assert result.code == 0, result.err
    assert len(AutoTokenizer.from_pretrained(store.artifacts.verified_folder(store.get("tiny/2")))) == 280
    # Without a divergence that compares across tokenizers it is no student of this teacher.
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
def test_bad_recipes(
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
