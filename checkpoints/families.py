"""The families of public decoders: how a config.json becomes our ModelConfig, and what their tensors are called.

A family is a config reader of about ten lines and a table of names: the file's on the left, ours on the right, `*` is
the number of a layer; where one tensor of the file holds several of ours, they stand in its order. What a reader does
not know is an error, never a default. docs/families.md shows how to add one. Those of 2023 and later are in newer.py.
The table of all families is at the end of this file.

A config.json comes in three dialects: of 2022 (rope_theta, no scaling), of 2024 (`rope_scaling` with `type` or
`rope_type`), and of transformers 5 (`rope_parameters`, which holds theta as well). Two values of `model_type` mean two
different models each (`chatglm`, `glm`): `find` tells them apart.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from checkpoints import newer, others
from checkpoints.layouts import Entries, derived
from checkpoints.readers import (
    ATTENTION,
    FUSED,
    GATED,
    LAYER_NORM,
    LLAMA,
    NORMS,
    PLAIN,
    QK_NORMS,
    Family,
    check_numbers,
    llama,
    read,
    rope,
    table,
    window,
)
from common import UserError
from model import ModelConfig

# ---------------------------------------------------------------- LLaMA and everything of its shape

def mistral(raw: dict) -> ModelConfig:
    return replace(llama(raw), **window(raw))


def qwen2(raw: dict) -> ModelConfig:
    """q, k, v have biases and no key in the config says so; the window is listed and mostly off."""
    first = raw.get("max_window_layers", 28)
    windows = window(raw, lambda i: i >= first) if raw.get("use_sliding_window") else {}
    return replace(llama(raw), qkv_bias=True, out_bias=False, **windows)


def qwen3(raw: dict) -> ModelConfig:
    bias, config = bool(raw.get("attention_bias")), qwen2({"head_dim": 128, **raw})
    return replace(config, qk_norm="head", qkv_bias=bias, out_bias=bias)


def smollm3(raw: dict) -> ModelConfig:
    every, n = raw.get("no_rope_layer_interval", 4), raw["num_hidden_layers"]
    turns = raw.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(n)]         # 1 = this layer has RoPE
    windows = window(raw) if raw.get("use_sliding_window") else {}
    return replace(llama({"rope_theta": 2e6, "tie_word_embeddings": True, **raw}), **windows,
                   no_rope_layers=[i for i, on in enumerate(turns) if not on])


def baichuan(raw: dict) -> ModelConfig:
    """7B has RoPE, 13B ALiBi; 13B has only a model_max_length in its config. W_pack is q, k, v in one."""
    if "max_position_embeddings" in raw:
        return llama(raw)
    return read(raw, "silu", positions="alibi")


def normalised_head(files: Entries, config: ModelConfig, raw: dict) -> None:
    """Baichuan 2 divides each row of the head by its length."""
    head = files["lm_head.weight"]
    files["lm_head.weight"] = derived(head.shape, lambda: F.normalize(head.read().float()), head)


def internlm(raw: dict) -> ModelConfig:
    """InternLM 1: LLaMA with biases; some files describe RoPE as {"type", "base", "scaling_factor"}."""
    turn = raw.get("rotary") or {}
    scaling = {"type": turn.get("type"), "factor": turn.get("scaling_factor", 1.0)}
    return llama({"rope_theta": turn.get("base", 10000.0), "bias": True, **raw,
                  **({"rope_scaling": scaling} if turn.get("type") not in (None, "origin") else {})})


YI = table("layers.*.", {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"})     # of its first files
INTERNLM2 = table("layers.*.", {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.wqkv":
    "q_proj k_proj v_proj", "attention.wo": "o_proj", "feed_forward.w1": "gate_proj", "feed_forward.w3": "up_proj",
    "feed_forward.w2": "down_proj"}, embed_tokens="tok_embeddings", norm="norm", lm_head="output")


# ---------------------------------------------------------------- GPT-2 and its relatives

def gpt2(raw: dict) -> ModelConfig:
    """GPT-2, Cerebras-GPT (exact gelu), Wenzhong, CPM-Generate; SantaCoder's first files (one key head)."""
    if raw.get("add_cross_attention"):
        raise ValueError("add_cross_attention: a decoder that reads an encoder is not supported")
    one = {"num_kv_heads": 1} if raw.get("attention_head_type") == "multiquery" else {}
    scale = {} if raw.get("scale_attn_weights", True) else {"attention_scale": 1.0}
    return read({"tie_word_embeddings": True, **raw}, "gelu_new", positions="learned", **PLAIN | {
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5)}, **scale, **one)


MLP_OF_GPT2 = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "mlp.c_fc": "up_proj",
               "mlp.c_proj": "down_proj"}
GPT2 = table("h.*.", MLP_OF_GPT2 | {
    "attn.c_attn": "q_proj k_proj v_proj", "attn.c_proj": "o_proj", "attn.q_attn": "q_proj",
    "attn.kv_attn": "k_proj v_proj"}, embed_tokens="wte", embed_positions="wpe", norm="ln_f")
MASKS = r"h\.\d+\.attn\.(attention\.)?(bias|masked_bias|causal_mask)|.*rotary_emb\.inv_freq|.*\.embed_positions"


def inverse_layer(ours: str, config: ModelConfig, raw: dict) -> float:
    """With scale_attn_by_inverse_layer_idx the scores of layer i are divided by i + 1: so we divide its q."""
    scaled = raw.get("scale_attn_by_inverse_layer_idx") and ".q_proj." in ours
    return 1 / (int(ours.split(".")[1]) + 1) if scaled else 1


def gpt_neo(raw: dict) -> ModelConfig:
    """Every other layer sees 256 tokens only; scores are not divided by sqrt(D)."""
    n = raw.get("num_layers") or raw["num_hidden_layers"]
    kinds = raw.get("attention_layers") or [k for ks, times in raw["attention_types"] for _ in range(times) for k in ks]
    if len(kinds) != n or not set(kinds) <= {"global", "local"}:
        raise ValueError(f"attention_types gives {len(kinds)} layers {sorted(set(kinds))}, the model has {n}")
    return read({"tie_word_embeddings": True, **raw}, "gelu_new", positions="learned", attention_scale=1.0,
                **PLAIN | {"qkv_bias": False, "norm_eps": raw.get("layer_norm_epsilon", 1e-5)},
                window=raw.get("window_size", 256), full_layers=[i for i, kind in enumerate(kinds) if kind == "global"])


GPT_NEO = table("h.*.", MLP_OF_GPT2 | {f"attn.attention.{x}_proj": f"{x}_proj" for x in "qkv"} | {
    "attn.attention.out_proj": "o_proj"}, embed_tokens="wte", embed_positions="wpe", norm="ln_f")


def gptj(raw: dict) -> ModelConfig:
    """GPT-J and CodeGen / MOSS: attention and MLP side by side behind one norm; RoPE turns the first 64 numbers."""
    return read(raw, "gelu_new", **LAYER_NORM | {"norm_eps": raw.get("layer_norm_epsilon", 1e-5)}, parallel=1,
                glu=False, mlp_bias=True, head_bias=True, rope_dim=raw.get("rotary_dim", 64))


GPTJ = table("h.*.", {"ln_1": "input_layernorm", "mlp.fc_in": "up_proj", "mlp.fc_out": "down_proj"} | {
    f"attn.{x}_proj": f"{x}_proj" for x in "qkv"} | {"attn.out_proj": "o_proj", "attn.qkv_proj":
                                                     "q_proj k_proj v_proj"}, embed_tokens="wte", norm="ln_f")


def gpt_bigcode(raw: dict) -> ModelConfig:
    """StarCoder and SantaCoder: GPT-2 with one key head."""
    return replace(gpt2({"activation_function": "gelu_pytorch_tanh", **raw}),
                   num_kv_heads=1 if raw.get("multi_query", True) else raw["n_head" if "n_head" in raw else
                                                                           "num_attention_heads"])


def openai_gpt(raw: dict) -> ModelConfig:
    """GPT-1: norms behind the additions, none at the end. Its "gelu" is the tanh formula."""
    config = read({"tie_word_embeddings": True, **raw}, "gelu", positions="learned", block="post", final_norm=False,
                  **PLAIN | {"norm_eps": raw.get("layer_norm_epsilon", 1e-5)})
    return replace(config, activation="gelu_tanh") if config.activation == "gelu" else config


def opt(raw: dict) -> ModelConfig:
    """The 350m puts its norms behind the additions and has a narrow embedding, which `opt_tables` widens."""
    post, bias = not raw.get("do_layer_norm_before", True), bool(raw.get("enable_bias", True))
    narrow = raw.get("word_embed_proj_dim", raw["hidden_size"]) != raw["hidden_size"]
    tie = bool(raw.get("tie_word_embeddings", True)) and not narrow
    return read(raw, "relu", positions="learned", **LAYER_NORM, norm_weight=raw.get("layer_norm_elementwise_affine",
                True), glu=False, qkv_bias=bias, out_bias=bias, mlp_bias=bias, block="post" if post else "pre",
                final_norm=not post and not raw.get("_remove_final_layer_norm", False), tie_embeddings=tie)


OPT = table("layers.*.", ATTENTION | {
    "self_attn.out_proj": "o_proj", "self_attn_layer_norm": "input_layernorm", "final_layer_norm":
    "post_attention_layernorm", "fc1": "up_proj", "fc2": "down_proj"},
    embed_tokens="embed_tokens", embed_positions="embed_positions", norm="final_layer_norm")


def opt_tables(files: Entries, config: ModelConfig, raw: dict) -> None:
    """Positions start at 2 in the file; a narrow embedding E is multiplied out, E P_in in front and E P_out as head."""
    table = files["embed_positions.weight"]
    files["embed_positions.weight"] = derived((table.shape[0] - 2, *table.shape[1:]), lambda: table.read()[2:], table)
    if "project_in.weight" in files:
        E, wide, slim = files["embed_tokens.weight"], files.pop("project_in.weight"), files.pop("project_out.weight")
        head = files.get("lm_head.weight", E)                                  # (V, C'), (C, C'), (C', C)
        files["embed_tokens.weight"] = derived((E.shape[0], wide.shape[0]), lambda: E.read().float() @
                                               wide.read().float().T, E)
        files["lm_head.weight"] = derived((E.shape[0], slim.shape[1]), lambda: head.read().float() @
                                          slim.read().float(), E)


def opt_restore(tensors: dict, config: ModelConfig, raw: dict) -> bool:
    name = next(n for n in tensors if n.endswith("embed_positions.weight"))
    tensors[name] = F.pad(tensors[name], (0, 0, 2, 0))
    return raw.get("word_embed_proj_dim", config.hidden_size) == config.hidden_size


# ---------------------------------------------------------------- GPT-NeoX, BLOOM, MPT, Falcon

def gpt_neox(raw: dict) -> ModelConfig:
    """Pythia, Dolly v2, RedPajama-INCITE, OpenChatKit, StableLM-alpha."""
    bias, eps = bool(raw.get("attention_bias", True)), raw.get("layer_norm_eps", 1e-5)
    return read(raw, "gelu", **PLAIN | {"norm_eps": eps, "qkv_bias": bias, "out_bias": bias},
                parallel=2 if raw.get("use_parallel_residual", True) else 0, **rope(raw, part=0.25))


MEGATRON = {"mlp.dense_h_to_4h": "up_proj", "mlp.dense_4h_to_h": "down_proj"}
NEOX = table("layers.*.", NORMS | MEGATRON | {"attention.query_key_value": FUSED, "attention.dense": "o_proj"},
             embed_tokens="embed_in", norm="final_layer_norm", lm_head="embed_out")


def stablelm(raw: dict) -> ModelConfig:
    """StableLM 3B and 2; the 12B has one norm in front of attention and MLP, and norms on q and k for each head."""
    return read(raw, "silu", **LAYER_NORM | {"norm_eps": raw.get("layer_norm_eps", raw.get("norm_eps", 1e-5))},
                qkv_bias=bool(raw.get("use_qkv_bias", False)), parallel=int(bool(raw.get("use_parallel_residual"))),
                qk_norm="own" if raw.get("qk_layernorm") else "", **rope(raw, part=0.25))


def stablelm_norms(files: Entries, config: ModelConfig, raw: dict) -> None:
    """q_layernorm.norms.N.weight (D,), one for each head, become one tensor (H, 1, D)."""
    for i in range(config.num_layers) if config.qk_norm else ():
        for x, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            parts = [files.pop(f"layers.{i}.self_attn.{x}_layernorm.norms.{h}.weight", None) for h in range(heads)]
            if None not in parts:
                files[f"layers.{i}.self_attn.{x}_layernorm.weight"] = derived(
                    (heads, 1, config.head_dim), lambda parts=parts: torch.stack([p.read() for p in parts])[:, None],
                    parts[0])


def stablelm_restore(tensors: dict, config: ModelConfig, raw: dict) -> bool:
    for name in [n for n in tensors if n.endswith("_layernorm.weight") and tensors[n].dim() == 3]:
        for h, weight in enumerate(tensors.pop(name)):
            tensors[name.replace("_layernorm.weight", f"_layernorm.norms.{h}.weight")] = weight[0]
    return True


STABLELM = LLAMA | table("layers.*.", {"self_attn.q_layernorm": "q_norm", "self_attn.k_layernorm": "k_norm"})


def bloom(raw: dict) -> ModelConfig:
    return read({"tie_word_embeddings": True, **raw}, "gelu_new", positions="alibi", embed_norm=True,
                residual_from_norm=float(bool(raw.get("apply_residual_connection_post_layernorm", False))),
                **PLAIN | {"norm_eps": raw.get("layer_norm_epsilon", 1e-5)})


BLOOM = table("h.*.", NORMS | MEGATRON | {"self_attention.query_key_value": FUSED, "self_attention.dense": "o_proj"},
              embed_tokens="word_embeddings", embed_norm="word_embeddings_layernorm", norm="ln_f")


def mpt(raw: dict) -> ModelConfig:
    how = {"alibi": True, "alibi_bias_max": 8, **{k: v for k, v in (raw.get("attn_config") or {}).items()
                                                   if v is not None}}
    kind = how.get("attn_type", "multihead_attention")
    if how.get("prefix_lm") or how.get("rope") or kind not in ("multihead_attention", "multiquery_attention",
                                                               "grouped_query_attention"):
        raise ValueError(f"attn_config {how}: prefix_lm, rope and other kinds of attention are not supported")
    bias, heads = not raw.get("no_bias", True), {"multiquery_attention": 1}.get(kind, how.get("kv_n_heads"))
    size = raw.get("d_model") or raw["hidden_size"]
    return read({"tie_word_embeddings": True, **raw}, "gelu", **PLAIN | {
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5), "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias},
        norm_bias=bias, num_kv_heads=heads, intermediate_size=int(size * raw.get("expansion_ratio", 4)),
        positions="alibi" if how["alibi"] else "learned", alibi_max=float(how["alibi_bias_max"]),
        clip_qkv=how.get("clip_qkv"), attention_scale=how.get("softmax_scale"),
        qk_norm="full" if how.get("qk_ln") else "")


MPT = table("blocks.*.", {
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.Wqkv": FUSED, "attn.out_proj": "o_proj",
    "attn.q_ln": "q_norm", "attn.k_ln": "k_norm", "ffn.up_proj": "up_proj", "ffn.down_proj": "down_proj"},
    embed_tokens="wte", embed_positions="wpe", norm="norm_f")


def falcon(raw: dict) -> ModelConfig:
    """7B: one key head, attention and MLP behind one norm. 40B: groups, two norms. RW: ALiBi, one after the other."""
    heads, new = raw.get("num_attention_heads") or raw["n_head"], bool(raw.get("new_decoder_architecture", False))
    new |= raw.get("model_type") == "RefinedWeb" and "n_head_kv" in raw        # the 40B's first name; RW has it too
    groups = raw.get("num_kv_heads", raw.get("n_head_kv", heads))
    parallel, bias = bool(raw.get("parallel_attn", True)), bool(raw.get("bias", False))
    norms = raw.get("num_ln_in_parallel_attn", 2) if new else 1
    alibi = {"positions": "alibi", "alibi_rounded": True} if raw.get("alibi") else rope(
        raw, size=raw["hidden_size"] // heads)
    return read({"tie_word_embeddings": True, **raw}, "gelu", **PLAIN | {
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5), "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias},
        num_kv_heads=groups if new else 1 if raw.get("multi_query", True) else heads,
        parallel=norms if new or parallel else 0, **alibi)


FALCON = table("h.*.", NORMS | MEGATRON | {
    "self_attention.query_key_value": FUSED, "self_attention.dense": "o_proj", "ln_attn": "input_layernorm",
    "ln_mlp": "post_attention_layernorm"}, embed_tokens="word_embeddings", norm="ln_f")


def falcon_cut(config: ModelConfig) -> str:
    return "per head" if config.num_kv_heads == config.num_heads else "concat" if config.num_kv_heads == 1 else (
        "per group")


# ---------------------------------------------------------------- GLM

def glm(raw: dict) -> ModelConfig:
    """GLM-4 in transformers' names."""
    return replace(read({"head_dim": 128, "rms_norm_eps": 1.5625e-7, **raw}, "silu", qkv_bias=bool(raw.get(
        "attention_bias", True)), **rope({"head_dim": 128, **raw}, part=0.5)))


def glm4(raw: dict) -> ModelConfig:
    return replace(glm(raw), block="sandwich")


GLM = LLAMA | table("layers.*.", {"mlp.gate_up_proj": "gate_proj up_proj", "post_self_attn_layernorm":
                                  "attention_out_norm", "post_mlp_layernorm": "mlp_out_norm"})


def chatglm2(raw: dict) -> ModelConfig:
    """ChatGLM2, ChatGLM3, CodeGeeX2 and 4, GLM-4 in the names of its first files."""
    if not raw.get("rmsnorm", True) or not raw.get("post_layer_norm", True):
        raise ValueError("rmsnorm or post_layer_norm is off: no published ChatGLM is like that")
    groups = raw.get("multi_query_group_num") if raw.get("multi_query_attention", True) else None
    every = bool(raw.get("add_bias_linear", False))
    size = raw.get("kv_channels", raw["hidden_size"] // raw["num_attention_heads"])
    ratio = raw.get("rope_ratio", 1)       # ChatGLM2-32k squeezes 32,768 positions into 8,192, the others raise theta
    squeezed = "chatglm2" in str(raw.get("_name_or_path")).lower() or ratio * 8192 == raw.get("seq_length")
    turns = {"rope_scaling": {"rope_type": "linear", "factor": float(ratio)}} if squeezed and ratio != 1 else {
        "rope_theta": 10000.0 * ratio}
    return read(raw, "silu", num_kv_heads=groups, qkv_bias=every or bool(raw.get("add_qkv_bias", False)),
                out_bias=every, mlp_bias=every, rope_dim=size // 2, **turns,
                residual_from_norm=float(bool(raw.get("apply_residual_connection_post_layernorm", False))))


CHATGLM2 = table("encoder.layers.*.", NORMS | {
    "self_attention.query_key_value": FUSED, "self_attention.dense": "o_proj", "mlp.dense_h_to_4h": "gate_proj up_proj",
    "mlp.dense_4h_to_h": "down_proj"}, embed_tokens="embedding__word_embeddings", norm="encoder__final_layernorm",
    lm_head="output_layer")


def chatglm(raw: dict) -> ModelConfig:
    """ChatGLM-6B. Its second layout has the ids of the special tokens in the config, the first (150528) not all."""
    layers, first = raw["num_layers"], raw.get("vocab_size", 130528) > 150000
    ids = (raw.get("bos_token_id", 150004 if first else 130004), raw.get("gmask_token_id", 150001 if first else 130001),
           raw.get("mask_token_id", 150000 if first else 130000))
    return read({"tie_word_embeddings": True, **raw}, "gelu_new", **PLAIN | {
        "norm_eps": raw.get("layernorm_epsilon", 1e-5)}, positions="rope_2d", prefix_ids=ids,
        residual_from_norm=math.sqrt(2 * layers))


CHATGLM = table("layers.*.", NORMS | MEGATRON | {"attention.query_key_value": FUSED, "attention.dense": "o_proj"},
                embed_tokens="word_embeddings", norm="final_layernorm")
# <sop>, [gMASK], [MASK], [sMASK] by the size of the vocabulary: English, Chinese.
GLM_10B_IDS = {50304: (50257, 50263, 50260, 50264), 50048: (50006, 50009, 50003, 50008)}


def glm_10b(raw: dict) -> ModelConfig:
    """GLM-2B, 10B, 10B-chinese: GPT-2's block with two tables of positions. The config does not name the special
    tokens: published vocabularies are known, test models of other sizes are taken to begin like ChatGLM's."""
    known = GLM_10B_IDS.get(raw["vocab_size"], (8, 7, 6, None))
    keys = ("sop_token_id", "gmask_token_id", "mask_token_id", "smask_token_id")
    ids = [i for key, usual in zip(keys, known) if (i := raw.get(key, usual)) is not None]
    config = read({"tie_word_embeddings": True, **raw}, "gelu", positions="learned_2d", prefix_ids=ids,
                  **PLAIN | {"norm_eps": raw.get("layernorm_epsilon", 1e-5)})
    return replace(config, max_positions=config.max_positions + 1)             # its tables have a row more


GLM_10B = CHATGLM | {"position_embeddings": "embed_positions", "block_position_embeddings": "embed_blocks"}


# ---------------------------------------------------------------- the top query

def pangu(raw: dict) -> ModelConfig:
    """PanGu-alpha: GPT-2 whose last layer asks with a table of positions instead of what it has read. The published
    port applies the final norm before that layer and names its class in the config; files that name none have it last.
    "gelu" is MindSpore's, the tanh formula."""
    config, named = gpt2({"activation_function": "gelu_new", **raw}), "after" if raw.get("architectures") else "before"
    return replace(config, top_query=raw.get("top_query", named),              # our own files say it
                   activation="gelu_tanh" if config.activation == "gelu" else config.activation)


PANGU = table("h.*.", MLP_OF_GPT2 | {f"attn.{x}_proj": f"{x}_proj" for x in "qkv"} | {"attn.c_proj": "o_proj"},
              embed_tokens="wte", embed_positions="wpe", embed_query="wqe", norm="ln_f")


def codegeex(raw: dict) -> ModelConfig:
    """CodeGeeX-13B: 39 layers and the one that asks, behind the final norm."""
    config = pangu({"activation_function": "fast_gelu", **raw})
    return replace(config, num_layers=config.num_layers + 1, top_query="after")


CODEGEEX = table("transformer.layers.*.", NORMS | MEGATRON | {
    "attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj", "attention.dense": "o_proj"},
    embed_tokens="embedding__word_embeddings", embed_positions="embedding__position_embeddings",
    embed_query="topQueryEmbedding__top_query_embeddings", norm="transformer__final_layernorm")


def top_layer(files: Entries, config: ModelConfig, raw: dict) -> None:
    """The layer that asks has a name of its own in the file. Megatron's settings do not count it; a config may."""
    below = {n.split(".")[2] for n in files if n.startswith("transformer.layers.")}
    config.num_layers -= len(below) == config.num_layers - 2
    for name in [n for n in files if n.startswith("transformer.topQueryLayer.")]:
        files[name.replace("topQueryLayer", f"layers.{config.num_layers - 1}")] = files.pop(name)


def top_layer_restored(tensors: dict, config: ModelConfig, raw: dict) -> bool:
    prefix = next(n for n in tensors if n.endswith("embedding.word_embeddings.weight")).partition("embedding.")[0]
    for name in [n for n in tensors if f"layers.{config.num_layers - 1}." in n]:
        tensors[prefix + name.replace(f"layers.{config.num_layers - 1}.", "topQueryLayer.")] = tensors.pop(name)
    return True


# ---------------------------------------------------------------- the table

def own(raw: dict) -> ModelConfig:
    """What export.py writes for a model that no public family describes (ALiBi on a LLaMA, for example)."""
    return ModelConfig(**raw["model_config"])


OWN = table("layers.*.", {n: n for n in (*NORMS, "attention_out_norm", "mlp_out_norm")} | ATTENTION | GATED | QK_NORMS,
            **{n: n for n in ("embed_tokens", "embed_positions", "embed_blocks", "embed_query", "embed_norm", "norm")})
CONV1D = r"c_attn|c_proj|c_fc|q_attn|kv_attn"
GPT = {"prefixes": ("transformer.",), "leftovers": MASKS}

FAMILIES: dict[str, Family] = {
    "llama": Family(llama, LLAMA), "mistral": Family(mistral, LLAMA), "qwen2": Family(qwen2, LLAMA),
    "qwen3": Family(qwen3, LLAMA | table("layers.*.", QK_NORMS)), "smollm3": Family(smollm3, LLAMA),
    "Yi": Family(llama, LLAMA | YI), "internlm": Family(internlm, LLAMA),
    "internlm2": Family(llama, INTERNLM2, qkv="per group"),
    "baichuan": Family(baichuan, LLAMA | table("layers.*.", {"self_attn.W_pack": FUSED}), leftovers=
                       r".*rotary_emb\..*|.*(alibi_mask|future_mask)"),
    "gpt2": Family(gpt2, GPT2, transposed=CONV1D, factor=inverse_layer, **GPT),
    "gpt_neo": Family(gpt_neo, GPT_NEO, **GPT), "gptj": Family(gptj, GPTJ, rope="pairs", **GPT),
    "codegen": Family(gptj, GPTJ, rope="pairs", qkv="codegen", **GPT),
    "gpt_bigcode": Family(gpt_bigcode, GPT2, qkv=falcon_cut, **GPT),
    "openai-gpt": Family(openai_gpt, GPT2 | {"tokens_embed": "embed_tokens", "positions_embed": "embed_positions"},
                         ("transformer.",), transposed=CONV1D, leftovers=MASKS + r"|position_ids"),
    "opt": Family(opt, OPT, ("model.decoder.", "decoder."), prepare=opt_tables, restore=opt_restore),
    "gpt_neox": Family(gpt_neox, NEOX, ("gpt_neox.",), qkv="per head",
                       leftovers=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
    "stablelm": Family(stablelm, STABLELM, prepare=stablelm_norms, restore=stablelm_restore),
    "bloom": Family(bloom, BLOOM, qkv="per head", **GPT), "mpt": Family(mpt, MPT, **GPT),
    "falcon": Family(falcon, FALCON, qkv=falcon_cut, **GPT), "starcoder2": Family(newer.starcoder2, newer.STARCODER2),
    "gemma": Family(newer.gemma, LLAMA, plus_one=True), "gemma2": Family(newer.gemma2, newer.GEMMA2, plus_one=True),
    "gemma3_text": Family(newer.gemma3, newer.GEMMA2, (
        "language_model.model.", "model.language_model.", "language_model.", "model."), plus_one=True,
        leftovers=r".*(vision_tower|multi_modal_projector)\..*|.*inv_freq"),
    "phi": Family(newer.phi, newer.PHI), "phi3": Family(newer.phi3, newer.PHI3),
    "phi-msft": Family(newer.phi_first, newer.PHI_FIRST, ("transformer.",)),
    "olmo": Family(newer.olmo, LLAMA), "olmo2": Family(newer.olmo2, newer.OLMO2),
    "olmo3": Family(newer.olmo3, newer.OLMO2),
    "hf_olmo": Family(newer.olmo_first, newer.OLMO_FIRST, ("model.transformer.", "transformer.")),
    "helium": Family(newer.helium, LLAMA, rope="pairs"), "seed_oss": Family(newer.seed_oss, LLAMA),
    "arcee": Family(newer.arcee, LLAMA),
    "nanochat": Family(newer.nanochat, newer.NANOCHAT, rope="swapped"), "qwen": Family(newer.qwen, newer.QWEN, **GPT),
    "granite": Family(newer.granite, LLAMA, factor=newer.multiplier),
    "minicpm": Family(newer.minicpm, LLAMA, factor=newer.multiplier),
    "cohere": Family(newer.cohere, LLAMA, rope="pairs", factor=newer.multiplier),
    "cohere2": Family(newer.cohere2, LLAMA, rope="pairs", factor=newer.multiplier),
    "glm": Family(glm, GLM, rope="pairs"), "glm4": Family(glm4, GLM, rope="pairs"),
    "chatglm2": Family(chatglm2, CHATGLM2, ("transformer.",), rope="pairs", leftovers=r"rotary_pos_emb\.inv_freq"),
    "chatglm": Family(chatglm, CHATGLM, ("transformer.",), qkv="per head", rope="2d"),
    "glm_10b": Family(glm_10b, GLM_10B, ("glm.transformer.", "glm.", "transformer.")),
    "gpt_pangu": Family(pangu, PANGU, **GPT),
    "codegeex": Family(codegeex, CODEGEEX, ("module.language_model.", "language_model."), prepare=top_layer,
                       restore=top_layer_restored),
    "chatpixiu": Family(own, OWN), **others.FAMILIES}
FAMILIES["baichuan2"] = replace(FAMILIES["baichuan"], prepare=normalised_head)
FAMILIES["chatglm2_heads"] = replace(FAMILIES["chatglm2"], qkv="per head")     # without multi-query attention
SAME = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon", "moss": "codegen", "stablelm_epoch": "stablelm",
        "gemma3": "gemma3_text", "gpt2_custom": "gpt2", "skywork": "llama", "xverse": "llama", "aquila": "llama"}


def find(raw: dict, where="config.json") -> tuple[str, Family]:
    """The family of a config.json, and the name under which it stands in the table."""
    name = raw.get("model_type")
    if name == "chatglm" and not raw.get("position_encoding_2d"):
        name = "chatglm2" if raw.get("multi_query_attention", True) else "chatglm2_heads"
    if name == "glm" and "block_position_encoding" in raw:
        name = "glm_10b"
    if name == "baichuan" and "z_loss_weight" in raw:
        name = "baichuan2"
    if name in ("t5", "mt5"):                    # v1.0 has relu and one matrix in front of it, v1.1 and mT5 have two
        name = "mt5" if others.feed_forward(raw).startswith("gated-") else "t5"
    name = SAME.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in FAMILIES:
        known = sorted(set(FAMILIES) | set(SAME))
        experts = any(raw.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        raise UserError(f"{where}: model_type {repr(name)[:60]} is not a family that is known; known: "
                        f"{', '.join(known)}. " + ("Mixtures of experts are left out on purpose" if experts else
                           "docs/families.md shows how to add one"))
    return name, FAMILIES[name]


CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def to_config(raw: dict, where) -> ModelConfig:
    # null means "not said", but of a soft cap "there is none".
    raw = {key: 0.0 if value is None else value for key, value in raw.items() if value is not None or key in CAPS}
    for part in (raw, raw.get("model_config"), raw.get("text_config")):
        if isinstance(part, dict):
            check_numbers({key: value for key, value in part.items() if value is not None}, where)
    _, family = find(raw, where)
    try:
        return family.config(raw)
    except KeyError as missing:
        raise UserError(f"{where}: the config lacks {missing}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, IndexError) as error:
        raise UserError(f"{where}: {str(error)[:400]}. docs/families.md says what is known, and how to add to "
                        "it") from None
