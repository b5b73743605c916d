"""Requests give the same numbers as with lm-eval's HFLM on the same checkpoint, with PyTorch and with ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from limbeck.evals.engines.engine import Engine, load_engine
from limbeck.evals.engines.lm_eval_model import LimbeckLM
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.checkpoints.load import load_tokenizer
from limbeck.registry.core.errors import BadInput
from tests.conftest import TEXT

LONG = "".join(TEXT) * 4  # several contexts of 128 tokens
PROMPTS = ["", "def add(a, b):", "import os\nimport", "class Vessel:\n    ", "The quick brown fox ", LONG]
CHOICES = [" a", "x", "\n    return a + b\n", " caf\u00e9! \u2713", "\nimport sys\n\nif __name__ == '__main__':\n"]


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, tuple(args), index) for index, args in enumerate(arguments)]


class Reference:
    """HFLM, and its results for all requests of these tests."""

    def __init__(self, folder: Path) -> None:
        # Its own AutoTokenizer has Qwen2's rules for every tokenizer.json beside a Qwen2 model.
        self.lm = HFLM(str(folder), tokenizer=load_tokenizer(folder), device="cpu", dtype="float32", batch_size=2)
        greedy = [(prompt, self.likeliest(prompt)) for prompt in PROMPTS[1:]]
        # Repeated requests, a choice as long as the context, and one that starts with the text of the BOS token.
        self.pairs = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES] + greedy
        begin = self.lm.tokenizer.decode(self.lm.prefix_token_id)
        self.pairs += [PROMPTS[1:2] + CHOICES[:1], ("", begin + CHOICES[2]), (begin + PROMPTS[1], CHOICES[0])]
        self.pairs += [("def", self.text(128)), ("", self.text(127))]
        # Questions after two sets of few-shot examples, each long enough for a trunk.
        shots = [self.text(60), self.text(70)]
        self.pairs += [(f"{first}\nQ{n}:", choice) for first in shots for n in range(12) for choice in CHOICES[:4]]
        self.texts = [(TEXT[0],), (LONG,), (self.text(127),), (self.text(128),), (self.text(257),), ("\u00e9",)]
        self.logprobs = self.lm.loglikelihood(instances("loglikelihood", self.pairs), disable_tqdm=True)
        self.rolling = self.lm.loglikelihood_rolling(instances("loglikelihood_rolling", self.texts), disable_tqdm=True)

    def likeliest(self, prompt: str) -> str:
        """The text of the token that greedy decoding gives."""
        logits = self.lm._model_call(self.lm.tok_batch_encode([prompt], left_truncate_len=128)[0])
        return self.lm.tok_decode([int(logits[0, -1].argmax())], skip_special_tokens=False)

    def text(self, tokens: int) -> str:
        """A text of this number of tokens, without special ones."""
        ids = self.lm.tokenizer.encode(LONG, add_special_tokens=False)
        for start in range(100):
            text = self.lm.tok_decode(ids[start : start + tokens])
            if len(self.lm.tokenizer.encode(text, add_special_tokens=False)) == tokens:
                return text
        raise AssertionError(f"no text of {tokens} tokens")


@pytest.fixture(scope="session")
def references() -> dict[Path, Reference]:
    return {}


@pytest.fixture(params=["tiny_llama", "tiny_llama_bos", "tiny_gpt2", "tiny_neox", "tiny_qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def reference(folder: Path, references: dict[Path, Reference]) -> Reference:
    if folder not in references:
        references[folder] = Reference(folder)
    return references[folder]


@pytest.fixture(params=["torch", "onnxruntime"])
def engine(request: pytest.FixtureRequest, folder: Path, onnx: Any) -> Engine:
    model = resolve_model(str(folder if request.param == "torch" else onnx(folder)))
    assert model.engine == request.param
    return load_engine(model)


@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_loglikelihoods_equal_those_of_hflm(reference: Reference, engine: Engine, batch_tokens: int) -> None:
    lm = LimbeckLM(engine, batch_tokens=batch_tokens)
    scores = lm.loglikelihood(instances("loglikelihood", reference.pairs))
    expected = reference.logprobs
    assert np.allclose([score for score, _ in scores], [score for score, _ in expected], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert len({greedy for _, greedy in expected}) == 2, "both values must occur"
    # One row for each request would be five times the minimum.
    assert engine.work.tokens_run <= (1.1 if batch_tokens >= 300 else 2) * engine.work.min_tokens


def test_rolling_windows_score_like_those_of_hflm(reference: Reference, engine: Engine) -> None:
    scores = LimbeckLM(engine, batch_tokens=200).loglikelihood_rolling(
        instances("loglikelihood_rolling", reference.texts)
    )
    assert np.allclose(scores, reference.rolling, rtol=0, atol=1e-4 * 6)  # up to six windows


def test_generated_texts_equal_those_of_hflm(reference: Reference, engine: Engine) -> None:
    settings = {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    other = {"until": [" "], "max_gen_toks": 8}
    requests = [(prompt, settings) for prompt in PROMPTS[1:]] + [(PROMPTS[1], other), (PROMPTS[1], {"max_gen_toks": 4})]
    expected = [
        reference.lm.generate_until(instances("generate_until", [args]), disable_tqdm=True)[0] for args in requests
    ]
    assert LimbeckLM(engine).generate_until(instances("generate_until", requests)) == expected
    assert len({len(text) for text in expected}) > 2, "some must end early"


def test_context_prefix_and_special_tokens_equal_those_of_hflm(reference: Reference, engine: Engine) -> None:
    lm, theirs = LimbeckLM(engine), reference.lm
    assert (lm.max_length, lm.prefix_token_id, lm.eot_token_id) == (
        theirs.max_length,
        theirs.prefix_token_id,
        theirs.eot_token_id,
    )
    for text in [*PROMPTS, theirs.tokenizer.decode(theirs.prefix_token_id) + "a"]:
        assert lm.tok_encode(text) == theirs.tok_encode(text)
        assert lm.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


def test_the_bos_model_adds_bos(tiny_llama_bos: Path, tiny_llama: Path) -> None:
    begins = [
        LimbeckLM(load_engine(resolve_model(str(folder)))).tok_encode("def")[0]
        for folder in (tiny_llama_bos, tiny_llama)
    ]
    bos = load_engine(resolve_model(str(tiny_llama_bos))).tokenizer.bos_token_id
    assert begins[0] == bos
    assert begins[1] != bos


def test_a_chat_template_is_applied_as_in_hflm(tiny_llama: Path, references: dict[Path, Reference]) -> None:
    lm = LimbeckLM(load_engine(resolve_model(str(tiny_llama))))
    theirs = references.setdefault(tiny_llama, Reference(tiny_llama)).lm
    template = (
        "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    lm.tokenizer.chat_template = theirs.tokenizer.chat_template = template
    chat = [{"role": "user", "content": "2 + 2?"}]
    assert lm.apply_chat_template(chat) == theirs.apply_chat_template(chat) == "<user>2 + 2?<bot>"
    assert lm.tokenizer_name == theirs.tokenizer_name


def test_requests_with_the_same_input_run_once(tiny_llama: Path) -> None:
    engine = load_engine(resolve_model(str(tiny_llama)))
    done: list[int] = []
    lm = LimbeckLM(engine, on_requests=done.append)
    letters = [("Answer:", choice) for choice in "ABCD"]
    scores = lm.loglikelihood(instances("loglikelihood", [*letters, *letters]))
    assert engine.work.tokens_run == engine.work.min_tokens == len(lm.tok_encode("Answer:"))
    assert scores[:4] == scores[4:]
    assert sum(done) == 8


def test_a_choice_longer_than_the_context_is_refused(tiny_llama: Path) -> None:
    lm = LimbeckLM(load_engine(resolve_model(str(tiny_llama))))
    with pytest.raises(BadInput, match=r"\d{3} tokens.*allows 1 to 128"):
        lm.loglikelihood(instances("loglikelihood", [("def", LONG)]))


def test_no_room_to_generate_is_refused(tiny_llama: Path) -> None:
    lm = LimbeckLM(load_engine(resolve_model(str(tiny_llama))))
    with pytest.raises(BadInput, match=r"up to 256 tokens.* 128"):
        lm.generate_until(instances("generate_until", [("def", {"until": ["\n"]})]))


def test_a_setting_that_onnx_does_not_support_is_refused(tiny_llama: Path, onnx: Any) -> None:
    lm = LimbeckLM(load_engine(resolve_model(str(onnx(tiny_llama)))))
    with pytest.raises(BadInput, match="num_beams"):
        lm.generate_until(instances("generate_until", [("def", {"max_gen_toks": 4, "num_beams": 3})]))
