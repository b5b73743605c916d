"""The fused graph gives the logits of transformers, with left and right padding, with a dynamic and a static cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fused_model import FusedModel, make_fused_model, make_torch_model, positions

LENGTH = 24  # tokens of a text
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=128, vocab_size=300)  # fmt: skip
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=300)
WINDOW = dict(sliding_window=5)  # much shorter than the text

# Each model has one part that the others lack.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", SIZES | dict(tie_word_embeddings=True)),
    "biases": ("llama", SIZES | dict(attention_bias=True, mlp_bias=True)),
    "heads of 8": ("llama", SIZES | dict(head_dim=8)),
    "yarn": ("llama", SIZES | dict(rope_scaling=dict(rope_type="yarn", factor=4.0))),
    "linear": ("llama", SIZES | dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "window": ("mistral", SIZES | WINDOW),
    "packed": ("phi3", SIZES | WINDOW),
    "norms of queries and keys": ("qwen3", SIZES | dict(head_dim=32)),
    "norms across heads": ("olmo2", SIZES),
    "layers without rotary": ("smollm3", SIZES | dict(no_rope_layer_interval=2)),
    "soft caps": ("gemma2", SIZES | WINDOW | dict(head_dim=16, attn_logit_softcapping=0.5, final_logit_softcapping=0.5,
                                                  query_pre_attn_scalar=4)),
    "two rotary tables": ("gemma3_text", SIZES | WINDOW | dict(
        head_dim=16, layer_types=["sliding_attention", "full_attention"], rope_theta=100.0, query_pre_attn_scalar=4)),
    "multipliers": ("granite", SIZES | dict(embedding_multiplier=3.0, attention_multiplier=0.2,
                                            residual_multiplier=0.7, logits_scaling=2.0)),
    "partial rotary": ("gpt_neox", SIZES | dict(hidden_size=64, rotary_pct=0.5)),
    "partial rotary of 8": ("gpt_neox", SIZES | dict(rotary_pct=0.5, use_parallel_residual=False)),
    "one norm for both": ("stablelm", SIZES | dict(use_parallel_residual=True, use_qkv_bias=True)),
    "a bias on the head": ("phi", SIZES | dict(partial_rotary_factor=0.5)),
    "a bias on a tied head": ("phi", SIZES | dict(tie_word_embeddings=True)),
    "learned positions": ("gpt2", GPT2 | dict(scale_attn_by_inverse_layer_idx=True)),
    "neighbours rotated": ("glm", SIZES | dict(head_dim=16, partial_rotary_factor=0.5)),
    "rotated the other way": ("nanochat", SIZES),
    "norms after rotary": ("hunyuan_v1_dense", SIZES | dict(head_dim=16)),
    "a norm for each head": ("stablelm", SIZES | dict(qk_layernorm=True)),
    "queries scaled by position": ("ministral3", SIZES | WINDOW | dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=8,
        llama_4_scaling_beta=0.5))),
    "clipped": ("olmo", SIZES | dict(clip_qkv=0.5)),
    "xIELU, a head for some tokens": ("apertus1p5_text", SIZES | dict(output_vocab_size=200)),
    "relu2": ("arcee", SIZES),
    "ALiBi": ("bloom", dict(hidden_size=48, n_layer=2, n_head=6, vocab_size=300)),
    "one key head": ("falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)),
    "positions from 2": ("opt", SIZES | dict(ffn_dim=64, word_embed_proj_dim=32, activation_function="gelu")),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    return make_fused_model(make_torch_model(*MODELS[request.param]), tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 300, (3, LENGTH))


# Their numbers depend on the position in the text, not only on distances.
MODEL_TYPES_WITH_POSITIONS = {
    "gpt2",
    "gpt_bigcode",
    "opt",
    "biogpt",
    "xglm",
    "hunyuan_v1_dense",
    "ministral3",
    "nanochat",
}
WHOLE = np.ones((3, LENGTH), np.int64)
LEFT = np.arange(LENGTH) >= np.array([[0], [7], [16]])  # rows of 24, 17 and 8 tokens
LEFT = LEFT.astype(np.int64)
RIGHT = LEFT[:, ::-1].copy()


def is_close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.allclose(ours, theirs, rtol=1e-4, atol=1e-4))


def test_logits_are_those_of_transformers(model: FusedModel, ids: np.ndarray) -> None:
    expected = model.reference(ids, WHOLE)
    assert expected.std() > 0.2, "the logits are nearly uniform"
    assert is_close(model.run(ids, WHOLE, positions(WHOLE))[0], expected)


def test_positions_whose_ids_are_given_get_logits(model: FusedModel, ids: np.ndarray) -> None:
    if model.session.get_modelmeta().custom_metadata_map["limbeck.logits"] == "all":
        assert model.torch.config.model_type in MODEL_TYPES_WITH_POSITIONS
        return
    logits, _ = model.run(ids, WHOLE, positions(WHOLE)[:, -3:])
    assert is_close(logits, model.reference(ids, WHOLE)[:, -3:])


def test_left_padding_does_not_change_logits(model: FusedModel, ids: np.ndarray) -> None:
    real = LEFT > 0
    logits, _ = model.run(ids, LEFT, positions(LEFT))
    assert np.isfinite(logits).all()
    assert is_close(logits[real], model.reference(ids, LEFT)[real])
    alone, _ = model.run(ids[2:, 16:], WHOLE[2:, 16:], positions(WHOLE[2:, 16:]))
    assert is_close(logits[2, 16:], alone[0])


def test_a_left_padded_batch_decodes_with_a_dynamic_cache(model: FusedModel, ids: np.ndarray) -> None:
    prompt_length = LENGTH - 4
    _, past = model.run(ids[:, :prompt_length], LEFT[:, :prompt_length], positions(LEFT)[:, :prompt_length])
    expected = model.reference(ids, LEFT)
    for t in range(prompt_length, LENGTH):
        logits, past = model.run(ids[:, t : t + 1], LEFT[:, : t + 1], positions(LEFT)[:, t : t + 1], past)
        assert past[0].shape[2] == t + 1
        assert is_close(logits[:, 0], expected[:, t])


def test_rows_of_different_lengths_decode_with_a_static_cache(model: FusedModel, ids: np.ndarray) -> None:
    buffers, lengths = model.buffers(3), RIGHT.sum(axis=1)
    logits = model.run_with_static_cache(ids, RIGHT, positions(RIGHT), buffers)
    texts = np.concatenate([ids, ids[:, ::-1]], axis=1)
    whole = model.reference(texts[:, :LENGTH], WHOLE)
    assert is_close(logits[RIGHT > 0], whole[RIGHT > 0])
    # Each row continues after its own end, and overwrites what was written for its padding.
    for step in range(6):
        new = texts[:, LENGTH + step : LENGTH + step + 1]
        ends = lengths + step
        mask = (np.arange(ends.max() + 1) <= ends[:, None]).astype(np.int64)
        logits = model.run_with_static_cache(new, mask, ends[:, None], buffers)
        for row, n in enumerate(lengths):
            text = np.append(ids[row, :n], texts[row, LENGTH : LENGTH + step + 1])[None]
            assert is_close(logits[row, 0], model.reference(text, np.ones_like(text))[0, -1])


def test_a_prompt_may_be_read_in_chunks(model: FusedModel, ids: np.ndarray) -> None:
    one, expected, buffers = ids[:1], model.reference(ids[:1], WHOLE[:1])[0], model.buffers(1)
    for start, end in ((0, 9), (9, 10), (10, LENGTH)):
        mask, places = np.ones((1, end), np.int64), np.arange(start, end)[None]
        assert is_close(model.run_with_static_cache(one[:, start:end], mask, places, buffers)[0], expected[start:end])
