"""Shared prefixes: how many tokens run, and that scores equal those of one plain forward pass for each pair."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.evals.engines import batches
from limbeck.evals.engines.batches import NanLogits, TokenCounter, TokenPair
from limbeck.evals.engines.engine import Engine, load_engine
from limbeck.evals.engines.prefix_tree import Group, Inputs
from limbeck.registry.catalog.model_ref import resolve_model
from tests.conftest import make_model

NO_LIMIT = 2**40


def random_texts(seed: int, count: int, longest: int, vocab_size: int = 300) -> list[list[int]]:
    """Texts that each begin with a random prefix of an earlier one."""
    random = np.random.default_rng(seed)
    texts = [random.integers(1, vocab_size, longest).tolist()]
    while len(texts) < count:
        earlier = texts[random.integers(len(texts))]
        prefix = earlier[: random.integers(0, len(earlier) + 1)]
        new = random.integers(1, vocab_size, random.integers(1, 12)).tolist()
        texts.append((prefix + new)[:longest])
    return texts


def pairs_of(texts: list[list[int]], seed: int = 0) -> list[TokenPair]:
    """Each text split in two at random; some contexts are a single token, some pairs are repeated."""
    random = np.random.default_rng(seed)
    pairs = []
    for text in texts:
        cut = int(random.integers(1, len(text))) if len(text) > 1 else 1
        pairs.append((text[:cut], text[cut:] or [7]))
    return [*pairs, *pairs[::5]]


def sorted_inputs(texts: list[list[int]]) -> list[np.ndarray]:
    return [np.array(text) for text in sorted({tuple(text) for text in texts})]


def ancestors(groups: list[Group], number: int) -> list[np.ndarray]:
    """The tokens of the trunks above the rows of a group, outermost first."""
    group = groups[number]
    trunk = [] if group.trunk is None else [group.trunk.tokens]
    return trunk if group.parent < 0 else [*ancestors(groups, group.parent), *trunk]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("max_row_tokens", "max_shared_tokens", "min_below", "min_trunk"), [
    (NO_LIMIT, NO_LIMIT, NO_LIMIT, NO_LIMIT), (1, NO_LIMIT, 1, 1), (40, NO_LIMIT, 30, 5), (60, 50, 10, 2),
    (200, 90, 64, 8),
])  # fmt: skip
def test_every_text_is_in_the_rows_as_a_whole(
    seed: int, max_row_tokens: int, max_shared_tokens: int, min_below: int, min_trunk: int
) -> None:
    inputs = Inputs(sorted_inputs(random_texts(seed, 60, 80)))
    groups = inputs.forest(max_row_tokens, max_shared_tokens, min_below, min_trunk)
    found: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        above = np.concatenate([*ancestors(groups, number), np.empty(0, int)])
        assert group.depth == len(above)
        for row in group.rows:
            mask = row.mask()
            total = len(above) + len(row.tokens)
            assert total <= max_shared_tokens or row.is_chain
            assert len(row.tokens) <= max_row_tokens or row.is_chain
            for name, path in row.paths:
                assert name not in found
                found[name] = [*above, *row.tokens[path]]
                assert row.depth[path].tolist() == list(range(len(above), len(above) + len(path)))
                # Each token attends to the tokens of its path up to itself, and to nothing else.
                for index, node in enumerate(path):
                    assert np.flatnonzero(mask[node]).tolist() == path[: index + 1].tolist()
    for number, group in enumerate(groups):
        for name, path in group.trunk.paths if group.trunk else ():
            assert inputs.tokens[name][group.trunk.start :][: len(path)].tolist() == group.trunk.tokens[path].tolist()
            if len(inputs.tokens[name]) == group.depth:  # ends with the trunk
                found.setdefault(name, np.concatenate(ancestors(groups, number)).tolist())
    assert found == {name: tokens.tolist() for name, tokens in enumerate(inputs.tokens)}


def count_distinct_prefixes(texts: Iterable[Sequence[int]]) -> int:
    """The number of nodes of a trie."""
    nodes: dict[tuple[int, int], int] = {}
    for text in texts:
        node = 0
        for token in text:
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)


def test_the_fewest_tokens_are_the_number_of_distinct_prefixes() -> None:
    texts = random_texts(3, 80, 50)
    prefixes = {tuple(text[: end + 1]) for text in texts for end in range(len(text))}
    assert Inputs(sorted_inputs(texts)).min_tokens == count_distinct_prefixes(texts) == len(prefixes)


class BatchRecorder:
    """A model that computes nothing and records its batches."""

    vocab_size = 32_000

    def __init__(self, max_length: int) -> None:
        self.max_length, self.work = max_length, TokenCounter()
        self.batches: list[batches.Batch] = []

    def max_shared_tokens(self, tokens: int) -> int:
        return tokens

    def run(
        self, batch: batches.Batch, trunk: Any = None, keep_trunk: bool = False
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        assert (trunk is None) == (batch.start == 0)
        self.batches.append(batch)
        return (
            np.zeros(len(batch.target_tokens), np.float32),
            np.ones(len(batch.target_tokens), bool),
            batch if keep_trunk else None,
        )


def tokens(random: np.random.Generator, count: int) -> list[int]:
    return random.integers(1, 30_000, count).tolist()


def choices() -> list[TokenPair]:
    random = np.random.default_rng(0)
    contexts = [tokens(random, int(random.integers(230, 280))) for _ in range(40)]
    return [(context, tokens(random, int(random.integers(1, 20)))) for context in contexts for _ in range(4)]


def minimal_pairs() -> list[TokenPair]:
    random = np.random.default_rng(0)
    pairs: list[TokenPair] = []
    for _ in range(500):
        sentence = [
            int(random.integers(1, 40)),
            int(random.integers(1, 40)),
            *tokens(random, int(random.integers(3, 14))),
        ]
        other = list(sentence)
        other[int(random.integers(len(other)))] += 1
        pairs += [([0], sentence), ([0], other)]
    return pairs


def few_shot() -> list[TokenPair]:
    random = np.random.default_rng(0)
    pairs: list[TokenPair] = []
    for _ in range(2):
        shots = tokens(random, 900)
        for _ in range(60):
            context = shots + tokens(random, int(random.integers(30, 60)))
            pairs += [(context, tokens(random, int(random.integers(1, 6)))) for _ in range(4)]
    return pairs


def windows() -> list[TokenPair]:
    random = np.random.default_rng(0)
    lengths = random.integers(20, 4000, 80)
    return [(tokens(random, 1), tokens(random, min(1024, int(left)))) for n in lengths for left in range(n, 0, -1024)]


def long_contexts() -> list[TokenPair]:
    random = np.random.default_rng(0)
    contexts = [tokens(random, 3000 + 50 * number) for number in range(6)]
    return [(context, tokens(random, 8)) for context in contexts for _ in range(4)]


@pytest.mark.parametrize("batch_tokens", [batches.CPU_TOKENS, batches.BATCH_TOKENS])
@pytest.mark.parametrize("shape", [choices, minimal_pairs, few_shot, windows, long_contexts])
def test_at_most_10_percent_more_runs_than_each_distinct_prefix_once(shape: Any, batch_tokens: int) -> None:
    model = BatchRecorder(4096)
    pairs = shape()
    assert len(dict(batches.score_pairs(model, pairs, batch_tokens))) == len(pairs)
    distinct = count_distinct_prefixes((context + continuation)[:-1] for context, continuation in pairs)
    assert model.work.min_tokens == distinct
    assert model.work.tokens_run == sum(batch.tokens.size for batch in model.batches) <= 1.1 * model.work.min_tokens


@pytest.mark.parametrize("shape", [choices, minimal_pairs, few_shot, windows, long_contexts])
def test_batches_stay_within_their_limits(shape: Any) -> None:
    model = BatchRecorder(4096)
    list(batches.score_pairs(model, shape(), 2048))
    for batch in model.batches:
        count, width = batch.tokens.shape
        assert count == 1 or batch.tokens.size <= 2048
        assert count == 1 or batch.tokens.size * (batch.start + width) <= batches.MAX_ATTENTION_PAIRS
        assert len(batch.logit_positions) * model.vocab_size <= batches.MAX_LOGITS
        assert len(np.unique(batch.logit_positions)) == len(batch.logit_positions)


def test_windows_of_long_texts_need_no_masks() -> None:
    model = BatchRecorder(4096)
    list(batches.score_pairs(model, windows(), 4096))
    assert all(batch.mask is None for batch in model.batches)


@pytest.fixture(params=["tiny_llama-torch", "tiny_llama-onnxruntime", "tiny_neox-onnxruntime", "tiny_gpt2-torch"])
def engine(request: pytest.FixtureRequest, onnx: Any) -> Engine:
    name, kind = request.param.split("-")
    folder = request.getfixturevalue(name)
    return load_engine(resolve_model(str(folder if kind == "torch" else onnx(folder))))


def plain(folder: Path, pairs: list[TokenPair], max_length: int = 128) -> list[tuple[float, bool]]:
    """One forward pass of transformers for each pair."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for context, continuation in pairs:
        text = torch.tensor([(context + continuation)[-max_length - 1 :]])
        with torch.inference_mode():
            logprobs = model(text[:, :-1]).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = torch.tensor(continuation)
        chosen = logprobs.gather(1, wanted[:, None]).sum()
        found.append((float(chosen), bool((logprobs.argmax(-1) == wanted).all())))
    return found


def check(found: dict[int, tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert sorted(found) == list(range(len(expected)))
    scores = [found[index] for index in range(len(expected))]
    assert np.allclose([score for score, _ in scores], [score for score, _ in expected], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch_tokens", [16, 100, 1024])
def test_random_trees_score_like_plain_texts(
    request: pytest.FixtureRequest, engine: Engine, seed: int, batch_tokens: int
) -> None:
    folder = request.getfixturevalue(request.node.callspec.params["engine"].split("-")[0])
    pairs = pairs_of(random_texts(seed, 50, 140), seed)
    check(dict(engine.scores(pairs, batch_tokens)), plain(folder, pairs))
    assert engine.work.tokens_run < 0.8 * sum(len(c) + len(d) - 1 for c, d in pairs), "prefixes were not shared"


@pytest.mark.parametrize(
    ("model_type", "kind", "shares"),
    [
        ("mistral", "torch", False),
        ("mistral", "onnxruntime", False),
        ("bloom", "torch", False),
        ("bloom", "onnxruntime", False),
        ("mamba", "torch", False),
        ("qwen3_5_text", "torch", False),
        ("lfm2", "torch", False),
        ("qwen3_5_text", "onnxruntime", False),
        ("gemma4_text", "torch", False),
        ("gemma4_text", "onnxruntime", False),
        ("qwen3_moe", "torch", True),
        ("qwen3_moe", "onnxruntime", True),
        ("gemma2", "torch", True),  # has another operation after its head
        ("gemma2", "onnxruntime", True),
    ],
)
def test_a_model_shares_prefixes_only_if_that_keeps_its_numbers(
    tmp_path: Path, tokenizer_folder: Path, onnx: Any, model_type: str, kind: str, shares: bool
) -> None:
    folder = make_model(tmp_path / "model", tokenizer_folder, model_type)
    engine = load_engine(resolve_model(str(folder if kind == "torch" else onnx(folder))))
    pairs = pairs_of(random_texts(1, 40, 90))
    check(dict(engine.scores(pairs, 300)), plain(folder, pairs, engine.max_length))
    assert (engine.work.tokens_run < 1.5 * engine.work.min_tokens) == shares


def test_a_model_with_an_attention_window_shares_within_the_window(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = make_model(tmp_path / "model", tokenizer_folder, "mistral", sliding_window=64)
    engine = load_engine(resolve_model(str(folder)))
    texts = [[*range(20, 40), *end] for end in random_texts(1, 12, 8)]
    long = [[*range(1, 100), *end] for end in random_texts(2, 6, 8)]
    pairs = pairs_of([*texts, *long])
    check(dict(engine.scores(pairs, 300)), plain(folder, pairs))
    assert engine._forward.max_shared_tokens(120) == 64
    assert engine.work.tokens_run < sum(len(context + continuation) - 1 for context, continuation in pairs)


def test_an_int8_model_shares_prefixes(tiny_llama: Path, tmp_path: Path) -> None:
    from limbeck.export.artifact.export import export_onnx

    export_onnx(tiny_llama, tmp_path / "int8-weight", "int8-weight")
    engine = load_engine(resolve_model(str(tmp_path / "int8-weight")))
    pairs = pairs_of(random_texts(0, 40, 60))
    found = dict(engine.scores(pairs, 300))
    assert engine.work.tokens_run < 1.5 * engine.work.min_tokens
    # Activations are rounded to int8, which the last bit of a sum may change: scores are close, not equal.
    alone = [next(iter(engine.scores([pair], 300)))[1][0] for pair in pairs]
    differences = np.abs([found[index][0] - score for index, score in enumerate(alone)])
    scale = np.std(alone)
    assert np.median(differences) < 0.05 * scale


def test_only_positions_with_a_prediction_pass_through_the_head(tiny_llama: Path) -> None:
    engine = load_engine(resolve_model(str(tiny_llama)))
    context = list(range(20, 60))
    # Three choices; two of them share their first token.
    pairs: list[TokenPair] = [(context, [5, 6, 7]), (context, [5, 6, 9]), (context, [8])]
    list(engine.scores(pairs, 300))  # runs the sharing probe
    seen: list[int] = []
    head = engine.model.get_output_embeddings()
    with head.register_forward_hook(lambda _, args, out: seen.append(out[..., 0].numel())):
        list(engine.scores(pairs, 300))
    assert seen == [3], "after the context, after 5 and after 5 6"


@pytest.mark.parametrize("precision", ["fp32", "int8-weight"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_qwen2", "tiny_neox"])
def test_exported_graphs_get_the_inputs_that_sharing_needs(
    request: pytest.FixtureRequest, tmp_path: Path, onnx: Any, name: str, precision: str
) -> None:
    from limbeck.evals.engines.onnx_graph import open_session
    from limbeck.export.quantize.precisions import quantize

    graph = onnx(request.getfixturevalue(name))
    if precision == "int8-weight":
        quantize(graph, tmp_path, precision)
        graph = tmp_path
    session, quantizes = open_session(graph)
    assert {"logit_positions", "tree_mask", "position_ids"} <= {item.name for item in session.get_inputs()}
    assert session.get_outputs()[0].shape[1] == "selected"
    assert quantizes == (precision == "int8-weight")


@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
def test_a_nan_is_reported_with_its_pair(tiny_llama: Path, tmp_path: Path, onnx: Any, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():  # all weights are finite, but the first layer overflows on token 77 alone
        model.get_input_embeddings().weight[:, 0] = 0
        model.get_input_embeddings().weight[77, 0] = 100
        model.model.layers[0].input_layernorm.weight[0] = 3e38
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "nan")
    engine = load_engine(resolve_model(str(tmp_path / "nan" if kind == "torch" else onnx(tmp_path / "nan"))))
    start = list(range(20, 50))
    with pytest.raises(NanLogits) as raised:
        list(engine.scores([(start, [3]), (start, [3, 4]), ([*start, 77], [5]), (start, [3, 5])], 300))
    assert raised.value.index == 2


def test_generation_and_scores_take_turns(tiny_llama: Path, onnx: Any) -> None:
    engine = load_engine(resolve_model(str(onnx(tiny_llama))))
    pair: TokenPair = ([1, 2, 3], [4, 5])
    before = list(engine.scores([pair], 300))
    text = list(engine.generate([[1, 2, 3]], 4, []))
    assert list(engine.scores([pair], 300)) == before
    assert list(engine.generate([[1, 2, 3]], 4, [])) == text


def test_the_first_of_equally_likely_tokens_is_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from limbeck.evals.engines import torch_batches

    monkeypatch.setattr(torch_batches, "LOGITS_PER_CHUNK", 3 * 50)  # three rows at a time
    random = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (11, 50), generator=random).float()
    rows = torch.randint(0, 11, (400,), generator=random)
    targets = torch.randint(0, 50, (400,), generator=random)
    logprobs, likeliest = torch_batches.target_logprobs(logits, rows, targets)
    assert torch.allclose(logprobs, logits.double().log_softmax(-1)[rows, targets].float(), atol=1e-5)
    assert likeliest.tolist() == (logits.argmax(-1)[rows] == targets).tolist()
    assert likeliest.any()
