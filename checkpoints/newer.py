"""Families of 2023 and later: Gemma, Phi, OLMo, Granite, MiniCPM, Cohere, Qwen 1 and others that start from LLaMA.

A family is a reader and a table, as in families.py. Four of them multiply what attention and MLP add to the stream, or
the logits, by a constant: W x * c is (c W) x, so our o_proj, down_proj and last norm are the file's times that constant
(`multiplier`). The model itself knows nothing of it.
"""
import math
import re
from dataclasses import replace

from checkpoints.readers import (
    ATTENTION,
    FUSED,
    GATED,
    LAYER_NORM,
    LLAMA,
    NORMS,
    OUTER,
    PLAIN,
    QK_NORMS,
    activation,
    llama,
    read,
    rope,
    table,
    window,
)
from model import ModelConfig

# ---------------------------------------------------------------- other norms, windows, soft caps

def starcoder2(raw: dict) -> ModelConfig:
    bias = bool(raw.get("use_bias", True))
    return read({"tie_word_embeddings": True, **raw}, "gelu_pytorch_tanh", **PLAIN | {
        "norm_eps": raw.get("norm_epsilon", 1e-5), "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias},
        **rope(raw), **window(raw))


STARCODER2 = table("layers.*.", NORMS | ATTENTION | {"mlp.c_fc": "up_proj", "mlp.c_proj": "down_proj"}, **OUTER)


def gemma(raw: dict) -> ModelConfig:
    """Embeddings times sqrt(C), GeGLU; hidden_act says "gelu" and means tanh."""
    raw = {"head_dim": 256, "tie_word_embeddings": True, **raw}
    raw["hidden_activation"] = raw.get("hidden_activation", "gelu_pytorch_tanh")
    return replace(llama(raw), embed_scale=math.sqrt(raw["hidden_size"]))


def gemma2(raw: dict) -> ModelConfig:
    """Norms on both sides of attention and MLP, soft caps, and a window in every other layer."""
    raw = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, **raw}
    return replace(gemma(raw), block="sandwich", attention_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5,
                   attention_softcap=raw["attn_logit_softcapping"] or None,
                   final_softcap=raw["final_logit_softcapping"] or None, **window(raw, lambda i: i % 2 == 0))


def gemma3(raw: dict) -> ModelConfig:
    """Five layers with a window to one without, each kind with its own theta; norms on q and k. Multimodal files nest
    the text model's config, and leave out what is as usual."""
    text = {k: v for k, v in raw.get("text_config", raw).items() if v is not None}
    if text.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: an embedding model, not a decoder")
    text = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
            "sliding_window": 4096, "attn_logit_softcapping": 0, "final_logit_softcapping": 0, "rope_theta": 1e6,
            **text}
    local, every, kinds = text.get("rope_local_base_freq", 1e4), text.get("sliding_window_pattern", 6), text.pop(
        "rope_parameters", None)
    if kinds and "full_attention" in kinds:                                    # transformers 5: one entry for each kind
        text["rope_parameters"], local = kinds["full_attention"], kinds["sliding_attention"].get("rope_theta", 1e4)
    every = text.get("_sliding_window_pattern", every)
    config = replace(gemma2(text), qk_norm="head", rope_theta_local=float(local))
    return replace(config, **{"window": None, "full_layers": ()} | window(text, lambda i: (i + 1) % every))


SANDWICH = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "post_attention_layernorm", "post_feedforward_layernorm": "mlp_out_norm"}
GEMMA2 = table("layers.*.", SANDWICH | ATTENTION | GATED | QK_NORMS, **OUTER)


def phi(raw: dict) -> ModelConfig:
    """Phi-1, 1.5, 2."""
    return read(raw, "gelu_new", **PLAIN | {"norm_eps": raw.get("layer_norm_eps", 1e-5)}, parallel=1, head_bias=True,
                qk_norm="head" if raw.get("qk_layernorm") else "", **rope(raw, part=0.5))


PHI = table("layers.*.", ATTENTION | {
    "input_layernorm": "input_layernorm", "self_attn.dense": "o_proj", "mlp.fc1": "up_proj", "mlp.fc2": "down_proj",
    "self_attn.q_layernorm": "q_norm", "self_attn.k_layernorm": "k_norm"},
    embed_tokens="embed_tokens", norm="final_layernorm")


def phi_first(raw: dict) -> ModelConfig:
    """The same three in the names of their first files (phi-msft)."""
    return read(raw, "gelu_new", **PLAIN | {"norm_eps": raw.get("layer_norm_epsilon", 1e-5)}, parallel=1,
                head_bias=True, num_kv_heads=raw.get("n_head_kv"), rope_dim=raw.get("rotary_dim", 32))


PHI_FIRST = table("h.*.", {
    "ln": "input_layernorm", "mixer.Wqkv": FUSED, "mixer.out_proj": "o_proj", "mlp.fc1": "up_proj",
    "mlp.fc2": "down_proj"}, embed_tokens="embd__wte", norm="lm_head__ln", lm_head="lm_head__linear")


def phi3(raw: dict) -> ModelConfig:
    """Phi-3, 3.5, 4. The long versions divide RoPE's frequencies by a list, another one beyond the trained length."""
    trained = raw.get("original_max_position_embeddings")
    turns = rope({"rms_norm_eps": 1e-5, **raw})
    if (scaling := turns["rope_scaling"]) and scaling["rope_type"] == "yarn":  # what some of the first files call it
        scaling["rope_type"] = "longrope"
    if scaling and trained:
        scaling.setdefault("original_max_position_embeddings", trained)
    return replace(read({"rms_norm_eps": 1e-5, **raw}, "silu", **turns), **window(raw))


PHI3 = LLAMA | table("layers.*.", {"self_attn.qkv_proj": FUSED, "mlp.gate_up_proj": "gate_proj up_proj"})


def olmo(raw: dict) -> ModelConfig:
    """LayerNorm without weights."""
    return replace(llama(raw), norm="layer", norm_eps=1e-5, norm_weight=False, clip_qkv=raw.get("clip_qkv"))


def olmo2(raw: dict) -> ModelConfig:
    """Norms behind attention and MLP, inside the residual; norms over all of q and of k."""
    return replace(llama({"rms_norm_eps": 1e-5, **raw}), block="inner", qk_norm="full")


OLMO2 = table("layers.*.", ATTENTION | GATED | QK_NORMS | {
    "post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "mlp_out_norm"}, **OUTER)


def olmo3(raw: dict) -> ModelConfig:
    """OLMo 2 with a window in three of four layers; a rope_scaling is for the layers without one."""
    raw = {"rope_theta": 5e5, "sliding_window": 4096, "rms_norm_eps": 1e-5, **raw}
    kinds, local = raw.pop("rope_parameters", None), raw["rope_theta"]
    if kinds:                                                                  # transformers 5: one entry for each kind
        raw["rope_parameters"], local = kinds["full_attention"], kinds["sliding_attention"].get("rope_theta", local)
    return replace(olmo2(raw), rope_theta_local=float(local), **window(raw, lambda i: (i + 1) % 4))


def olmo_first(raw: dict) -> ModelConfig:
    """OLMo 1 in the names of its first files. ff_proj holds up, then gate; the width counts both."""
    odd = [k for k in ("alibi", "include_bias", "layer_norm_with_affine", "attention_layer_norm") if raw.get(k)]
    if odd or raw.get("activation_type", "swiglu") != "swiglu" or not raw.get("rope", True):
        raise ValueError(f"an OLMo with {odd or 'another activation or without RoPE'}: no published one is like that")
    both = raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * raw["d_model"]
    return read(raw, "silu", vocab_size=raw.get("embedding_size") or raw["vocab_size"], intermediate_size=both // 2,
                num_kv_heads=raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else None), norm="layer",
                norm_eps=raw.get("layer_norm_eps", 1e-5), norm_weight=False, clip_qkv=raw.get("clip_qkv"),
                tie_embeddings=bool(raw.get("weight_tying", True)), rope_theta=float(raw.get("rope_theta", 10000.0)))


OLMO_FIRST = table("blocks.*.", {
    "att_proj": FUSED, "attn_out": "o_proj", "ff_proj": "up_proj gate_proj", "ff_out": "down_proj"},
    embed_tokens="wte", lm_head="ff_out")


def helium(raw: dict) -> ModelConfig:
    """Helium 1: its files pair neighbouring numbers for RoPE; a bias on q, k, v is none on o."""
    return replace(llama({"rms_norm_eps": 1e-8, "head_dim": 128, "rope_theta": 1e5, **raw}), out_bias=False)


def seed_oss(raw: dict) -> ModelConfig:
    """Seed-OSS: biases on q, k, v, and a key of its own for the one on o."""
    config = llama({"head_dim": 128, "attention_bias": True, **raw})
    return replace(config, out_bias=bool(raw.get("attention_out_bias", False)))


def arcee(raw: dict) -> ModelConfig:
    """AFM: an MLP without a gate, relu squared."""
    return replace(llama({"rms_norm_eps": 1e-5, "hidden_act": "relu2", **raw}), glu=False)


def nanochat(raw: dict) -> ModelConfig:
    """Norms without weights everywhere, on q and k too (behind RoPE there; a rotation does not change a length)."""
    return replace(llama(raw), norm_weight=False, embed_norm=True, qk_norm="head", glu=False,
                   activation=activation(raw, "relu2"), final_softcap=raw.get("final_logit_softcapping", 15.0))


NANOCHAT = table("layers.*.", ATTENTION | {"mlp.fc1": "up_proj", "mlp.fc2": "down_proj"}, embed_tokens="embed_tokens")


def qwen(raw: dict) -> ModelConfig:
    """Qwen 1: intermediate_size counts both halves of the MLP, w1 is up and w2 gate. Beyond seq_length its code changes
    RoPE's base and the scale of the scores with the length; here a text should not be longer than that."""
    bias = not raw.get("no_bias", True)
    return read(raw, "silu", intermediate_size=raw["intermediate_size"] // 2, qkv_bias=True, out_bias=bias,
                mlp_bias=bias, max_positions=raw.get("seq_length") or raw["max_position_embeddings"], **rope(raw))


QWEN = table("h.*.", {
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_attn": FUSED, "attn.c_proj": "o_proj",
    "mlp.w1": "up_proj", "mlp.w2": "gate_proj", "mlp.c_proj": "down_proj"}, embed_tokens="wte", norm="ln_f")


# ---------------------------------------------------------------- constants that go into the weights

def granite(raw: dict) -> ModelConfig:
    return replace(llama(raw), embed_scale=float(raw.get("embedding_multiplier", 1.0)),
                   attention_scale=float(raw.get("attention_multiplier", 1.0)))


def minicpm(raw: dict) -> ModelConfig:
    return replace(llama({"tie_word_embeddings": True, **raw}), embed_scale=float(raw.get("scale_emb", 1.0)))


def cohere(raw: dict) -> ModelConfig:
    """Command R: attention and MLP side by side behind one LayerNorm without bias. R+ has norms on q and k."""
    if raw.get("use_qk_norm"):
        raise ValueError("use_qk_norm: Command R+ has norms on q and k for pairs of RoPE, which is not supported")
    bias = bool(raw.get("attention_bias", False))
    return read({"tie_word_embeddings": True, **raw}, "silu", **LAYER_NORM | {"norm_eps": raw.get(
        "layer_norm_eps", 1e-5)}, norm_bias=False, parallel=1, qkv_bias=bias, out_bias=bias, **rope(raw, theta=5e5))


def cohere2(raw: dict) -> ModelConfig:
    """Command R7B, A: every fourth layer sees everything and knows no positions, the others have a window and RoPE."""
    every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 4))
    windows = window({"sliding_window": 4096, **raw}, lambda i: (i + 1) % every)
    blind = windows.get("full_layers", range(raw["num_hidden_layers"]))
    return replace(cohere({"rope_theta": 1e4, **raw}), **windows, no_rope_layers=blind)


def multipliers(config: ModelConfig, raw: dict) -> tuple[float, float]:
    """Of what attention and MLP add to the stream, and of the logits, in Granite's, MiniCPM's and Cohere's words."""
    residual = raw.get("residual_multiplier", 1.0)
    if "scale_depth" in raw:
        residual = raw["scale_depth"] / math.sqrt(config.num_layers)
    logits = raw.get("logit_scale", 0.0625) if raw["model_type"].startswith("cohere") else 1 / raw.get(
        "logits_scaling", 1.0)
    return residual, logits * raw.get("dim_model_base", config.hidden_size) / config.hidden_size


def multiplier(ours: str, config: ModelConfig, raw: dict) -> float:
    """layers.3.mlp.down_proj.weight -> residual, norm.weight -> logits, others 1."""
    residual, logits = multipliers(config, raw)
    if re.search(r"\.(o_proj|down_proj)\.(weight|bias)$", ours):
        return residual
    return logits if ours == "norm.weight" else 1.0
