"""What every reader of a public config shares: the sizes under all their names, RoPE in three dialects, windows, how a
table of names is written, and LLaMA, from which most others start. The families are in families.py and newer.py.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from checkpoints.layouts import Entries, Recipe
from common import UserError
from model import ModelConfig, Transformer

ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "gelu", "relu": "relu", "relu2": "relu_squared",
    "quick_gelu": "quick_gelu", "fast_gelu": "quick_gelu"}


@dataclass(frozen=True)
class Family:
    config: Callable[[dict], ModelConfig]
    names: dict[str, str]
    prefixes: tuple[str, ...] = ("model.",)        # what may stand in front of the file's names
    qkv: str | Callable[[ModelConfig], str] = "concat"         # how fused q, k, v are woven: layouts.qkv_rows
    rope: str = "halves"                           # which numbers of a head RoPE pairs up: layouts.rope_rows
    transposed: str = ""                           # regex: matrices that are stored (in, out)
    plus_one: bool = False                         # norms store w of 1 + w
    leftovers: str = r".*rotary_emb\.inv_freq"     # regex: tensors that hold no weights
    factor: Callable[[str, ModelConfig, dict], float] | None = None    # our parameter is the file's, times this
    prepare: Callable[[Entries, ModelConfig, dict], None] | None = None        # rewrites that a recipe cannot do
    restore: Callable[[dict, ModelConfig, dict], bool] = lambda *_: False      # and back; False: there is no way
    build: Callable[[ModelConfig], nn.Module] = Transformer

    def cut(self, config: ModelConfig) -> str:
        return self.qkv if isinstance(self.qkv, str) else self.qkv(config)

    def is_transposed(self, name: str) -> bool:
        return bool(self.transposed) and re.search(self.transposed, name) is not None


@dataclass(frozen=True)
class Origin:
    """Where a model came from: enough to write it again as its family writes it."""
    family: Family
    raw: dict                          # config.json
    recipes: list[Recipe]


ALIASES = {"hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
           "intermediate_size": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "inner_hidden_size"),
           "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
           "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
           "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
           "head_dim": ("head_dim", "kv_channels"),
           "max_positions": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
                             "max_sequence_length", "model_max_length"),
           "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon", "norm_epsilon"),
           "tie_embeddings": ("tie_word_embeddings",)}


def activation(raw: dict, default: str) -> str:
    name = next((raw[key] for key in ("hidden_activation", "hidden_act", "activation_function", "activation", "afn")
                 if key in raw), default)
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def read(raw: dict, act: str, **known) -> ModelConfig:
    """Sizes under whatever name the family has for them, an MLP of 4 C where the file names no width, the activation
    (act where it names none), and what the family knows."""
    found = {ours: raw[key] for ours, keys in ALIASES.items() for key in reversed(keys) if key in raw}
    if missing := {"hidden_size", "num_layers", "num_heads"} - set(found) - set(known):
        raise KeyError(ALIASES[min(missing)][0])
    found.setdefault("intermediate_size", 4 * found["hidden_size"])
    return ModelConfig(**{"vocab_size": raw["vocab_size"] if "vocab_size" in raw else raw["padded_vocab_size"],
                          "activation": activation(raw, act), **found, **known})


def rope(raw: dict, theta: float = 10000.0, part: float = 1.0, size: int | None = None) -> dict:
    """rope_theta, rope_scaling and rope_dim of any dialect. part: the share of a head (of `size`) that turns, if the
    file does not say it."""
    for key in ("rope_parameters", "rope_scaling"):
        there = raw.get(key) or {}
        if not isinstance(there, dict) or any(isinstance(v, str) for k, v in there.items() if k not in ("type",
                                                                                                        "rope_type")):
            raise ValueError(f"{key} is {str(there)[:100]}, expected an object of numbers")
    new = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {k: v for k, v in new.items() if k not in ("rope_theta",
                                                                                     "partial_rotary_factor")}
    scaling = {**scaling, "rope_type": scaling.get("rope_type") or scaling.get("type")} if scaling else {}
    if scaling.get("rope_type") == "su":                                       # longrope's name in Phi-3's first files
        scaling["rope_type"] = "longrope"
    scaling = None if scaling.get("rope_type") in (None, "default") else scaling
    for source in (new, raw):
        theta = next((source[k] for k in ("rope_theta", "rotary_emb_base") if k in source), theta)
        part = next((source[k] for k in ("partial_rotary_factor", "rotary_pct", "rope_pct") if k in source), part)
        if source:
            break
    size = size or raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    return {"rope_theta": float(theta), "rope_scaling": scaling,
            **({} if part == 1 else {"rope_dim": int(size * part)})}


def window(raw: dict, slides: Callable[[int], bool] = lambda layer: True, layers: str = "num_hidden_layers") -> dict:
    """A sliding window, and which layers have it: as the file lists them, else as the family does it."""
    n, kinds, size = raw[layers], raw.get("layer_types"), raw.get("sliding_window")
    if not size:
        return {}
    if kinds and (len(kinds) != n or not set(kinds) <= {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types {sorted(set(map(str, kinds)))} for {len(kinds)} of {n} layers; known: "
                         "full_attention, sliding_attention, one for each layer")
    full = [i for i in range(n) if (kinds[i] == "full_attention" if kinds else not slides(i))]
    return {"window": size, "full_layers": full} if len(full) < n else {}


LAYER_NORM = {"norm": "layer", "norm_eps": 1e-5}
PLAIN = LAYER_NORM | {"glu": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}    # GPT-2's block


def table(layers: str, inside: dict[str, str], **outside: str) -> dict[str, str]:
    """A table of names: `layers` stands in front of what is inside a layer, and of ours only the last part is written
    (q_proj is layers.*.self_attn.q_proj). outside: ours = theirs, with __ for a dot."""
    def ours(short: str) -> str:
        part = "mlp." if short in ("gate_proj", "up_proj", "down_proj") else ""
        return "layers.*." + ("self_attn." if short[1:] in ("_proj", "_norm") else part) + short
    return ({layers + theirs: " ".join(ours(s) for s in shorts.split()) for theirs, shorts in inside.items()}
            | {theirs.replace("__", "."): name for name, theirs in {"lm_head": "lm_head", **outside}.items()})


NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
ATTENTION = {f"self_attn.{x}_proj": f"{x}_proj" for x in "qkvo"}
GATED = {f"mlp.{x}_proj": f"{x}_proj" for x in ("gate", "up", "down")}
QK_NORMS = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
OUTER = {"embed_tokens": "embed_tokens", "norm": "norm"}
FUSED = "q_proj k_proj v_proj"
LLAMA = table("layers.*.", NORMS | ATTENTION | GATED, **OUTER)


def llama(raw: dict) -> ModelConfig:
    """LLaMA 1, 2, 3 and everything that took its shape."""
    bias = bool(raw.get("attention_bias", raw.get("bias", False)))             # InternLM's key
    return read(raw, "silu", intermediate_size=raw["intermediate_size"], qkv_bias=bias, out_bias=bias,
                mlp_bias=bool(raw.get("mlp_bias", False)), **rope(raw))


# The largest sizes that are believed: a damaged or invented number is an error, not an allocation.
LARGEST = {**dict.fromkeys(("vocab_size", "padded_vocab_size", *ALIASES["hidden_size"], *ALIASES["intermediate_size"]),
                           1 << 24),
           **dict.fromkeys(ALIASES["num_layers"], 1 << 12),
           **dict.fromkeys((*ALIASES["num_heads"], *ALIASES["num_kv_heads"], *ALIASES["head_dim"]), 1 << 16),
           **dict.fromkeys(ALIASES["max_positions"], 1 << 40),
           **dict.fromkeys((*ALIASES["norm_eps"], "norm_eps", "rope_theta"), 1e12)}


def check_numbers(raw: dict, where) -> None:
    for key, largest in LARGEST.items():
        value = raw.get(key, largest)
        right = isinstance(value, type(largest)) or (isinstance(largest, float) and isinstance(value, int))
        if isinstance(value, bool) or not right or not 0 < value <= largest:
            kind = "a number" if isinstance(largest, float) else "an integer"
            raise UserError(f"{where}: {key} is {str(value)[:60]}, expected {kind} above 0 and up to {largest:g}")
