"""GPT-2 and the families built like it: layer norms and an MLP without a gate."""

from __future__ import annotations

from typing import Any

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Layer
from limbeck.export.graph.families.parts import activation_name, assemble_decoder, reorder_qkv
from limbeck.export.graph.reader import ModelReader, UnsupportedModel


def describe_gpt2(reader: ModelReader, model: Any) -> Decoder:
    config, body = model.config, model.transformer
    heads, size = config.n_head, config.n_embd // config.n_head
    layers = []
    for index, layer in enumerate(body.h):
        scale = size**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        qkv, output = reader.linear(layer.attn.c_attn), reader.linear(layer.attn.c_proj)
        attention = Attention(qkv, output, heads, heads, size, scale)
        activation = activation_name(config.activation_function)
        mlp = MLP(reader.linear(layer.mlp.c_fc), reader.linear(layer.mlp.c_proj), activation)
        norms = (reader.norm(layer.ln_1), reader.norm(layer.ln_2))
        layers.append(Layer(reader.name(layer), attention, mlp, *norms))
    return assemble_decoder(reader, model, body.wte, layers, body.ln_f, positions=reader.array(body.wpe.weight))


def describe_opt(reader: ModelReader, model: Any) -> Decoder:
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before or body.final_layer_norm is None:
        raise UnsupportedModel("norms after each part only")
    layers = []
    for layer in body.layers:
        name, attn = reader.name(layer), layer.self_attn
        qkv = reader.concatenate_linears(f"{name}.self_attn.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj)
        heads = attn.num_heads
        attention = Attention(qkv, reader.linear(attn.out_proj), heads, heads, attn.head_dim, float(attn.scaling))
        mlp = MLP(reader.linear(layer.fc1), reader.linear(layer.fc2), activation_name(config.activation_function))
        norms = (reader.norm(layer.self_attn_layer_norm), reader.norm(layer.final_layer_norm))
        layers.append(Layer(name, attention, mlp, *norms))
    positions = body.embed_positions
    return assemble_decoder(
        reader,
        model,
        body.embed_tokens,
        layers,
        body.final_layer_norm,
        positions=reader.array(positions.weight),
        first_position=positions.offset,
    )


def describe_gpt_neox(reader: ModelReader, model: Any) -> Decoder:
    config, body = model.config, model.gpt_neox
    heads = config.num_attention_heads
    rotary = reader.rotary(body.rotary_emb, config.max_position_embeddings)
    layers = []
    for layer in body.layers:
        attn, size = layer.attention, layer.attention.head_size
        qkv = reorder_qkv(reader.linear(attn.query_key_value), heads, size)
        attention = Attention(qkv, reader.linear(attn.dense), heads, heads, size, float(attn.scaling), rotary)
        up, down = reader.linear(layer.mlp.dense_h_to_4h), reader.linear(layer.mlp.dense_4h_to_h)
        mlp = MLP(up, down, activation_name(config.hidden_act))
        norms = (reader.norm(layer.input_layernorm), reader.norm(layer.post_attention_layernorm))
        layers.append(Layer(reader.name(layer), attention, mlp, *norms, parallel=config.use_parallel_residual))
    return assemble_decoder(reader, model, body.embed_in, layers, body.final_layer_norm)
