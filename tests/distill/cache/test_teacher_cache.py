"""The teacher cache: what comes back, what is captured again, what is another cache, who may be at it."""

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
from limbeck.distill.models.loading import load_model
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.teacher import signal as teachers
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


def a_cache(form: Form) -> TeacherCache:
    return TeacherCache(SETTINGS, IDS.shape, form)


@pytest.fixture
def capturing(limbeck_home: Path, tiny_llama: Path) -> Callable[[TeacherCache], Capture]:
    model = load_model(tiny_llama)
    return lambda cache: teachers.capture(model, BLOCKS, cache, bf16=False)


@pytest.fixture
def dense(tiny_llama: Path) -> torch.Tensor:
    """The teacher's logits over all blocks, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_gives_back_the_likeliest(capturing, dense: torch.Tensor, temperature: float) -> None:  # type: ignore[no-untyped-def]
    cache = a_cache(TOPK._replace(temperature=temperature))
    assert cache.fill(capturing(cache)) == 10
    indices = np.array([9, 0, 5])
    rows = cache.load_batch(indices)
    assert (rows["ids"].dtype, rows["logprobs"].dtype) == (torch.int64, torch.float32)
    values, places = (dense[indices] / temperature).log_softmax(-1).topk(4, dim=-1)
    np.testing.assert_allclose(rows["logprobs"].numpy(), values.numpy(), atol=5e-3)  # stored in half precision
    assert (rows["ids"] == places).float().mean() > 0.99
    assert cache.disk_bytes() <= IDS.size * 4 * (2 + 2) + 3 * 200  # two bytes an id, two a log-probability


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_of_each_block_are_what_the_form_draws(capturing, dense: torch.Tensor, temperature: float) -> None:  # type: ignore[no-untyped-def]
    """Each id is one that the teacher gives, heavy ones at their probability, light ones at the block's threshold."""
    cache = a_cache(SAMPLED._replace(temperature=temperature))
    cache.fill(capturing(cache))
    indices = np.array([9, 0, 5])
    rows = cache.load_batch(indices)
    assert [rows[name].dtype for name in ("ids", "weights", "entropy")] == [torch.int64, torch.float32, torch.float32]
    logprobs = (dense[indices] / temperature).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logprobs).entropy()
    np.testing.assert_allclose(rows["entropy"][:, :-1].numpy(), entropy[:, :-1].numpy(), rtol=2e-3, atol=2e-3)
    probs, used = logprobs.exp().gather(-1, rows["ids"]), rows["weights"] > 0
    for block in range(3):
        threshold = float(rows["weights"][block][used[block]].min())
        expected = probs[block].clamp_min(threshold)
        np.testing.assert_allclose(
            rows["weights"][block][used[block]].numpy(), expected[used[block]].numpy(), rtol=1e-3
        )
    assert not used[:, -1].any()  # nothing follows
    assert int(used.sum()) == pytest.approx(3 * 11 * 5, abs=3)


@FORMS
def test_rows_do_not_depend_on_the_batch_they_are_asked_in(capturing, form: Form) -> None:  # type: ignore[no-untyped-def]
    cache = a_cache(form)
    cache.fill(capturing(cache))
    together = cache.load_batch(np.arange(10))
    for index in (0, 3, 4, 9):
        for name, alone in cache.load_batch(np.array([index])).items():
            among = together[name][index : index + 1]
            width = min(alone.shape[-1], among.shape[-1])  # samples are padded to the fullest position of the batch
            assert torch.equal(alone[..., :width], among[..., :width])
            assert not among[..., width:].any()


@FORMS
def test_a_stopped_capture_goes_on(capturing, form: Form) -> None:  # type: ignore[no-untyped-def]
    cache = a_cache(form)
    capture = capturing(cache)
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
def test_a_damaged_shard_is_captured_again_bit_for_bit(capturing, form: Form, harm: str) -> None:  # type: ignore[no-untyped-def]
    cache = a_cache(form)
    cache.fill(capturing(cache))
    files = {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")}
    path = cache.folder / ("00001.json" if "record" in harm else "00001.safetensors")
    data = path.read_bytes()
    if harm in ("gone", "no record"):
        path.unlink()
    else:
        path.write_bytes(data[:-10] if harm in ("cut", "half a record") else data[:-1] + bytes([data[-1] ^ 1]))
    again = a_cache(form)
    assert again.fill(capturing(again)) == 4
    assert files == {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")}


def test_several_forms_are_captured_in_one_pass(capturing, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    model = load_model(tiny_llama)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    every = [a_cache(form) for form in (TOPK, SAMPLED, SAMPLED._replace(temperature=2.0))]
    run = teachers.local_pass(model, BLOCKS, 300, bf16=False)
    assert fill(every, run) == 10
    assert len(passes) == 3  # a batch for each shard
    more = [a_cache(SAMPLED), a_cache(SAMPLED._replace(temperature=4.0))]
    assert fill(more, run) == 10  # for the one that is new
    assert len(passes) == 6
    assert fill([*every, more[1]], run) == 0
    alone = TeacherCache(SETTINGS | {"teacher": "u"}, IDS.shape, TOPK)
    alone.fill(capturing(alone))
    assert torch.equal(alone.load_batch(np.arange(10))["logprobs"], every[0].load_batch(np.arange(10))["logprobs"])


def test_other_settings_are_another_cache(limbeck_home: Path) -> None:
    first = a_cache(SAMPLED)
    changed = [TeacherCache(SETTINGS | {name: "other"}, IDS.shape, SAMPLED) for name in SETTINGS]
    fields = {"kind": "topk", "size": 6, "vocab_size": 301, "temperature": 2.0}
    changed += [a_cache(SAMPLED._replace(**{name: value})) for name, value in fields.items()]  # type: ignore[arg-type]
    assert len({cache.folder for cache in [first, *changed]}) == 1 + len(changed)
    assert len({cache.seed for cache in [first, *changed]}) == 1 + len(changed)  # no draws in common


def test_arrays_of_ones_own_come_back(limbeck_home: Path) -> None:
    cache = TeacherCache(SETTINGS | {"kind": "own"}, IDS.shape)
    cache.fill(lambda blocks: {"a": IDS[blocks].astype(np.uint16), "b": blocks.astype(np.float16)})
    rows = cache.load_batch(np.array([9, 0]))
    assert torch.equal(rows["a"], torch.from_numpy(IDS[[9, 0]]).long())
    assert rows["b"].tolist() == [9.0, 0.0]


def test_padding_is_left_out_and_bf16_is_near(limbeck_home: Path, tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    every = np.arange(len(IDS))

    def logprobs(form: Form, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
        arrays = teachers.capture(model, BLOCKS, a_cache(form), bf16)(every)
        return arrays["ids"], arrays["logprobs"].astype(np.float32)

    _, exact = logprobs(Form("topk", 300, 300), bf16=False)
    assert np.exp(exact).sum(-1) == pytest.approx(1.0, abs=3e-3)
    ids, cut = logprobs(Form("topk", 200, 200), bf16=False)
    assert ids.max() == 199
    assert np.exp(cut).sum(-1) == pytest.approx(1.0, abs=3e-3)
    _, near = logprobs(Form("topk", 1, 300), bf16=True)
    assert np.abs(near - exact[..., :1]).max() < 0.1


# Fills the cache of this test with zeros, as slowly as it is told; says when it has begun and what it captured.
FILLER = """
import sys, time
import numpy as np
from distill import cache
from limbeck.distill.cache.encoding import Form
cache.SHARD_TOKENS = 48
made = cache.TeacherCache({"teacher": "t"}, (10, 12), Form("topk", 4, 300))
def capture(blocks):
    print("at", blocks[0], flush=True)
    time.sleep(float(sys.argv[1]))
    shape = (len(blocks), 12, 4)
    return {"ids": np.zeros(shape, np.uint16), "logprobs": np.full(shape, int(blocks[0]), np.float16)}
print("captured", made.fill(capture), flush=True)
"""


def filler(seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILLER, str(seconds)]
    root = str(ROOT)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root})


def test_two_processes_fill_a_cache_once(limbeck_home: Path) -> None:
    both = [filler(0.2), filler(0.2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(text.count("at") for text in said) == [0, 3]
    assert sorted(text.splitlines()[-1] for text in said) == ["captured 0", "captured 10"]


def test_a_killed_process_leaves_what_it_wrote_and_no_lock(limbeck_home: Path) -> None:
    process = filler(0.5)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["at 0\n", "at 4\n"]  # the first shard is written
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [folder] = (limbeck_home / "teacher-cache").iterdir()
    (folder / ".00001.safetensors.0.part").write_bytes(b"half")  # as a kill amid the writing leaves it
    assert filler(0).communicate(timeout=120)[0].splitlines() == ["at 4", "at 8", "captured 6"]
    assert not [*folder.glob(".*.part")]


def test_a_shard_that_is_gone_is_told(capturing) -> None:  # type: ignore[no-untyped-def]
    cache = a_cache(TOPK)
    cache.fill(capturing(cache))
    (cache.folder / "00002.safetensors").unlink()
    with pytest.raises(DamagedArtifact, match="00002"):
        cache.load_batch(np.array([9]))
