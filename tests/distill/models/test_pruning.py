"""Pruned students: they keep the teacher's weights, without the least important units."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from limbeck.distill.data.blocks import Blocks, make_blocks
from limbeck.distill.data.document import Document
from limbeck.distill.models.heldout import bits_per_byte
from limbeck.distill.models.pruning import importance, prune
from limbeck.distill.models.pruning_shapes import pruned_shape
from limbeck.distill.recipe.schema import Objective, Prune, Training
from limbeck.distill.students.initialise import fresh_model
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.checkpoints.load import load_config
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model
from tests.distill.conftest import DISTILLED, lines_of_text

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"]
Limbeck = Callable[..., Any]


def blocks_of(ids: np.ndarray, padded: int = 0) -> Blocks:
    """Blocks of one document each; every second one ends with `padded` tokens of padding."""
    segments = np.ones(ids.shape, dtype=np.uint16)
    if padded:
        segments[::2, -padded:] = 0
    targets = segments > 0
    targets[:, 0] = False
    return Blocks(ids.astype(np.int32), segments, targets, ids.size, ids.size, "made")


@pytest.fixture
def blocks() -> Blocks:
    return blocks_of(np.random.default_rng(0).integers(1, 300, (8, 24)), padded=5)


def make_teacher(folder: Path, tokenizer_folder: Path, model_type: str, **changes: object) -> PreTrainedModel:
    """A model in which no weight is near zero, nor any bias or norm."""
    sizes: dict[str, object] = {"num_hidden_layers": 3} | changes
    if model_type == "gpt2":
        sizes["n_layer"] = sizes.pop("num_hidden_layers")
    model = AutoModelForCausalLM.from_pretrained(make_model(folder, tokenizer_folder, model_type, **sizes))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def logits(model: PreTrainedModel, blocks: Blocks) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(blocks.ids).long()).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_pruning_nothing_changes_nothing(
    model_type: str, tmp_path: Path, tokenizer_folder: Path, blocks: Blocks
) -> None:
    teacher = make_teacher(tmp_path, tokenizer_folder, model_type)
    student = prune(teacher, Prune(), blocks)
    assert torch.equal(logits(student, blocks), logits(teacher, blocks))
    assert student.config.to_dict() == teacher.config.to_dict()
    student.get_input_embeddings().weight.data.zero_()
    assert teacher.get_input_embeddings().weight.abs().sum() > 0  # no weight is shared


# Parameters that write to the residual stream, and those that make the neurons, with the axis that is cut.
WRITERS = {
    "llama": {"embed_tokens.weight": 1, "o_proj.weight": 0, "down_proj.weight": 0},
    "gpt2": {"wte.weight": 1, "wpe.weight": 1, "c_proj.weight": 1, "c_proj.bias": 0},
    "gpt_neox": {"embed_in.weight": 1, "attention.dense.weight": 0, "attention.dense.bias": 0,
                 "dense_4h_to_h.weight": 0, "dense_4h_to_h.bias": 0},
}  # fmt: skip
NEURONS = {
    "llama": {"up_proj.weight": 0},
    "gpt2": {"c_fc.weight": 1, "c_fc.bias": 0},
    "gpt_neox": {"dense_h_to_4h.weight": 0, "dense_h_to_4h.bias": 0},
}


def values_of_heads(model_type: str, heads: list[int], size: int) -> tuple[dict[str, int], list[int]]:
    """The parameters of the value projections, with their axis, and the indices of `heads` on it."""
    inside = range(size)
    if model_type == "gpt2":  # all queries, all keys, all values
        return {"c_attn.weight": 1, "c_attn.bias": 0}, [2 * 32 + head * size + i for head in heads for i in inside]
    if model_type == "gpt_neox":  # query, key and value of each head side by side
        names = {"query_key_value.weight": 0, "query_key_value.bias": 0}
        return names, [(3 * head + 2) * size + i for head in heads for i in inside]
    return {"v_proj.weight": 0, "v_proj.bias": 0}, [head * size + i for head in heads for i in inside]


def zero(model: PreTrainedModel, axes: dict[str, int], indices: list[int], layer: int | None = None) -> None:
    for name, parameter in model.named_parameters():
        for end, axis in axes.items():
            if name.endswith(f".{end}") and (layer is None or f".{layer}." in name):
                parameter.data.index_fill_(axis, torch.tensor(indices), 0.0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_pruning_zeros_changes_nothing(model_type: str, tmp_path: Path, tokenizer_folder: Path, blocks: Blocks) -> None:
    """Channels, neurons, heads and a layer that the teacher does not use can all be cut at once."""
    teacher = make_teacher(tmp_path, tokenizer_folder, model_type)
    family = model_type if model_type in WRITERS else "llama"
    fused = family != "llama"  # a head must have hidden_size / num_attention_heads channels
    channels = [1, 2, 5, 7, 8, 9, 12, 16, 17, 20, 21, 25, 28, 29, 30, 31] if fused else [0, 3, 9, 17, 24, 25, 30, 31]
    others = [channel for channel in range(32) if channel not in channels]
    for name, parameter in teacher.named_parameters():
        for end, axis in WRITERS[family].items():
            if fused and name.endswith(f".{end}"):  # LayerNorm subtracts the mean, which the cut must not change
                kept = parameter.data.index_select(axis, torch.tensor(others))
                parameter.data.index_copy_(axis, torch.tensor(others), kept - kept.mean(axis, keepdim=True))
        if fused and parameter.ndim == 1 and ("ln_" in name or "norm" in name):
            parameter.data[channels] = 0.0
    zero(teacher, WRITERS[family], channels)
    for layer, neurons in enumerate((range(0, 20), range(10, 60), range(44, 64))):
        zero(teacher, NEURONS[family], list(neurons), layer)
    size = 16 if model_type == "qwen3" else 8
    for layer, dead in enumerate(([0, 2], [1, 3], [1, 2]) if fused else ([0], [1], [1])):
        zero(teacher, *values_of_heads(model_type, dead, size), layer)
    zero(teacher, WRITERS[family] | {"embed_tokens.weight": 1}, list(range(32)), layer=1)  # this layer has no effect
    spec = Prune(
        layers=(0, 2),
        hidden_size=32 - len(channels),
        intermediate_size=128 - 20 if model_type == "gpt2" else 44,
        num_attention_heads=2,
        num_key_value_heads=None if fused else 1,
    )
    student = prune(teacher, spec, blocks)
    whole = logits(teacher, blocks)
    assert whole.std() > 0.3
    torch.testing.assert_close(logits(student, blocks), whole, atol=2e-4, rtol=2e-4)
    student.save_pretrained(tmp_path / "student")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(loaded, blocks), logits(student, blocks))


def plain_importance(model: PreTrainedModel, blocks: Blocks) -> dict[tuple[str, int | None], torch.Tensor]:
    """A reference: layer by layer and block by block, with attention written out."""
    config = model.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    seen: dict[tuple[str, int | None, str], list[torch.Tensor]] = {}
    for ids, segments in zip(torch.from_numpy(blocks.ids).long(), blocks.segments, strict=True):
        real = torch.from_numpy(segments > 0)
        length = len(ids)
        x = model.model.embed_tokens(ids)
        cos, sin = model.model.rotary_emb(x[None], torch.arange(length)[None])
        later = torch.ones(length, length, dtype=torch.bool).triu(1)

        def record(kind: str, layer: int | None, place: str, value: torch.Tensor, real: torch.Tensor = real) -> None:
            seen.setdefault((kind, layer, place), []).append(value[real].double().mean(0))

        for number, layer in enumerate(model.model.layers):
            normed = layer.input_layernorm(x)
            record("hidden", None, f"{number} first", normed.abs())
            q = layer.self_attn.q_proj(normed).view(length, heads, size).transpose(0, 1)
            k = layer.self_attn.k_proj(normed).view(length, groups, size).transpose(0, 1)
            v = layer.self_attn.v_proj(normed).view(length, groups, size).transpose(0, 1)
            q, k = (each[0] for each in apply_rotary_pos_emb(q[None], k[None], cos, sin))
            out = []
            for head in range(heads):
                group = head // (heads // groups)
                scores = (q[head] @ k[group].T / size**0.5).masked_fill(later, float("-inf"))
                out.append(scores.softmax(-1) @ v[group])
            record("heads", number, "", torch.stack([each.square().sum(-1).sqrt() for each in out], -1))
            x = x + layer.self_attn.o_proj(torch.cat(out, -1))
            normed = layer.post_attention_layernorm(x)
            record("hidden", None, f"{number} second", normed.abs())
            inner = torch.nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
            record("neurons", number, "", inner.abs())
            x = x + layer.mlp.down_proj(inner)
        record("hidden", None, "last", model.model.norm(x).abs())
    scores: dict[tuple[str, int | None], torch.Tensor] = {}
    for (kind, number, _), values in seen.items():
        norm = torch.stack(values).square().sum(0).sqrt()
        scores[kind, number] = scores.get((kind, number), torch.zeros(())) + norm
    return scores


@torch.no_grad()
def test_importance_equals_a_plain_reference(tmp_path: Path, tokenizer_folder: Path, blocks: Blocks) -> None:
    teacher = make_teacher(tmp_path, tokenizer_folder, "llama")
    expected = plain_importance(teacher, blocks)
    found = importance(teacher, blocks, np.arange(len(blocks.ids)))
    assert found.keys() == expected.keys()
    for key, scores in expected.items():
        torch.testing.assert_close(found[key], scores, atol=1e-5, rtol=1e-5, msg=str(key))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (4, 4), (6, 3), (3, 3)])
def test_heads_stay_with_their_group(
    tmp_path: Path, tokenizer_folder: Path, blocks: Blocks, heads: int, kv_heads: int
) -> None:
    """Keeps the groups and heads with the highest total importance of all possible choices."""
    teacher = make_teacher(tmp_path, tokenizer_folder, "qwen2", num_attention_heads=8, num_key_value_heads=4)
    student = prune(teacher, Prune(num_attention_heads=heads, num_key_value_heads=kv_heads), blocks)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (heads, kv_heads)
    scores = importance(teacher, blocks, np.arange(len(blocks.ids)))
    inside = list(itertools.combinations(range(2), heads // kv_heads))
    for layer in range(3):
        worth = scores["heads", layer]
        ways = [
            [(group, [2 * group + i for i in members]) for group, members in zip(groups, chosen, strict=True)]
            for groups in itertools.combinations(range(4), kv_heads)
            for chosen in itertools.product(inside, repeat=kv_heads)
        ]
        best = max(ways, key=lambda way: sum(float(worth[head]) for _, members in way for head in members))
        ours, theirs = (model.model.layers[layer].self_attn for model in (student, teacher))
        queries = theirs.q_proj.weight.view(8, 4, 32)[[head for _, members in best for head in members]]
        keys = theirs.k_proj.bias.view(4, 4)[[group for group, _ in best]]
        assert torch.equal(ours.q_proj.weight.view(heads, 4, 32), queries)
        assert torch.equal(ours.k_proj.bias.view(kv_heads, 4), keys)


def test_layers_are_evenly_spread(tmp_path: Path, tokenizer_folder: Path, blocks: Blocks) -> None:
    config = load_config(make_model(tmp_path, tokenizer_folder, "gpt2", n_layer=12))
    assert pruned_shape(config, Prune(num_hidden_layers=6)).layers == (0, 2, 4, 7, 9, 11)  # DistilGPT2's
    assert pruned_shape(config, Prune(num_hidden_layers=2)).layers == (0, 11)
    assert pruned_shape(config, Prune(num_hidden_layers=12)).layers == tuple(range(12))
    assert pruned_shape(config, Prune(layers=(3, 4))).layers == (3, 4)


def test_each_layer_keeps_its_attention_type(tmp_path: Path, tokenizer_folder: Path, blocks: Blocks) -> None:
    """`layer_types` (sliding window or full attention) is cut with the layers."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    changes: dict[str, object] = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 8}
    teacher = make_teacher(tmp_path / "teacher", tokenizer_folder, "qwen2", **changes)
    prune(teacher, Prune(layers=(1, 2)), blocks).save_pretrained(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.layer_types == kinds[1:]
    hidden = student.model.embed_tokens(torch.from_numpy(blocks.ids).long())
    assert torch.equal(hidden, teacher.model.embed_tokens(torch.from_numpy(blocks.ids).long()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[PreTrainedModel, Blocks, Blocks]:
    """A trained teacher, with its training and held-out blocks."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    text, heldout = ([Document("a", lines_of_text(lines, seed))] for seed, lines in ((0, 900), (1, 200)))
    blocks, heldout_blocks = (make_blocks(documents, tokenizer, 32) for documents in (text, heldout))
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4}
    teacher = fresh_model({"model_type": "llama", "num_attention_heads": 4, **sizes}, tokenizer, 32, seed=0)
    learn(teacher, blocks, heldout_blocks, folder, steps=50)
    return teacher, blocks, heldout_blocks


def learn(model: PreTrainedModel, blocks: Blocks, heldout: Blocks, folder: Path, steps: int) -> float:
    """Train on labels; returns held-out bits per byte."""
    training = Training(
        max_steps=steps, per_device_train_batch_size=8, optim="muon", learning_rate=1e-2, bf16=False, eval_steps=1000
    )
    objective = Objective(labels=1.0)
    train(Job(model, blocks, heldout, objective, training, None, folder, seed=0, vocab_size=300))
    return bits_per_byte(model, heldout)


@pytest.mark.parametrize(
    "cut",
    [{"num_hidden_layers": 2}, {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}],
    ids=["layers", "width"],
)
def test_a_pruned_student_learns_faster_than_a_fresh_one(
    trained: tuple[PreTrainedModel, Blocks, Blocks], cut: dict[str, Any], tmp_path: Path
) -> None:
    """Compared with a student of the same shape with random weights, after the same number of tokens."""
    teacher, blocks, heldout = trained
    pruned = prune(teacher, Prune(**cut), blocks)
    random = AutoModelForCausalLM.from_config(pruned.config)
    assert pruned.num_parameters() == random.num_parameters() < teacher.num_parameters()
    steps = 4
    assert learn(pruned, blocks, heldout, tmp_path / "pruned", steps) < 0.6 * learn(
        random, blocks, heldout, tmp_path / "random", steps
    )


@pytest.mark.parametrize(
    ("model_type", "cut", "message"),
    [
        ("llama", {"layers": (0, 3)}, "layer 3 does not exist: the teacher's layers are 0 to 1"),
        ("llama", {"layers": (1, 0)}, "must be ascending numbers"),
        ("llama", {"layers": (-1, 0)}, "must be ascending numbers"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers = 3 is more than the teacher's 2"),
        ("llama", {"hidden_size": 33}, "hidden_size = 33 is more than the teacher's 32"),
        ("gpt2", {"intermediate_size": 129}, "intermediate_size = 129 is more than the teacher's 128"),
        ("llama", {"num_attention_heads": 3}, "3 attention heads cannot share 2 key-value heads"),
        ("llama", {"num_key_value_heads": 1}, "give num_attention_heads = 2 with num_key_value_heads = 1"),
        ("gpt2", {"hidden_size": 24}, "give hidden_size = 32 with num_attention_heads = 4"),
        ("gpt_neox", {"num_attention_heads": 3}, "give hidden_size = 24 with num_attention_heads = 3"),
        ("bloom", {"num_hidden_layers": 1}, "prunable teachers: llama, mistral, qwen2"),
        ("gpt2", {"layers": (1,)}, "keep the first ones: layers = [0]"),
        ("llama", {}, "quantized"),
    ],
)
def test_impossible_shapes_are_refused(
    tmp_path: Path, tokenizer_folder: Path, model_type: str, cut: dict[str, Any], message: str
) -> None:
    config = load_config(make_model(tmp_path, tokenizer_folder, model_type))
    config.scale_attn_by_inverse_layer_idx = model_type == "gpt2"
    if not cut:
        config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadInput, match=re.escape(message)):
        pruned_shape(config, Prune(**cut))


def write_prune_recipe(recipe: Path, cut: str) -> Path:
    text = recipe.read_text()
    begin, end = text.index("[students.small.config]"), text.index("[objectives")
    recipe.write_text(f"{text[:begin]}[students.small.prune]\n{cut}\n{text[end:]}")
    return recipe


def test_a_recipe_with_pruned_students(
    store: Store, limbeck: Limbeck, write_recipe: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path
) -> None:
    """One is only pruned; one also has a LoRA adapter, which is merged, is saved in bfloat16 and exported."""
    teacher = make_model(tmp_path / "teacher", tokenizer_folder, "qwen2")
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "top_k": 7}))
    cut = "num_hidden_layers = 1\nhidden_size = 24\n"
    adapted = f'[students.adapted]\ndtype = "bfloat16"\nlora = {{ r = 4 }}\n[students.adapted.prune]\n{cut}'
    done = limbeck("distill", write_prune_recipe(write_recipe(teacher), cut + adapted), "--format", "json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert [student["recipe"] for student in made] == ["small", "adapted"]
    # They learn from labels alone, but are made from the teacher.
    assert [student["parent"] for student in made] == ["tiny/1", "tiny/1"]
    for student, dtype in zip(made, (torch.float32, torch.bfloat16), strict=True):
        folder = store.artifacts.verified_folder(store.get(f"tiny/{student['version']}"))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        config = model.config
        assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (24, 1, 8)
        assert (config.num_attention_heads, config.intermediate_size, config.vocab_size) == (4, 64, 300)
        assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([5, 0], 7)
        assert sum(p.numel() for p in model.parameters()) == student["params"]
        assert model.dtype == dtype
        assert not list(folder.glob("adapter*"))
    done = limbeck("export", "tiny/3", "--precision", "fp32", "--format", "json")
    assert done.code == 0, done.err


def test_a_mistake_in_prune_is_an_error_before_the_teacher_runs(
    store: Store, limbeck: Limbeck, write_recipe: Callable[..., Path], tiny_llama: Path, limbeck_home: Path
) -> None:
    recipe = write_prune_recipe(write_recipe(tiny_llama, objectives=DISTILLED), "num_hidden_layers = 9")
    done = limbeck("distill", recipe)
    assert done.code == 2
    assert "recipe.toml" in done.err
    assert "students.small.prune: num_hidden_layers = 9 is more than the teacher's 2" in done.err
    assert not (limbeck_home / "teacher-cache").exists()
