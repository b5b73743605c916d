"""The description of a decoder-only transformer: all that its graph depends on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Linear:
    """x @ weight + bias, with float32 weight (in, out) and bias (out,) or None."""

    name: str
    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class Norm:
    """RMS norm (Zhang and Sennrich, arXiv 1910.07467), or layer norm if there is a bias: (H,) float32 each.

    A norm of queries or keys may have a weight and a bias for each head: (heads, head_size).
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray | None
    eps: float


@dataclass(frozen=True)
class Rotary:
    """Tables of a rotary embedding (Su et al., arXiv 2104.09864): cos and sin, (positions, rotated / 2) float32.

    Attributes:
        interleaved: rotates the pairs (0, 1), (2, 3), ... of a head, not (0, rotated / 2), (1, rotated / 2 + 1), ...
    """

    name: str
    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool = False


@dataclass(frozen=True)
class Attention:
    """Causal attention of `heads` query heads that share `kv_heads` (Ainslie et al., arXiv 2305.13245).

    Attributes:
        qkv: its outputs are the queries of all heads, then the keys, then the values.
        scale: multiplies the scores.
        rotary: None if the layer has no rotary embedding.
        window: a position sees the last `window` positions, including itself; -1 is all.
        softcap: if not 0, scores become softcap * tanh(score / softcap).
        q_norm, k_norm: norms of queries and keys, per head if their weight has `head_size` entries, or a row of them
            for each head; may be None.
        norm_after_rotary: queries and keys are rotated first, then normed.
        query_scale: (positions,) float32; multiplies the queries at each position. May be None.
        clip: if not 0, queries, keys and values are clipped to [-clip, clip] first.
        v_norm: norm of the values, per head; may be None.
        sinks: a score per head that joins the softmax and has no value (Xiao et al., arXiv 2309.17453); (heads,)
            float32 or None.
        kv_layer: the index of an earlier layer whose keys and values are read (Brandon et al., arXiv 2405.12981), and
            `qkv` has the queries only; None if the layer has its own.
        gate: its sigmoid multiplies what the heads give, before `output`; may be None.
    """

    qkv: Linear
    output: Linear
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    rotary: Rotary | None = None
    window: int = -1
    softcap: float = 0.0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_after_rotary: bool = False
    query_scale: np.ndarray | None = None
    clip: float = 0.0
    v_norm: Norm | None = None
    sinks: np.ndarray | None = None
    kv_layer: int | None = None
    gate: Linear | None = None


@dataclass(frozen=True)
class Convolution:
    """Each channel of a token and of the tokens before it, times weight (C, width), plus bias (C,) or None: float32."""

    name: str
    weight: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class ShortConvolution:
    """output(after * convolution(before * value)), where before, after and value are what `input` gives (LFM2)."""

    input: Linear
    convolution: Convolution
    output: Linear


@dataclass(frozen=True)
class GatedDelta:
    """Gated delta rule (Yang et al., arXiv 2412.06464): a matrix per head, which each token decays and corrects.

    Attributes:
        input: gives queries, keys and values, which are convolved; then a gate for each value, and a rate of update
            and a decay for each value head.
        decay_bias, decay_scale: (value_heads,) float32; the decay is exp(decay_scale * softplus(decay + decay_bias)).
        norm: of what each value head gives; the silu of the gate multiplies it.
    """

    input: Linear
    convolution: Convolution
    decay_bias: np.ndarray
    decay_scale: np.ndarray
    norm: Norm
    output: Linear
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class XIELU:
    """xIELU (Huang and Schlag, arXiv 2411.13010), an activation with parameters.

    x > 0: positive * x^2 + beta * x; else: negative * (exp(min(x, eps)) - 1 - x) + beta * x.
    """

    positive: float
    negative: float
    beta: float
    eps: float


@dataclass(frozen=True)
class MLP:
    """down(act(up(x))), or down(act(gate(x)) * up(x)) if there is a gate (Shazeer, arXiv 2002.05202)."""

    up: Linear
    down: Linear
    activation: str | XIELU  # a key of limbeck.export.graph.builder.ACTIVATIONS
    gate: Linear | None = None


@dataclass(frozen=True)
class Router:
    """Chooses experts for each token, and their weights.

    The scores are the softmax or the sigmoid of the logits. The `chosen` experts of the highest score + bias run; their
    weights are their scores.

    Attributes:
        logits: its outputs are one logit per expert.
        sigmoid: the scores are the sigmoid, not the softmax.
        bias: (E,) float32 or None.
        normalize: the weights are divided by their sum.
    """

    logits: Linear
    chosen: int
    normalize: bool
    sigmoid: bool = False
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class Experts:
    """Mixture of E experts, of which each token runs a few (Shazeer et al., arXiv 1701.06538).

    An expert is down(gate * sigmoid(alpha * gate) * (up + beta)), where gate is at most `limit` and up within it. A
    shared MLP is added, times the sigmoid of the one output of `shared_gate` if there is one.

    Attributes:
        gate_up: (E, 2 * I, H) float32; rows of gate and up alternate.
        down: (E, H, I) float32.
        gate_up_bias, down_bias: (E, 2 * I) and (E, H) float32; None if there are none.
        limit: 0 is none.
    """

    name: str
    router: Router
    gate_up: np.ndarray
    down: np.ndarray
    gate_up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0
    shared: MLP | None = None
    shared_gate: Linear | None = None


@dataclass(frozen=True)
class TokenInput:
    """x += norm(project(act(gate(x)) * t)), where t is what the layer reads of the token itself (`TokenInputs`)."""

    gate: Linear
    project: Linear
    norm: Norm
    activation: str | XIELU  # a key of limbeck.export.graph.builder.ACTIVATIONS


@dataclass(frozen=True)
class Layer:
    """x += after_attention(attention(before_attention(x))), then the same with the MLP; a norm may be None.

    In a parallel layer, attention and MLP both read the layer's input. A recurrence may stand in place of attention.
    At the end, `token_input` is added if it is not None, and x is multiplied by `scale`.
    """

    name: str
    attention: Attention | ShortConvolution | GatedDelta
    mlp: MLP | Experts
    before_attention: Norm | None
    before_mlp: Norm | None
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    parallel: bool = False
    token_input: TokenInput | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class TokenInputs:
    """Gemma's input of each layer, P numbers: table_scale * table[token] + norm(project(embedding)).

    Attributes:
        table: (V, layers * P) float32, all layers side by side.
        project: from the scaled embedding to layers * P.
        norm: of P entries.
    """

    name: str
    table: np.ndarray
    table_scale: float
    project: Linear
    norm: Norm


@dataclass(frozen=True)
class Decoder:
    """A model: everything that its graph depends on.

    Attributes:
        embedding: (V, H) float32, multiplied by `embedding_scale`.
        norm: the norm after the last layer.
        head: None if the head is tied to the embedding.
        embedding_norm: norm of the embedding, or None.
        positions: learned positions, (positions, H) float32, or None; position 0 is row `first_position`.
        head_bias: bias of a tied head, (V,) float32, or None.
        logit_scale: multiplies the logits; then, if logit_softcap is not 0, they become
            logit_softcap * tanh(logit / logit_softcap).
        alibi: (heads,) float32 or None: in all layers, the score of a key at position p grows by alibi * p (Press et
            al., arXiv 2108.12409).
        max_positions: the graph is right for texts of this length only; None: for all that the model takes.
        token_inputs: what the layers with a `token_input` read; None if there are none.
    """

    embedding_name: str
    embedding: np.ndarray
    layers: list[Layer]
    norm: Norm
    head: Linear | None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    positions: np.ndarray | None = None
    first_position: int = 0
    head_bias: np.ndarray | None = None
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    alibi: np.ndarray | None = None
    max_positions: int | None = None
    token_inputs: TokenInputs | None = None
