"""The teacher cache: reading back, resuming, damaged shards, cache identity, and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.distill.cache import teacher_cache as caches
from limbeck.distill.cache.teacher_cache import Capture, TeacherCache, fill
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.teacher.local import local_capture, local_pass
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.errors import DamagedArtifact
from tests import ROOT

IDS = np.random.default_rng(0).integers(0, 300, (10, 12), dtype=np.int32)
ONES = np.ones_like(IDS)
BLOCKS = Blocks(IDS, ONES.astype(np.uint16), ONES.astype(bool), IDS.size, IDS.size, "b")
TOPK, SAMPLED = Form("topk", 4, 300), Form("sampled", 5, 300)
SETTINGS = {"teacher": "t", "tokenizer": "k", "blocks": "b", "precision": "fp32"}
FORMS = pytest.mark.parametrize("form", [TOPK, SAMPLED], ids=["topk", "sampled"])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SHARD_TOKENS", 4 * 12)


def make_cache(form: Form) -> TeacherCache:
    return TeacherCache(SETTINGS, IDS.shape, form)


@pytest.fixture
def capture_for(limbeck_home: Path, tiny_llama: Path) -> Callable[[TeacherCache], Capture]:
    """Returns the capture of the tiny teacher for a cache."""
    model = load_model(tiny_llama)
    return lambda cache: local_capture(model, BLOCKS, cache, bf16=False)


@pytest.fixture
def dense_logits(tiny_llama: Path) -> torch.Tensor:
    """The teacher's logits over all blocks, from transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_returns_the_most_likely_tokens(capture_for, dense_logits: torch.Tensor, temperature: float) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(TOPK._replace(temperature=temperature))
    assert cache.fill(capture_for(cache)) == 10
    indices = np.array([9, 0, 5])
    rows = cache.load_batch(indices)
    assert (rows["ids"].dtype, rows["logprobs"].dtype) == (torch.int64, torch.float32)
    values, places = (dense_logits[indices] / temperature).log_softmax(-1).topk(4, dim=-1)
    np.testing.assert_allclose(rows["logprobs"].numpy(), values.numpy(), atol=5e-3)  # stored in half precision
    assert (rows["ids"] == places).float().mean() > 0.99
    assert cache.disk_bytes() <= IDS.size * 4 * (2 + 2) + 3 * 200  # two bytes an id, two a log-probability


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_the_weights_of_the_sampled_form(
    capture_for, dense_logits: torch.Tensor, temperature: float
) -> None:  # type: ignore[no-untyped-def]
    """A token above the block's threshold has its probability as weight, any other token the threshold."""
    cache = make_cache(SAMPLED._replace(temperature=temperature))
    cache.fill(capture_for(cache))
    indices = np.array([9, 0, 5])
    rows = cache.load_batch(indices)
    assert [rows[name].dtype for name in ("ids", "weights", "entropy")] == [torch.int64, torch.float32, torch.float32]
    logprobs = (dense_logits[indices] / temperature).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logprobs).entropy()
    np.testing.assert_allclose(rows["entropy"][:, :-1].numpy(), entropy[:, :-1].numpy(), rtol=2e-3, atol=2e-3)
    probs, used = logprobs.exp().gather(-1, rows["ids"]), rows["weights"] > 0
    for block in range(3):
        threshold = float(rows["weights"][block][used[block]].min())
        expected = probs[block].clamp_min(threshold)
        np.testing.assert_allclose(
            rows["weights"][block][used[block]].numpy(), expected[used[block]].numpy(), rtol=1e-3
        )
    assert not used[:, -1].any()  # the last position has no next token
    assert int(used.sum()) == pytest.approx(3 * 11 * 5, abs=3)


@FORMS
def test_a_block_reads_the_same_alone_and_in_a_batch(capture_for, form: Form) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(form)
    cache.fill(capture_for(cache))
    together = cache.load_batch(np.arange(10))
    for index in (0, 3, 4, 9):
        for name, alone in cache.load_batch(np.array([index])).items():
            among = together[name][index : index + 1]
            width = min(alone.shape[-1], among.shape[-1])  # samples are padded to the fullest position of the batch
            assert torch.equal(alone[..., :width], among[..., :width])
            assert not among[..., width:].any()


@FORMS
def test_an_interrupted_capture_resumes(capture_for, form: Form) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(form)
    capture = capture_for(cache)
    seen: list[int] = []

    def stops(blocks: np.ndarray) -> dict[str, np.ndarray]:
        if seen:
            raise KeyboardInterrupt
        seen.append(len(blocks))
        return capture(blocks)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(stops)
    assert cache.missing_blocks() == 6
    assert cache.fill(capture) == 6
    assert cache.fill(capture) == 0
    assert cache.missing_blocks() == 0


@FORMS
@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no record", "half a record"])
def test_a_damaged_shard_is_captured_again_bit_for_bit(capture_for, form: Form, harm: str) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(form)
    cache.fill(capture_for(cache))
    files = {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")}
    path = cache.folder / ("00001.json" if "record" in harm else "00001.safetensors")
    data = path.read_bytes()
    if harm in ("gone", "no record"):
        path.unlink()
    else:
        path.write_bytes(data[:-10] if harm in ("cut", "half a record") else data[:-1] + bytes([data[-1] ^ 1]))
    again = make_cache(form)
    assert again.fill(capture_for(again)) == 4
    assert files == {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")}


def test_several_forms_are_captured_in_one_teacher_pass(capture_for, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    model = load_model(tiny_llama)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    several = [make_cache(form) for form in (TOPK, SAMPLED, SAMPLED._replace(temperature=2.0))]
    run = local_pass(model, BLOCKS, 300, bf16=False)
    assert fill(several, run) == 10
    assert len(passes) == 3  # a batch for each shard
    more = [make_cache(SAMPLED), make_cache(SAMPLED._replace(temperature=4.0))]
    assert fill(more, run) == 10  # for the new one
    assert len(passes) == 6
    assert fill([*several, more[1]], run) == 0
    alone = TeacherCache(SETTINGS | {"teacher": "u"}, IDS.shape, TOPK)
    alone.fill(capture_for(alone))
    assert torch.equal(alone.load_batch(np.arange(10))["logprobs"], several[0].load_batch(np.arange(10))["logprobs"])


def test_other_settings_make_another_cache(limbeck_home: Path) -> None:
    first = make_cache(SAMPLED)
    changed = [TeacherCache(SETTINGS | {name: "other"}, IDS.shape, SAMPLED) for name in SETTINGS]
    fields = {"kind": "topk", "size": 6, "vocab_size": 301, "temperature": 2.0}
    changed += [make_cache(SAMPLED._replace(**{name: value})) for name, value in fields.items()]  # type: ignore[arg-type]
    assert len({cache.folder for cache in [first, *changed]}) == 1 + len(changed)
    assert len({cache.seed for cache in [first, *changed]}) == 1 + len(changed)  # and other random draws


def test_a_cache_without_a_form_returns_the_arrays(limbeck_home: Path) -> None:
    cache = TeacherCache(SETTINGS | {"kind": "own"}, IDS.shape)
    cache.fill(lambda blocks: {"a": IDS[blocks].astype(np.uint16), "b": blocks.astype(np.float16)})
    rows = cache.load_batch(np.array([9, 0]))
    assert torch.equal(rows["a"], torch.from_numpy(IDS[[9, 0]]).long())
    assert rows["b"].tolist() == [9.0, 0.0]


def test_padded_vocabulary_is_dropped_and_bf16_is_close(limbeck_home: Path, tiny_llama: Path) -> None:
    model = load_model(tiny_llama)

    def logprobs(form: Form, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
        arrays = local_capture(model, BLOCKS, make_cache(form), bf16)(np.arange(len(IDS)))
        return arrays["ids"], arrays["logprobs"].astype(np.float32)

    _, exact = logprobs(Form("topk", 300, 300), bf16=False)
    assert np.exp(exact).sum(-1) == pytest.approx(1.0, abs=3e-3)
    ids, cut = logprobs(Form("topk", 200, 200), bf16=False)
    assert ids.max() == 199
    assert np.exp(cut).sum(-1) == pytest.approx(1.0, abs=3e-3)
    _, near = logprobs(Form("topk", 1, 300), bf16=True)
    assert np.abs(near - exact[..., :1]).max() < 0.1


# Fills a cache with zeros, with a pause for each shard; prints each shard's first block, and the blocks it captured.
FILLER = """
import sys, time
import numpy as np
from limbeck.distill.cache import teacher_cache
from limbeck.distill.recipe.cache_form import Form
teacher_cache.SHARD_TOKENS = 48
cache = teacher_cache.TeacherCache({"teacher": "t"}, (10, 12), Form("topk", 4, 300))
def capture(blocks):
    print("at", blocks[0], flush=True)
    time.sleep(float(sys.argv[1]))
    shape = (len(blocks), 12, 4)
    return {"ids": np.zeros(shape, np.uint16), "logprobs": np.full(shape, int(blocks[0]), np.float16)}
print("captured", cache.fill(capture), flush=True)
"""


def start_filling(seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILLER, str(seconds)]
    root = str(ROOT)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root})


def test_two_processes_fill_a_cache_once(limbeck_home: Path) -> None:
    both = [start_filling(0.2), start_filling(0.2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(text.count("at") for text in outputs) == [0, 3]
    assert sorted(text.splitlines()[-1] for text in outputs) == ["captured 0", "captured 10"]


def test_a_killed_process_leaves_whole_shards_and_no_lock(limbeck_home: Path) -> None:
    process = start_filling(0.5)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["at 0\n", "at 4\n"]  # the first shard is written
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [folder] = (limbeck_home / "teacher-cache").iterdir()
    (folder / ".00001.safetensors.0.part").write_bytes(b"half")  # what a kill during a write leaves
    assert start_filling(0).communicate(timeout=120)[0].splitlines() == ["at 4", "at 8", "captured 6"]
    assert not [*folder.glob(".*.part")]


def test_reading_a_missing_shard_is_an_error(capture_for) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(TOPK)
    cache.fill(capture_for(cache))
    (cache.folder / "00002.safetensors").unlink()
    with pytest.raises(DamagedArtifact, match="00002"):
        cache.load_batch(np.array([9]))
