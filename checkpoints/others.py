"""The families that are no decoder of model.py: RWKV-4, T5 and its kin, CPM-Ant. For each one a reader of its
config.json, the table of names, and the reader backwards, for a model that was built here and never loaded.

BlinkDL's own RWKV files have no config: the sizes are those of the tensors (`open_blinkdl`).
"""
import re
from pathlib import Path

from torch import nn

from checkpoints import formats, layouts, readers
from checkpoints.layouts import Entries
from checkpoints.readers import Family, Origin
from common import UserError
from cpm import CPM, CPMConfig
from rwkv import RWKV, RWKVConfig
from t5 import T5, T5Config

# ---------------------------------------------------------------- configs

def number(raw: dict, key: str, default: float | None = None) -> int | float:
    """A size of the config, or a small number such as an eps; what is absurd is an error and no allocation."""
    value = raw[key] if default is None else raw.get(key, default)
    whole = not isinstance(default, float)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value <= 1 << 24:
        raise ValueError(f"{key} is {str(value)[:60]}, expected {'an integer' if whole else 'a number'} above 0 and "
                         f"up to {1 << 24}")
    return value


def rwkv(raw: dict) -> RWKVConfig:
    """rescale_every is left out: it halves activations and weights together, for fp16, and changes no result."""
    C = number(raw, "hidden_size")
    return RWKVConfig(
        vocab_size=number(raw, "vocab_size"), hidden_size=C, num_layers=number(raw, "num_hidden_layers"),
        attention_size=number(raw, "attention_hidden_size", C),
        intermediate_size=number(raw, "intermediate_size", 4 * C), norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        max_positions=number(raw, "context_length", 1024), tie_embeddings=bool(raw.get("tie_word_embeddings", False)))


def feed_forward(raw: dict) -> str:
    return str(raw.get("feed_forward_proj") or ("gated-gelu" if raw["model_type"] == "mt5" else "relu"))


def t5(raw: dict) -> T5Config:
    """v1.0 says relu and scales the head's input, v1.1 gated-gelu and does not: old configs tell by
    tie_word_embeddings, new ones, where that is always true, by scale_decoder_outputs."""
    how = feed_forward(raw)
    gated, act = how.startswith("gated-"), how.removeprefix("gated-")
    if act not in readers.ACTIVATION_NAMES:
        raise ValueError(f"feed_forward_proj is {raw.get('feed_forward_proj')!r}; known: "
                         f"{', '.join(readers.ACTIVATION_NAMES)}, and gated-... of each")
    tied = bool(raw.get("tie_word_embeddings", True))
    start = raw.get("decoder_start_token_id", raw.get("pad_token_id", 0))
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < number(raw, "vocab_size"):
        raise ValueError(f"decoder_start_token_id is {str(start)[:60]}, expected a token of the vocabulary")
    return T5Config(
        vocab_size=number(raw, "vocab_size"), hidden_size=number(raw, "d_model"), intermediate_size=number(raw, "d_ff"),
        num_layers=number(raw, "num_layers"), num_decoder_layers=number(raw, "num_decoder_layers", raw["num_layers"]),
        num_heads=number(raw, "num_heads"), head_dim=number(raw, "d_kv"),
        num_buckets=number(raw, "relative_attention_num_buckets", 32),
        max_distance=number(raw, "relative_attention_max_distance", 128),
        max_positions=number(raw, "n_positions", 512), norm_eps=number(raw, "layer_norm_epsilon", 1e-6),
        activation="gelu_tanh" if how == "gated-gelu" else readers.ACTIVATION_NAMES[act], gated=gated,
        scale_output=raw["model_type"] == "t5" and bool(raw.get("scale_decoder_outputs", tied)), tie_embeddings=tied,
        decoder_start_id=start)


def cpm(raw: dict) -> CPMConfig:
    return CPMConfig(
        vocab_size=number(raw, "vocab_size"), hidden_size=number(raw, "hidden_size"),
        intermediate_size=number(raw, "dim_ff"), num_layers=number(raw, "num_hidden_layers"),
        num_heads=number(raw, "num_attention_heads"), head_dim=number(raw, "dim_head"),
        num_buckets=number(raw, "position_bias_num_buckets"), max_distance=number(raw, "position_bias_max_distance"),
        max_positions=number(raw, "position_bias_max_distance"),
        prompt_length=number(raw, "prompt_length"), prompt_types=number(raw, "prompt_types"),
        segment_types=number(raw, "segment_types"), norm_eps=number(raw, "eps", 1e-6))


# ---------------------------------------------------------------- names

RWKV_NAMES = {
    "blocks.*.ln1": "layers.*.ln1", "blocks.*.ln2": "layers.*.ln2", "blocks.*.pre_ln": "embed_norm",      # only in 0
    **{f"blocks.*.{part}.{name}": f"layers.*.{part}.{name}" for part, names in (
        ("attention", "time_decay time_first time_mix_key time_mix_value time_mix_receptance key value receptance "
                      "output"),
        ("feed_forward", "time_mix_key time_mix_receptance key value receptance")) for name in names.split()},
    "embeddings": "embed_tokens", "ln_out": "norm", "head": "lm_head"}


def t5_names(gated: bool) -> dict[str, str]:
    names = {}
    mlp = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"} if gated else {"wi": "up_proj", "wo": "down_proj"}
    for stack, attentions in (("encoder", [("SelfAttention", "self_attn", "input_layernorm")]),
                              ("decoder", [("SelfAttention", "self_attn", "input_layernorm"),
                                           ("EncDecAttention", "cross_attn", "cross_attn_layernorm")])):
        theirs, ours = f"{stack}.block.*.layer.", f"{stack}.layers.*."
        for i, (attention, our_attention, norm) in enumerate(attentions):
            names[f"{theirs}{i}.layer_norm"] = ours + norm
            names |= {f"{theirs}{i}.{attention}.{x}": f"{ours}{our_attention}.{x}_proj" for x in "qkvo"}
        names |= {f"{theirs}{i + 1}.DenseReluDense.{x}": f"{ours}mlp.{y}" for x, y in mlp.items()}
        names[f"{theirs}{i + 1}.layer_norm"] = ours + "post_attention_layernorm"
        names[f"{theirs}0.SelfAttention.relative_attention_bias"] = f"{stack}.position_bias"       # only in 0
        names[f"{stack}.final_layer_norm"] = f"{stack}.norm"
    return names | {"shared": "embed_tokens", "lm_head": "lm_head"}


CPM_LAYER = {"self_att.layernorm_before_attention": "input_layernorm", "ffn.layernorm_before_ffn":
             "post_attention_layernorm", "self_att.self_attention.attention_out": "o_proj",
             **{f"self_att.self_attention.project_{x}": f"{x}_proj" for x in "qkv"},
             "ffn.ffn.w_in.w_0": "gate_proj", "ffn.ffn.w_in.w_1": "up_proj", "ffn.ffn.w_out": "down_proj"}
CPM_NAMES = {**{f"encoder.layers.*.{theirs}": f"layers.*.{ours}" for theirs, ours in CPM_LAYER.items()},
             "input_embedding": "embed_tokens", "segment_embedding": "embed_segments", "lm_head": "lm_head",
             "position_bias.relative_attention_bias": "position_bias", "encoder.output_layernorm": "norm"}


def t5_head(files: Entries, config: T5Config, raw: dict) -> None:
    """The file alone decides: its config says what an old transformers needs for the right scale."""
    config.tie_embeddings = True


def t5_head_restored(tensors: dict, config: T5Config, raw: dict) -> bool:
    """To others "tied" means "scaled"."""
    if not config.scale_output:
        tensors.setdefault("lm_head.weight", tensors["shared.weight"].clone())
    raw |= {"tie_word_embeddings": config.scale_output, "scale_decoder_outputs": config.scale_output}
    return True


def cpm_head(files: Entries, config: CPMConfig, raw: dict) -> None:
    """The head is a part of the embedding: old files do not write it, or with the rows of the prompts."""
    embedding = files.get("input_embedding.weight")
    whole = files.get("lm_head.weight", embedding)
    if embedding is not None and len(whole.shape) == 2 and whole.shape == embedding.shape:
        files["lm_head.weight"] = layouts.derived((config.vocab_size, whole.shape[1]),
                                                  lambda: whole.read()[:config.vocab_size], whole)


# Old T5 files hold the embedding three times, and a second table that no layer reads.
T5_LEFTOVERS = (r"(encoder|decoder)\.embed_tokens\.weight|"
                r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
T5_HEAD = {"leftovers": T5_LEFTOVERS, "build": T5, "prepare": t5_head, "restore": t5_head_restored}
T5_RELU, T5_GATED = (Family(t5, t5_names(gated), (), **T5_HEAD) for gated in (False, True))
FAMILIES = {"rwkv": Family(rwkv, RWKV_NAMES, ("rwkv.",), build=RWKV), "t5": T5_RELU, "mt5": T5_GATED,
            "cpmant": Family(cpm, CPM_NAMES, ("cpmant.",), build=CPM, prepare=cpm_head, restore=lambda *_: True)}
CLASSES = {RWKVConfig: RWKV, T5Config: T5, CPMConfig: CPM}


def origin(model: nn.Module) -> Origin:
    """Of a model that was built here: what its family would call it."""
    raw = public_config(model.config)
    family = T5_GATED if getattr(model.config, "gated", False) else FAMILIES[raw["model_type"]]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}             # a tied head is not among them
    files = [layouts.file_name(name, family) for name in shapes]
    return Origin(family, raw, layouts.write(family, model.config, raw, shapes, files))


# ---------------------------------------------------------------- BlinkDL's files

BLINKDL = {r"^emb\.": "rwkv.embeddings.", r"^blocks\.": "rwkv.blocks.", r"^ln_out\.": "rwkv.ln_out.",
           r"\.ln0\.": ".pre_ln.", r"\.att\.": ".attention.", r"\.ffn\.": ".feed_forward.",
           "time_mix_k$": "time_mix_key", "time_mix_v$": "time_mix_value", "time_mix_r$": "time_mix_receptance"}


def find_blinkdl(path: Path) -> Path | None:
    """RWKV-4-*.pth, or the one .pth of a directory that has no config of any kind."""
    if path.is_file():
        other = path.name.startswith("consolidated") or (path.parent / "config.json").exists()
        return path if path.suffix == ".pth" and not other else None
    files = [] if any((path / f).exists() for f in ("config.json", "params.json")) else sorted(path.glob("*.pth"))
    return files[0] if len(files) == 1 else None


def open_blinkdl(path: Path) -> formats.Source:
    """A .pth of the original project: its names become transformers', the sizes are those of its tensors."""
    entries = formats.pickle_entries(path)
    if "blocks.0.att.time_decay" not in entries or "emb.weight" not in entries:
        raise UserError(f"{path} is no RWKV-4 file: it has {', '.join(sorted(entries)[:3]) or 'no tensors'} ..., "
                        "expected emb.weight, blocks.0.att.time_decay ...")
    if odd := [n for n in entries if re.match(r"blocks\.0\.att\.(ln_x|gate|time_(faaaa|maa|mix_g))", n)]:
        raise UserError(f"{path}: {odd[0]} is of RWKV-5 or later; only RWKV-4 is known")
    try:
        (V, C), A = entries["emb.weight"].shape, entries["blocks.0.att.key.weight"].shape[0]
        I = entries["blocks.0.ffn.key.weight"].shape[0]  # noqa: E741
    except (KeyError, ValueError) as missing:
        raise UserError(f"{path}: tensor {missing} is missing or no matrix") from None
    L = 1 + max(int(m[1]) for n in entries if (m := re.match(r"blocks\.(\d{1,6})\.", n)))
    length = re.search(r"ctx(\d{1,7})", path.name)             # only the name of the file says it
    config = {"model_type": "rwkv", "vocab_size": V, "hidden_size": C, "num_hidden_layers": L,
              "attention_hidden_size": A, "intermediate_size": I, "layer_norm_epsilon": 1e-5,
              "context_length": int(length[1]) if length else 1024}
    renamed, names = {}, {}
    for name, entry in entries.items():
        new = name
        for theirs, ours in BLINKDL.items():
            new = re.sub(theirs, ours, new)
        renamed[new], names[new] = entry, name
    return formats.Source(path, config, renamed, names=names)


# ---------------------------------------------------------------- the way back

def public_config(config: RWKVConfig | T5Config | CPMConfig) -> dict:
    """The readers above, backwards."""
    always = {"vocab_size": config.vocab_size}
    if isinstance(config, RWKVConfig):
        return always | {
            "architectures": ["RwkvForCausalLM"], "model_type": "rwkv", "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers, "attention_hidden_size": config.attention_size,
            "intermediate_size": config.intermediate_size, "layer_norm_epsilon": config.norm_eps,
            "context_length": config.max_positions, "rescale_every": 0, "tie_word_embeddings": config.tie_embeddings}
    if isinstance(config, CPMConfig):
        return always | {
            "architectures": ["CpmAntForCausalLM"], "model_type": "cpmant", "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
            "dim_head": config.head_dim, "dim_ff": config.intermediate_size,
            "position_bias_num_buckets": config.num_buckets, "position_bias_max_distance": config.max_distance,
            "prompt_length": config.prompt_length, "prompt_types": config.prompt_types,
            "segment_types": config.segment_types, "eps": config.norm_eps}
    act = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation]
    act = ("gated-gelu" if act == "gelu_new" else "gated-" + act) if config.gated else act
    return always | {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
        "d_model": config.hidden_size, "d_ff": config.intermediate_size, "d_kv": config.head_dim,
        "num_layers": config.num_layers, "num_decoder_layers": config.num_decoder_layers, "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.num_buckets, "relative_attention_max_distance": config.max_distance,
        "n_positions": config.max_positions, "layer_norm_epsilon": config.norm_eps, "feed_forward_proj": act,
        "tie_word_embeddings": config.scale_output,
        "scale_decoder_outputs": config.scale_output, "decoder_start_token_id": config.decoder_start_id}
