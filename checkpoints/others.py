"""The families that are no decoder of model.py: RWKV-4, T5 and its kin, CPM-Ant. For each one a reader of its
config.json, the table of names, and the way back, so that what was trained here is a directory that transformers loads.

    names    tensor of the file -> our parameter, * for the number of the layer, without the file's prefix

BlinkDL's own RWKV files have no config: the sizes are those of the tensors (`open_blinkdl`).
"""
import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import common
from checkpoints import export, formats, readers
from common import UserError
from cpm import CPM, CPMConfig
from rwkv import RWKV, RWKVConfig
from t5 import T5, T5Config


@dataclass(frozen=True)
class Family:
    config: Callable[[dict], object]       # config.json -> our config
    names: dict[str, str]                  # tensor of the file -> our parameter
    prefixes: tuple[str, ...] = ()         # what the file may put before its names, the head's excepted
    leftovers: str = ""                    # regular expression: tensors of public files that hold no weights
    build: Callable[[object], nn.Module] = None


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


def t5(raw: dict) -> T5Config:
    """v1.0 says relu and scales the head's input, v1.1 gated-gelu and does not: old configs tell by
    tie_word_embeddings, new ones, where that is always true, by scale_decoder_outputs."""
    how = raw.get("feed_forward_proj", "relu")
    gated, act = str(how).startswith("gated-"), str(how).removeprefix("gated-")
    if act not in readers.ACTIVATION_NAMES:
        raise ValueError(f"feed_forward_proj is {how!r}; known: {', '.join(readers.ACTIVATION_NAMES)}, and gated-... "
                         "of each")
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

def both(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{half}": f"{ours}.{half}" for half in ("weight", "bias")}


RWKV_NAMES = {
    "embeddings.weight": "embed_tokens.weight", **both("blocks.0.pre_ln", "embed_norm"), **both("ln_out", "norm"),
    "head.weight": "lm_head.weight", **both("blocks.*.ln1", "layers.*.ln1"), **both("blocks.*.ln2", "layers.*.ln2"),
    **{f"blocks.*.attention.{name}": f"layers.*.attention.{name}" for name in
       ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance", "key.weight",
        "value.weight", "receptance.weight", "output.weight")},
    **{f"blocks.*.feed_forward.{name}": f"layers.*.feed_forward.{name}" for name in
       ("time_mix_key", "time_mix_receptance", "key.weight", "value.weight", "receptance.weight")}}


def t5_names(gated: bool) -> dict[str, str]:
    names = {"shared.weight": "embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    mlp = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"} if gated else {"wi": "up_proj", "wo": "down_proj"}
    for stack in ("encoder", "decoder"):
        ours, last = f"{stack}.layers.*.", 1 if stack == "encoder" else 2
        parts = [(0, "SelfAttention", "self_attn", "input_layernorm")]
        parts += [(1, "EncDecAttention", "cross_attn", "cross_attn_layernorm")] if last == 2 else []
        for i, theirs, attention, norm in parts:
            names |= {f"{stack}.block.*.layer.{i}.{theirs}.{x}.weight": f"{ours}{attention}.{x}_proj.weight"
                      for x in "qkvo"}
            names[f"{stack}.block.*.layer.{i}.layer_norm.weight"] = f"{ours}{norm}.weight"
        names |= {f"{stack}.block.*.layer.{last}.DenseReluDense.{x}.weight": f"{ours}mlp.{y}.weight"
                  for x, y in mlp.items()}
        names[f"{stack}.block.*.layer.{last}.layer_norm.weight"] = f"{ours}post_attention_layernorm.weight"
        names[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = f"{stack}.position_bias.weight"
        names[f"{stack}.final_layer_norm.weight"] = f"{stack}.norm.weight"
    return names


CPM_LAYER = {"self_att.layernorm_before_attention": "input_layernorm", "ffn.layernorm_before_ffn":
             "post_attention_layernorm", "self_att.self_attention.attention_out": "o_proj",
             **{f"self_att.self_attention.project_{x}": f"{x}_proj" for x in "qkv"},
             "ffn.ffn.w_in.w_0": "gate_proj", "ffn.ffn.w_in.w_1": "up_proj", "ffn.ffn.w_out": "down_proj"}
CPM_NAMES = {"input_embedding.weight": "embed_tokens.weight", "segment_embedding.weight": "embed_segments.weight",
             "position_bias.relative_attention_bias": "position_bias", "encoder.output_layernorm.weight": "norm.weight",
             "lm_head.weight": "lm_head.weight",
             **{f"encoder.layers.*.{theirs}.weight": f"layers.*.{ours}.weight" for theirs, ours in CPM_LAYER.items()}}

# Old T5 files hold the embedding three times, and a second table that no layer reads.
T5_LEFTOVERS = (r"(encoder|decoder)\.embed_tokens\.weight|"
                r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
RWKV4 = Family(rwkv, RWKV_NAMES, ("rwkv.",), "", RWKV)
T5_RELU = Family(t5, t5_names(gated=False), (), T5_LEFTOVERS, T5)
T5_GATED = Family(t5, t5_names(gated=True), (), T5_LEFTOVERS, T5)
CPM_ANT = Family(cpm, CPM_NAMES, ("cpmant.",), "", CPM)
TYPES = {"rwkv": RWKV4, "t5": T5_RELU, "mt5": T5_GATED, "cpmant": CPM_ANT}


def family_of(config: object) -> Family | None:
    """By the class of our config; None: a decoder of model.py."""
    if isinstance(config, T5Config):
        return T5_GATED if config.gated else T5_RELU
    return RWKV4 if isinstance(config, RWKVConfig) else CPM_ANT if isinstance(config, CPMConfig) else None


def knows(raw: dict) -> bool:
    return isinstance(raw.get("model_type"), str) and raw["model_type"] in TYPES


def to_config(raw: dict, where: Path) -> object:
    try:
        return TYPES[raw["model_type"]].config({key: value for key, value in raw.items() if value is not None})
    except KeyError as missing:
        raise UserError(f"{where}: the config lacks {missing}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None


def file_name(config: object, ours: str) -> str:
    """layers.3.attention.key.weight -> rwkv.blocks.3.attention.key.weight: how transformers calls it. An adapter's
    path comes without .weight and goes without it."""
    family, tail = family_of(config), "" if ours.endswith((".weight", ".bias")) else ".weight"
    layer = re.search(r"(?<=layers\.)\d+", ours)
    back = {mine: theirs for theirs, mine in family.names.items()}
    wanted = re.sub(r"(?<=layers\.)\d+", "*", ours)
    theirs = back.get(wanted) or back[wanted + tail].removesuffix(tail)
    theirs = theirs.replace("*", layer[0]) if layer else theirs
    return theirs if ours.startswith("lm_head") else "".join(family.prefixes[:1]) + theirs


# ---------------------------------------------------------------- BlinkDL's files

BLINKDL = {r"^emb\.": "rwkv.embeddings.", r"^blocks\.": "rwkv.blocks.", r"^ln_out\.": "rwkv.ln_out.",
           r"\.ln0\.": ".pre_ln.", r"\.att\.": ".attention.", r"\.ffn\.": ".feed_forward.",
           "time_mix_k$": "time_mix_key", "time_mix_v$": "time_mix_value", "time_mix_r$": "time_mix_receptance"}


def find_blinkdl(path: Path) -> Path | None:
    """RWKV-4-*.pth, or the one .pth of a directory that has no config of any kind."""
    if path.is_file():
        return path if path.suffix == ".pth" and not path.name.startswith("consolidated") else None
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
    renamed = {}
    for name, entry in entries.items():
        for theirs, ours in BLINKDL.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = entry
    return formats.Source(path, config, renamed)


# ---------------------------------------------------------------- load

def load_other(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
               source: formats.Source | None = None) -> nn.Module:
    """A directory or a BlinkDL file -> model. Strict both ways, errors name the file and the tensor."""
    if source is None:
        source = open_blinkdl(pth) if (pth := find_blinkdl(Path(path))) else formats.open_source(Path(path))
    config = to_config(source.config, source.path)
    family = family_of(config)
    for prefix in family.prefixes:
        source.entries = {n if n.startswith(prefix) or n in ("head.weight", "lm_head.weight") else prefix + n: e
                          for n, e in source.entries.items()}
    check_layers(source, config)
    settle_head(source, config)
    with torch.device("meta"):
        model = family.build(config)
    fill(model, source, torch.device(device), dtype)
    return model.eval()


def check_layers(source: formats.Source, config: object) -> None:
    """Before a model is built: a config of 4000 layers and a file of two need not cost minutes."""
    stacks = {"": config.num_layers}
    if isinstance(config, T5Config):
        stacks = {"encoder.": config.num_layers, "decoder.": config.num_decoder_layers}
    for stack, layers in stacks.items():
        ours = next(ours for ours in family_of(config).names.values() if ours.startswith(f"{stack}layers.*."))
        for i in range(layers):
            name = file_name(config, ours.replace("*", str(i)))
            if name not in source.entries:
                raise UserError(f"{source.path}: tensor {name} is missing: the config says {layers} layers")


def settle_head(source: formats.Source, config: object) -> None:
    """"Tied" in the config loses against another head in the file; the same head written twice is still tied. For T5
    the file alone decides: its config says what an old transformers needs for the right scale. CPM's head is a part of
    the embedding: old files do not write it, or with the rows of the prompts."""
    head, embedding = file_name(config, "lm_head.weight"), file_name(config, "embed_tokens.weight")
    if embedding not in source.entries:
        return                                               # `fill` will say so
    if isinstance(config, CPMConfig):
        whole = source.entries.get(head) or source.entries[embedding]
        if len(whole.shape) == 2 and whole.shape == source.entries[embedding].shape:
            source.entries[head] = formats.Entry((config.vocab_size, whole.shape[1]),
                                                 lambda: whole.read()[:config.vocab_size], whole.file)
    elif head in source.entries and (config.tie_embeddings or isinstance(config, T5Config)):
        same = source.shape(head) == source.shape(embedding)
        config.tie_embeddings = same and torch.equal(source.read(head), source.read(embedding))
        if config.tie_embeddings:
            del source.entries[head]


def fill(model: nn.Module, source: formats.Source, device: torch.device, dtype: torch.dtype) -> None:
    """Names and shapes are compared before the first byte is read; then each tensor goes straight to its place."""
    config, family = model.config, family_of(model.config)
    wanted = {file_name(config, ours): (ours, tuple(p.shape)) for ours, p in model.named_parameters()}
    extra = [n for n in source.entries if n not in wanted and not re.fullmatch(family.leftovers, n)]
    if missing := [n for n in wanted if n not in source.entries]:
        hint = f"; the file has {extra[0]} ({len(extra)} tensors without a place)" if extra else ""
        raise UserError(f"{source.path}: tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} "
                        f"parameters){hint}")
    if extra:
        raise UserError(f"{source.path}: tensor {extra[0]} of {source.entries[extra[0]].file.name} has no place in "
                        f"this model ({len(extra)} such tensors): the config does not describe this file")
    for name, (_, shape) in wanted.items():
        if tuple(source.shape(name)) != shape:
            raise UserError(f"{source.path}: tensor {name} is {tuple(source.shape(name))}, the config asks for {shape}")
    for name, (ours, _) in wanted.items():
        tensor = source.read(name)
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{source.path}: tensor {name} is {tensor.dtype}, not floating point")
        parent, _, last = ours.rpartition(".")
        exact = last in getattr(model, "fp32", ()) and dtype in (torch.bfloat16, torch.float16)
        tensor = tensor.to(device=device, dtype=torch.float32 if exact else dtype, copy=True)
        setattr(model.get_submodule(parent), last, nn.Parameter(tensor))
    if not isinstance(config, CPMConfig):
        model.tie_weights()


# ---------------------------------------------------------------- save

def save(model: nn.Module, tokenizer, out_dir: str | Path) -> None:
    """A directory that transformers loads, as export.save writes it for the decoder."""
    out_dir, config = Path(out_dir), model.config
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise UserError("the model still carries LoRA adapters: lora.merge it (or lora.save the adapter), then "
                        "lora.strip")
    own_head = model.lm_head.weight is not model.embed_tokens.weight             # a merged adapter has untied it
    if own_head and getattr(config, "tie_embeddings", False):
        config = dataclasses.replace(config, tie_embeddings=False)
    tensors = {file_name(config, ours): p for ours, p in model.state_dict().items()
               if own_head or not ours.startswith("lm_head")}
    if isinstance(config, T5Config) and not own_head and not config.scale_output:
        tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()        # "tied" would mean "scaled" to others
    if bad := next((n for n, t in tensors.items() if not bool(torch.isfinite(t).all())), None):
        raise UserError(f"{bad} is not finite: the model is broken, nothing was saved in {out_dir}")
    raw = hf_config(config, next(model.parameters()).dtype)
    if tokenizer is not None:
        eos = tokenizer.eos_ids
        raw |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id,
                "eos_token_id": eos[0] if len(eos) == 1 else eos}
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").unlink(missing_ok=True)          # an earlier model's must not vouch for these weights
    export.write_weights(tensors, out_dir)
    if tokenizer is not None:
        export.write_tokenizer(tokenizer, out_dir)
        keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        generation = {key: raw[key] for key in keys if key in raw}
        common.atomic_write(out_dir / "generation_config.json", json.dumps(generation, indent=2))
    common.atomic_write(out_dir / "config.json", json.dumps(raw, indent=2))


def hf_config(config: object, dtype: torch.dtype) -> dict:
    """The readers above, backwards."""
    always = {"vocab_size": config.vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}
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
