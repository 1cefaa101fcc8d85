"""What a GGUF file calls things, and what Hugging Face calls them: one entry of ARCHS for each architecture.

llama.cpp's converter renames every tensor (`blk.3.attn_q.weight`), keeps of a config what its own code needs, and
rewrites some tensors: it interleaves q and k, sorts fused qkv, transposes GPT-2, adds 1 to Gemma's norms. An entry says
how to take all that back; the outcome is a Source like any other, with a config.json's keys and a Hugging Face file's
names. What llama.cpp knows by heart and does not write down (Gemma 2's scale at 27B, SmolLM3's layers without RoPE)
stands here as well.
"""
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import formats, gguf
from common import UserError


class Header:
    """The metadata of one file: h("block_count") is its arch's key; a key without a default must be there."""
    def __init__(self, path: Path):
        self.path = path
        self.meta, self.tensors = gguf.read_model(path)
        self.arch = self.meta.get("general.architecture")

    def __call__(self, key: str, default=None, kind: type = int):
        value = self.meta.get(f"{self.arch}.{key}", default)
        if value is None:
            raise UserError(f"{self.path}: {self.arch}.{key} is missing in the header")
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):      # a list: one per layer
            raise UserError(f"{self.path}: {self.arch}.{key} is {str(value)[:60]}, only one {kind.__name__} for the "
                            "whole model is supported")
        return decimal(value) if kind is float else value

    def has(self, kind: str) -> bool:
        """Whether there is a tensor of this kind, in the file or in its first block."""
        return kind in self.tensors or f"blk.0.{kind}" in self.tensors

    def rows(self, kind: str) -> int:
        found = self.tensors.get(f"blk.0.{kind}.weight") or self.tensors.get(f"{kind}.weight")
        if not found or not found[1]:
            raise UserError(f"{self.path}: tensor {kind}.weight is missing")
        return found[1][0]

    @property
    def heads(self) -> int:
        return self("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self("attention.head_count_kv", self.heads)

    @property
    def head_dim(self) -> int:
        return self("attention.key_length", 0) or self("embedding_length") // self.heads


def decimal(x: float) -> float:
    """What was meant: the header holds fp32, in which 1e-5 reads 9.999999747e-06."""
    return float(f"{x:.7g}")


@dataclass(frozen=True)
class Arch:
    model_type: str
    architecture: str                            # the class of transformers that an exported config names
    config: Callable[[Header], dict]
    names: dict[str, str]                        # kind of tensor -> Hugging Face's name; in a block, behind layer.N
    layer: str = "model.layers"
    turn: dict[str, Callable] = field(default_factory=dict)     # kind -> (header, tensor) -> tensor or {name: tensor}


# ---------------------------------------------------------------- taking back what the converter did to tensors

def halves(h: Header, t: Tensor) -> Tensor:
    return formats.to_halves(t, h.heads)


def kv_halves(h: Header, t: Tensor) -> Tensor:
    return formats.to_halves(t, h.kv_heads)


def per_head(h: Header, t: Tensor) -> Tensor:
    """[q of all heads | k | v] -> q k v of head 0, q k v of head 1, ... (NeoX and BLOOM train in this order)."""
    return t.view(3, h.heads, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)


def per_group(h: Header, t: Tensor) -> Tensor:
    """Falcon: [all q | all k | all v] -> for each key head its queries, itself, its value."""
    D, K = h.head_dim, h.kv_heads
    q, k, v = (x.view(K, -1, *t.shape[1:]) for x in t.split([h.heads * D, K * D, K * D]))
    return torch.cat((q, k, v), dim=1).reshape(t.shape)


def apart(h: Header, t: Tensor) -> dict[str, Tensor]:
    """A fused qkv for a family that has three matrices."""
    sizes = [h.heads * h.head_dim, h.kv_heads * h.head_dim, h.kv_heads * h.head_dim]
    return dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), t.split(sizes)))


def transposed(h: Header, t: Tensor) -> Tensor:
    return t.T if t.dim() == 2 else t            # GPT-2's Conv1D; biases stay


def less_one(h: Header, t: Tensor) -> Tensor:
    return t.float() - 1                         # Gemma's norms multiply by 1 + w


def norm_list(h: Header, t: Tensor) -> dict[str, Tensor]:
    """StableLM-2 12B: a norm for each head, stacked by the converter. Whose it is, the number of heads tells."""
    kind = "q" if len(t) == h.heads else "k"
    return {f"self_attn.{kind}_layernorm.norms.{i}": row for i, row in enumerate(t)}


# ---------------------------------------------------------------- configs

def sizes(h: Header) -> dict:
    return {"hidden_size": h("embedding_length"), "num_hidden_layers": h("block_count"),
            "num_attention_heads": h.heads, "num_key_value_heads": h.kv_heads,
            "intermediate_size": h("feed_forward_length"), "max_position_embeddings": h("context_length")}


def rms(h: Header) -> float:
    return h("attention.layer_norm_rms_epsilon", 1e-5, float)


def layer_eps(h: Header) -> float:
    return h("attention.layer_norm_epsilon", None, float)


def rotated(h: Header, all_of_it: bool = False) -> float:
    """The share of a head that RoPE turns."""
    turned = h("rope.dimension_count", h.head_dim)
    if not 0 < turned <= h.head_dim or (all_of_it and turned != h.head_dim):
        raise UserError(f"{h.path}: RoPE turns {turned} of {h.head_dim} numbers of a head; this architecture turns all")
    return turned / h.head_dim


def llama(h: Header) -> dict:
    """LLaMA and whatever shares its keys."""
    rotated(h, all_of_it=True)
    return {**sizes(h), "head_dim": h.head_dim, "rms_norm_eps": rms(h), "rope_theta": theta(h),
            "rope_scaling": rope_scaling(h), "attention_bias": h.has("attn_output.bias")}


def theta(h: Header) -> float:
    return h("rope.freq_base", 10000.0, float)


def qwen3(h: Header) -> dict:
    return {**llama(h), "attention_bias": h.has("attn_q.bias")}


def granite(h: Header) -> dict:
    return {**llama(h), "attention_multiplier": h("attention.scale", h.head_dim ** -0.5, float),
            "embedding_multiplier": h("embedding_scale", 1.0, float),
            "residual_multiplier": h("residual_scale", 1.0, float), "logits_scaling": h("logit_scale", 1.0, float)}


def baichuan(h: Header) -> dict:
    """Only Baichuan 7B: in 13B positions are ALiBi, in Baichuan 2 the head is normalised; the file says neither."""
    if h("block_count") >= 40 or h.rows("token_embd") > 100_000:
        raise UserError(f"{h.path}: of Baichuan's GGUF files only those of Baichuan 7B can be read; take the original "
                        "files of this model")
    return llama(h)


def gemma(h: Header) -> dict:
    return {**llama(h), "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def gemma2(h: Header) -> dict:
    caps = {"attn_logit_softcapping": h("attn_logit_softcapping", None, float),
            "final_logit_softcapping": h("final_logit_softcapping", None, float)}
    large = h("block_count") == 46               # 27B: its scale is 1 / sqrt(C / H), and D is another number
    return {**gemma(h), **caps, "sliding_window": h("attention.sliding_window"),
            "query_pre_attn_scalar": h("embedding_length") // h.heads if large else h.head_dim}


def gemma3(h: Header) -> dict:
    large = h("block_count") == 62
    return {**gemma(h), "sliding_window": h("attention.sliding_window"), "sliding_window_pattern": 6,
            "rope_theta": h("rope.freq_base", 1e6, float), "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": h("embedding_length") // h.heads if large else h.head_dim}


def phi3(h: Header) -> dict:
    config = {**sizes(h), "rms_norm_eps": rms(h), "rope_theta": theta(h), "partial_rotary_factor": rotated(h),
              "original_max_position_embeddings": h("rope.scaling.original_context_length", h("context_length")),
              "sliding_window": h("attention.sliding_window", 0) or None, "rope_scaling": None}
    if h.has("rope_factors_long.weight"):
        long, short = (gguf.read_tensor(h.tensors[n][0], n).float().tolist()
                       for n in ("rope_factors_long.weight", "rope_factors_short.weight"))
        config["rope_scaling"] = {"type": "longrope", "long_factor": long, "short_factor": short}
    return config


def stablelm(h: Header) -> dict:
    return {**sizes(h), "layer_norm_eps": layer_eps(h), "rope_theta": theta(h), "partial_rotary_factor": rotated(h),
            "use_qkv_bias": h.has("attn_q.bias"), "qk_layernorm": h.has("attn_q_norm.weight"),
            "use_parallel_residual": not h.has("ffn_norm.weight")}       # llama.cpp looks at the tensors as well


def starcoder2(h: Header) -> dict:
    return {**sizes(h), "norm_epsilon": layer_eps(h), "rope_theta": theta(h), "use_bias": h.has("attn_q.bias"),
            "sliding_window": None, "hidden_act": "gelu_pytorch_tanh"}


def olmo(h: Header) -> dict:
    return {**sizes(h), "rope_theta": theta(h), "rope_scaling": rope_scaling(h), "attention_bias": False,
            "clip_qkv": h("attention.clamp_kqv", 0.0, float) or None}


def phi(h: Header) -> dict:
    return {**sizes(h), "layer_norm_eps": layer_eps(h), "rope_theta": theta(h), "partial_rotary_factor": rotated(h),
            "hidden_act": "gelu_new", "qk_layernorm": False}


def glm(h: Header) -> dict:
    return {**sizes(h), "head_dim": h.head_dim, "rms_norm_eps": rms(h), "rope_theta": theta(h),
            "rope_scaling": rope_scaling(h), "partial_rotary_factor": rotated(h),
            "attention_bias": h.has("attn_q.bias") or h.has("attn_qkv.bias")}


def gpt2(h: Header) -> dict:
    return {"n_embd": h("embedding_length"), "n_layer": h("block_count"), "n_head": h.heads,
            "n_positions": h.rows("position_embd"), "n_inner": h.rows("ffn_up"), "layer_norm_epsilon": layer_eps(h),
            "activation_function": "gelu_new"}


def bigcode(h: Header) -> dict:
    """The converter writes one key head whatever the model has; c_attn's rows tell."""
    return {**gpt2(h), "activation_function": "gelu_pytorch_tanh",
            "multi_query": h.rows("attn_qkv") != 3 * h("embedding_length")}


def neox(h: Header) -> dict:
    return {**sizes(h), "layer_norm_eps": layer_eps(h), "rotary_pct": rotated(h), "rotary_emb_base": theta(h),
            "use_parallel_residual": h("use_parallel_residual", True, bool), "hidden_act": "gelu"}


def bloom(h: Header) -> dict:
    return {"hidden_size": h("embedding_length"), "n_layer": h("block_count"), "n_head": h.heads,
            "layer_norm_epsilon": layer_eps(h)}


def falcon(h: Header) -> dict:
    if h.has("attn_qkv.bias") or "jploski" not in str(h("tensor_data_layout", "jploski", str)):
        raise UserError(f"{h.path}: a Falcon with biases or another order of its qkv than 7B, 40B and 11B have")
    return {**sizes(h), "num_kv_heads": h.kv_heads, "multi_query": h.kv_heads == 1, "alibi": False, "bias": False,
            "new_decoder_architecture": h.kv_heads > 1, "parallel_attn": True, "layer_norm_epsilon": layer_eps(h),
            "num_ln_in_parallel_attn": 2 if h.has("attn_norm_2.weight") else 1, "ffn_hidden_size": h.rows("ffn_up"),
            "rope_theta": theta(h)}


def mpt(h: Header) -> dict:
    clip, steepest = h("attention.clamp_kqv", 0.0, float), h("attention.max_alibi_bias", 0.0, float)
    if h.has("attn_qkv.bias") or h.has("attn_q_norm.weight") or not steepest:
        raise UserError(f"{h.path}: an MPT with biases, q and k norms or without ALiBi is not supported")
    return {"d_model": h("embedding_length"), "n_layers": h("block_count"), "n_heads": h.heads, "no_bias": True,
            "expansion_ratio": h.rows("ffn_up") // h("embedding_length"), "max_seq_len": h("context_length"),
            "layer_norm_epsilon": layer_eps(h),
            "attn_config": {"alibi": True, "alibi_bias_max": int(steepest), "clip_qkv": clip or None}}


def rope_scaling(h: Header) -> dict | None:
    """Llama 3.1's scaling comes as a table of divisors, the others by name."""
    kind = h("rope.scaling.type", "linear", str)              # files of 2023 hold the factor alone, and mean linear
    if "rope_freqs.weight" in h.tensors:
        file, shape, _ = h.tensors["rope_freqs.weight"]
        if shape != (h.head_dim // 2,):
            raise UserError(f"{h.path}: tensor rope_freqs.weight is {shape}, the head asks for {(h.head_dim // 2,)}")
        return llama3_scaling(h, gguf.read_tensor(file, "rope_freqs.weight").float())
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{h.path}: {h.arch}.rope.scaling.type is {kind!r}; known: none, linear, yarn")
    factor = h("rope.scaling.factor", h("rope.scale_linear", 1.0, float), float)
    if kind == "none" or factor in (0, 1):
        return None
    trained = h("rope.scaling.original_context_length", 0)
    scaling = {"rope_type": kind, "factor": factor}
    return {**scaling, "original_max_position_embeddings": trained} if trained else scaling


def llama3_scaling(h: Header, divisors: Tensor) -> dict:
    """The table, or where it is recognised the four numbers it came from: other tools read only those."""
    from model import llama3_frequencies  # not at the top: the model need not be there to look at a file
    known = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}
    base = theta(h) ** -(torch.arange(0, h.head_dim, 2).float() / h.head_dim)
    for factor in (8.0, 32.0):                                # Llama 3.1's, 3.2's
        table = base / llama3_frequencies(base, {**known, "factor": factor}, 8192)
        if torch.allclose(table, divisors, rtol=1e-4):
            return {**known, "factor": factor}
    return {"rope_type": "factors", "factors": divisors.tolist()}


# ---------------------------------------------------------------- the table

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
LLAMA = {**TOP, **NORMS, **ATTENTION, **GATED}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm"}
FUSED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
GPT2 = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
        "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
MEGATRON = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "output": "lm_head",
            "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
PERMUTED = {"attn_q": halves, "attn_k": kv_halves}
LESS_ONE = dict.fromkeys(("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm",
                          "attn_q_norm", "attn_k_norm"), less_one)

ARCHS = {
    "llama": Arch("llama", "LlamaForCausalLM", llama, LLAMA, turn=PERMUTED),
    "internlm2": Arch("llama", "LlamaForCausalLM", llama, LLAMA, turn=PERMUTED),     # unfused, it is a LLaMA
    "baichuan": Arch("llama", "LlamaForCausalLM", baichuan, LLAMA, turn=PERMUTED),   # 7B is one, too
    "granite": Arch("granite", "GraniteForCausalLM", granite, LLAMA, turn=PERMUTED),
    "smollm3": Arch("smollm3", "SmolLM3ForCausalLM", llama, LLAMA, turn=PERMUTED),
    "qwen2": Arch("qwen2", "Qwen2ForCausalLM", llama, LLAMA),
    "qwen3": Arch("qwen3", "Qwen3ForCausalLM", qwen3, LLAMA | QK_NORMS),
    "gemma": Arch("gemma", "GemmaForCausalLM", gemma, LLAMA, turn=LESS_ONE),
    "gemma2": Arch("gemma2", "Gemma2ForCausalLM", gemma2, LLAMA | SANDWICH, turn=LESS_ONE),
    "gemma3": Arch("gemma3_text", "Gemma3ForCausalLM", gemma3, LLAMA | SANDWICH | QK_NORMS, turn=LESS_ONE),
    "phi3": Arch("phi3", "Phi3ForCausalLM", phi3, LLAMA | FUSED_MLP | {"attn_qkv": "self_attn.qkv_proj"}),
    "olmo": Arch("olmo", "OlmoForCausalLM", olmo, LLAMA, turn=PERMUTED),
    "olmo2": Arch("olmo2", "Olmo2ForCausalLM", llama, LLAMA | QK_NORMS | {
        "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}),
    "glm4": Arch("glm4", "Glm4ForCausalLM", glm, LLAMA | FUSED_MLP | {
        "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}),
    "chatglm": Arch("glm", "GlmForCausalLM", glm, LLAMA | FUSED_MLP | {"attn_qkv": "self_attn.qkv"},
                    turn={"attn_qkv": apart}),
    "stablelm": Arch("stablelm", "StableLmForCausalLM", stablelm, LLAMA | {
        "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm"},
                     turn={"attn_q_norm": norm_list, "attn_k_norm": norm_list}),
    "starcoder2": Arch("starcoder2", "Starcoder2ForCausalLM", starcoder2, LLAMA | {
        "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "phi2": Arch("phi", "PhiForCausalLM", phi, LLAMA | {
        "output_norm": "model.final_layernorm", "attn_qkv": "self_attn.qkv", "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}, turn={"attn_qkv": apart}),
    "gpt2": Arch("gpt2", "GPT2LMHeadModel", gpt2, GPT2, "transformer.h",
                 dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), transposed)),
    "starcoder": Arch("gpt_bigcode", "GPTBigCodeForCausalLM", bigcode, GPT2, "transformer.h"),
    "gptneox": Arch("gpt_neox", "GPTNeoXForCausalLM", neox, MEGATRON | {
        "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
        "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"}, "gpt_neox.layers",
                    {"attn_qkv": per_head}),
    "bloom": Arch("bloom", "BloomForCausalLM", bloom, MEGATRON | {
        "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
        "output_norm": "transformer.ln_f", "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense"}, "transformer.h", {"attn_qkv": per_head}),
    "falcon": Arch("falcon", "FalconForCausalLM", falcon, MEGATRON | {
        "token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f",
        "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"}, "transformer.h",
                   {"attn_qkv": per_group}),
    "mpt": Arch("mpt", "MptForCausalLM", mpt, {
        "token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head",
        "attn_norm": "norm_1", "ffn_norm": "norm_2", "attn_qkv": "attn.Wqkv", "attn_output": "attn.out_proj",
        "ffn_up": "ffn.up_proj", "ffn_down": "ffn.down_proj"}, "transformer.blocks"),
}
NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")     # the config has them


# ---------------------------------------------------------------- a Source

def open_gguf(path: Path) -> formats.Source:
    h = Header(path)
    arch = ARCHS.get(h.arch) if isinstance(h.arch, str) else None
    if arch is None:
        raise UserError(f"{path}: GGUF files of architecture {str(h.arch)[:60]!r} cannot be read; known: "
                        f"{', '.join(ARCHS)}. Take the model's original files (config.json and *.safetensors)")
    if not h.tensors:
        raise UserError(f"{path}: a vocabulary without weights, which serves as a tokenizer only")
    if experts := h("expert_count", 0):
        raise UserError(f"{path}: a mixture of {experts} experts; only models with one MLP per layer are supported")
    if h.heads <= 0 or h.kv_heads <= 0 or h("embedding_length") < h.heads or h.head_dim <= 0:
        raise UserError(f"{path}: head counts {h.heads}, {h.kv_heads} for a width of {h('embedding_length')}")
    if h.arch == "falcon" and h.has("attn_norm_2.weight"):   # 40B: one norm for attention, one for the MLP
        arch = replace(arch, names=arch.names | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"})
    config = {"architectures": [arch.architecture], "model_type": arch.model_type, **arch.config(h),
              "vocab_size": h.rows("token_embd"), "tie_word_embeddings": "output.weight" not in h.tensors}
    for key in ("bos", "eos", "pad"):                        # transformers has ids of its own where a config says none
        value = h.meta.get({"pad": "tokenizer.ggml.padding_token_id"}.get(key, f"tokenizer.ggml.{key}_token_id"))
        config[f"{key}_token_id"] = value if isinstance(value, int) else None
    entries, names = {}, {}
    for name, (file, shape, kind) in h.tensors.items():
        if name not in NOT_WEIGHTS:
            found = translate(h, arch, name, formats.Entry(
                shape, functools.partial(gguf.read_tensor, file, name), file, kind))
            entries, names = entries | found, names | dict.fromkeys(found, name)
    return formats.Source(path, config, entries, names=names)


def translate(h: Header, arch: Arch, name: str, entry: formats.Entry) -> dict[str, formats.Entry]:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; an unknown name stays, and is reported."""
    m = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(.+?)(\.weight|\.bias)?", name)
    index, kind, suffix = m[1], m[2], m[3] or ""
    if kind not in arch.names or (index is None) is not (kind in ("token_embd", "position_embd", "token_embd_norm",
                                                                   "output_norm", "output")):
        return {name: entry}
    where = "" if index is None else f"{arch.layer}.{index}."
    turn = arch.turn.get(kind)
    if turn is None:
        return {where + arch.names[kind] + suffix: entry}
    try:
        seen = turn(h, torch.empty(entry.shape, device="meta"))
    except (RuntimeError, IndexError, ValueError) as error:
        raise UserError(f"{h.path}: tensor {name} {entry.shape} does not fit {h.heads} heads and {h.kv_heads} key/"
                        f"value heads of {h.head_dim}: {str(error).splitlines()[0]}") from None
    if isinstance(seen, Tensor):
        seen = {arch.names[kind]: seen}

    def reader(part: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            out = turn(h, entry.read())
            return out[part] if isinstance(out, dict) else out
        return read
    return {where + part + suffix: formats.Entry(tuple(t.shape), reader(part), entry.file, entry.kind)
            for part, t in seen.items()}
