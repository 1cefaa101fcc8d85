"""Every file format under one interface: a Source knows a config and, name by name, how to read a tensor.

    directory with *.safetensors        Hugging Face, one file or shards with an index
    directory with pytorch_model*.bin   the same, older
    consolidated.NN.pth + params.json   Meta's own LLaMA files, cut over several GPUs
    *.gguf                              llama.cpp
    *.bin of llama2.c                   seven integers, then fp32

Config and tensor names of a Source are always Hugging Face's, and RoPE is always in the half layout: whatever comes
after this file (adapters, families, the model) does not know which format it was. Tensors are read one at a time, from
memory maps, so that loading needs the model and one tensor.
"""
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints import gguf, readers
from common import UserError


@dataclass
class Entry:
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    file: Path


@dataclass
class Source:
    """Where a model comes from: config as in config.json, tensors by name."""
    path: Path
    config: dict
    entries: dict[str, Entry] = field(default_factory=dict)
    patches: list = field(default_factory=list)            # adapters and deltas, in order (checkpoints/adapters.py)

    def read(self, name: str) -> Tensor:
        tensor = self.entries[name].read()
        for patch in self.patches:
            tensor = patch.apply(name, tensor)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.entries[name].shape
        for patch in self.patches:
            shape = patch.shape(name, shape)
        return shape


def open_source(path: Path) -> Source:
    """A file or a directory that holds any one of the formats."""
    if path.is_file():
        return open_file(path)
    if (path / "config.json").exists():
        return Source(path, read_json(path / "config.json"), hf_entries(path))
    if (path / "params.json").exists():
        return open_meta(path)
    files = sorted(f for kind in ("gguf", "pth", "bin", "safetensors") for f in path.glob(f"*.{kind}")
                   if not f.match("tok*.bin"))               # llama2.c's tokenizer
    if len(files) == 1 and files[0].suffix in (".gguf", ".bin"):
        return open_file(files[0])
    if len(many := [f.name for f in files if f.suffix == ".gguf"]) > 1:
        raise UserError(f"{path} holds several GGUF files, name one: {', '.join(many)}")
    what = ", ".join(f.name for f in files[:4]) + " but no config.json" if files else list_names(path)
    raise UserError(f"{path} is no checkpoint: it has {what}. Expected config.json with *.safetensors or "
                    "pytorch_model*.bin, params.json with consolidated.*.pth, or one .gguf file")


def open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.name.startswith("consolidated") and path.suffix == ".pth":
        return open_meta(path.parent)
    if path.suffix in (".safetensors", ".json", ".index") or path.name.startswith("pytorch_model"):
        return open_source(path.parent)
    if path.suffix == ".bin":
        return open_llama2c(path)
    raise UserError(f"{path}: a file of this kind is not known; expected .gguf, consolidated.*.pth, llama2.c's .bin, "
                    "or a directory")


def list_names(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "nothing in it"


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, expected an object")
    return data


# ---------------------------------------------------------------- Hugging Face directories

def hf_entries(folder: Path, stem: str = "") -> dict[str, Entry]:
    """Tensors of model.safetensors, of shards with an index, or of the .bin files where there are no safetensors."""
    for suffix, pattern in ((".safetensors", "model*.safetensors"), (".bin", "pytorch_model*.bin")):
        index = next(iter(sorted(folder.glob(f"*{suffix}.index.json"))), None)
        files = sorted(folder.glob(pattern))
        if index is not None:
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise UserError(f"{index} has no weight_map")
            files = sorted({inside(folder, name, index) for name in listed.values()})
            if missing := [f.name for f in files if not f.exists()]:
                raise UserError(f"{index.name} lists {missing[0]}, which is not in {folder} ({len(missing)} of "
                                f"{len(files)} shards missing): the download is incomplete")
        if files:
            entries = merge_files(files)
            if index is not None and (lost := sorted(set(listed) - set(entries))):
                raise UserError(f"{index} promises {lost[0]}, but no shard holds it ({len(lost)} such tensors)")
            return entries
    raise UserError(f"{folder} has a config.json but no weights (model*.safetensors or pytorch_model*.bin); "
                    f"it has {list_names(folder)}")


def inside(folder: Path, name: str, index: Path) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{index} points to {name!r}, outside of its folder")
    return folder / name


def merge_files(files: list[Path]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for file in files:
        found = safetensors_entries(file) if file.suffix == ".safetensors" else pickle_entries(file)
        if both := sorted(set(entries) & set(found)):
            raise UserError(f"tensor {both[0]} stands in {entries[both[0]].file} and in {file.name}: remove what does "
                            "not belong to this model")
        entries |= found
    return entries


def safetensors_entries(file: Path) -> dict[str, Entry]:
    """safe_open maps the file, checks its header against its size, and reads a tensor only when it is asked for."""
    try:
        handle = safe_open(file, framework="pt")
        names = list(handle.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: {error}. The file is damaged or incomplete ({file.stat().st_size} bytes): download "
                        "it again") from None

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            try:
                return handle.get_tensor(name)
            except (SafetensorError, OSError, KeyError, AttributeError) as error:       # e.g. a dtype that torch lacks
                raise UserError(f"{file}: tensor {name} cannot be read: {error}") from None
        return read
    return {name: Entry(tuple(handle.get_slice(name).get_shape()), reader(name), file) for name in names}


def pickle_entries(file: Path) -> dict[str, Entry]:
    """A .bin / .pth file. weights_only: what is no tensor or plain container is refused, no code of the file runs."""
    import pickle
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):           # files written before 2020 are no zip archives
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} holds something else than tensors and is not opened, it could run code ({reason}). "
                        "Convert it to safetensors where you trust it") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read: {reason}. The file is damaged or incomplete ({file.stat().st_size} "
                        "bytes): download it again") from None
    for wrapper in ("state_dict", "model", "module"):               # what training scripts put around it
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if isinstance(state, dict) and all(isinstance(t, Tensor) for t in flat(state).values()):
        state = flat(state)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        kinds = sorted({type(v).__name__ for v in (state.values() if isinstance(state, dict) else [state])})
        raise UserError(f"{file} is no table of tensors; it holds {', '.join(kinds)}")
    return {str(name): Entry(tuple(t.shape), lambda t=t: t, file) for name, t in state.items()}


def flat(table: dict) -> dict:
    """Tables inside tables, as Megatron saves them: {"embedding": {"weight": t}} -> {"embedding.weight": t}."""
    out = {}
    for key, value in table.items():
        inside = flat(value) if isinstance(value, dict) else None
        out |= {key: value} if inside is None else {f"{key}.{name}": tensor for name, tensor in inside.items()}
    return out


# ---------------------------------------------------------------- LLaMA's other names, and the RoPE layout

def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from interleaved pairs (0 1)(2 3).. to halves (0 2 .. | 1 3 ..), head by head: RoPE then rotates
    the same pairs. rows of one head 0 1 2 3 -> 0 2 1 3. Works on the bias as well."""
    D = weight.shape[0] // heads
    return weight.view(heads, D // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


NORMS = {"attention_norm": "input_layernorm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
META_NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight", **NORMS, "attention.wq": "self_attn.q_proj",
              "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
              "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
              "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
GGUF_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight", **NORMS, "attn_q": "self_attn.q_proj",
              "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def rename(name: str, table: dict[str, str], layer: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight; unknown names stay, and are reported."""
    if name in table:
        return table[name]
    m = re.fullmatch(rf"{layer}\.(\d+)\.(.+)\.(weight|bias)", name)
    return f"model.layers.{m[1]}.{table[m[2]]}.{m[3]}" if m and m[2] in table else name


def interleaved(name: str, read: Callable[[], Tensor], heads: int, kv_heads: int) -> Callable[[], Tensor]:
    """The reader of a tensor of an interleaved file: q and k come out in the half layout."""
    kind = name.split(".")[-2] if "." in name else ""
    if kind not in ("q_proj", "k_proj"):
        return read
    return lambda: to_halves(read(), heads if kind == "q_proj" else kv_heads)


# ---------------------------------------------------------------- Meta

def open_meta(folder: Path) -> Source:
    """consolidated.00.pth, .01.pth, ...: each matrix is cut over the files, along rows or columns."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder} has params.json but no consolidated.*.pth; it has {list_names(folder)}")
    expected = [f"consolidated.{i:02}.pth" for i in range(len(files))]
    if [f.name for f in files] != expected:
        raise UserError(f"{folder}: the shards are {', '.join(f.name for f in files)}, expected {expected[0]} .. "
                        f"{expected[-1]} without a gap")
    params = read_json(folder / "params.json")
    shards = [pickle_entries(f) for f in files]
    try:
        dim, heads = params["dim"], params["n_heads"]
        config = {"model_type": "llama", "hidden_size": dim, "num_hidden_layers": params["n_layers"],
                  "num_attention_heads": heads, "num_key_value_heads": params.get("n_kv_heads") or heads,
                  "rms_norm_eps": params["norm_eps"], "rope_theta": params.get("rope_theta") or 10000.0}
        config["intermediate_size"] = shards[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(shards)
    except KeyError as missing:
        raise UserError(f"{folder}: {missing} is missing in params.json or in {files[0].name}") from None
    readers.check_numbers(config, folder / "params.json")
    newest, first = config["rope_theta"] > 1e5, config["rms_norm_eps"] < 5e-6          # Llama 3, Llama 1: the length is
    config["max_position_embeddings"] = 8192 if newest else 2048 if first else 4096    # not written in the file
    if params.get("use_scaled_rope"):          # Meta's own code knows the factor by heart: 8, in 3.2's small models 32
        config["rope_scaling"] = {"rope_type": "llama3", "factor": 32.0 if dim < 4096 else 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        config["max_position_embeddings"] = 131072
    entries = {}
    for name in sorted(set().union(*shards)):
        if name == "rope.freqs":
            continue
        if absent := [f.name for f, s in zip(files, shards) if name not in s]:
            raise UserError(f"{folder}: tensor {name} is not in {absent[0]}")
        new, axis = rename(name, META_NAMES, "layers"), meta_axis(name, shards[0][name].shape, dim, len(shards))
        shape = list(shards[0][name].shape)
        if axis is not None:
            shape[axis] *= len(shards)
        read = joined([s[name].read for s in shards], axis)
        entries[new] = Entry(tuple(shape), interleaved(new, read, heads, config["num_key_value_heads"]), files[0])
    if "model.embed_tokens.weight" in entries:
        config["vocab_size"] = entries["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in entries
    return Source(folder, config, entries)


def meta_axis(name: str, shape: tuple, dim: int, shards: int) -> int | None:
    """The axis along which Meta cut this tensor; None: every file has all of it."""
    if "norm" in name or shards == 1:
        return None
    if "tok_embeddings" in name:                              # Llama 1 and 2 cut the columns, Llama 3 the rows
        return 1 if shape[1] * shards == dim else 0
    return 1 if ".wo." in name or ".w2." in name else 0


def joined(readers: list[Callable[[], Tensor]], axis: int | None) -> Callable[[], Tensor]:
    return readers[0] if axis is None else lambda: torch.cat([read() for read in readers], dim=axis)


# ---------------------------------------------------------------- GGUF

INTERLEAVED_ARCHS = ("llama",)             # llama.cpp permutes q and k when it converts these


def open_gguf(path: Path) -> Source:
    meta, tensors = gguf.read_header(path)
    arch = meta.get("general.architecture")

    def get(key: str, default=None, kind: type = int):
        value = meta.get(f"{arch}.{key}", default)
        if value is None:
            raise UserError(f"{path}: {arch}.{key} is missing in the header")
        if not isinstance(value, kind):                        # a list: another number per layer
            raise UserError(f"{path}: {arch}.{key} is {str(value)[:60]}, only one {kind.__name__} for the whole model "
                            "is supported")
        return value

    heads = get("attention.head_count")
    kv_heads = get("attention.head_count_kv", heads)
    if heads <= 0 or kv_heads <= 0:
        raise UserError(f"{path}: head counts {heads}, {kv_heads}")
    config = {"model_type": arch, "hidden_size": get("embedding_length"), "num_hidden_layers": get("block_count"),
              "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "intermediate_size": get("feed_forward_length"), "max_position_embeddings": get("context_length"),
              "rms_norm_eps": decimal(get("attention.layer_norm_rms_epsilon", 1e-5, float)),
              "rope_theta": decimal(get("rope.freq_base", 10000.0, float))}
    config["head_dim"] = get("attention.key_length", 0) or config["hidden_size"] // heads
    if (turned := get("rope.dimension_count", config["head_dim"])) != config["head_dim"]:
        raise UserError(f"{path}: RoPE turns {turned} of {config['head_dim']} numbers of a head; only all of them is "
                        "supported")
    permuted, entries = arch in INTERLEAVED_ARCHS, {}
    for name, (shape, *_) in tensors.items():
        if name == "rope_freqs.weight":
            continue
        new = rename(name, GGUF_NAMES, "blk")
        read = functools.partial(gguf.read_tensor, path, name)
        entries[new] = Entry(shape, interleaved(new, read, heads, kv_heads) if permuted else read, path)
    if "model.embed_tokens.weight" in entries:
        config["vocab_size"] = entries["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in entries
    config["attention_bias"] = arch == "llama" and any(name.endswith("o_proj.bias") for name in entries)
    config["rope_scaling"] = gguf_rope(path, meta, tensors, arch, config)
    return Source(path, config, entries)


def decimal(x: float) -> float:
    """What was meant: the header holds fp32, in which 1e-5 reads 9.999999747e-06."""
    return float(f"{x:.7g}")


def gguf_rope(path: Path, meta: dict, tensors: dict, arch: str, config: dict) -> dict | None:
    """Llama 3.1's scaling comes as a table of divisors, the others by name."""
    kind = meta.get(f"{arch}.rope.scaling.type", "linear")    # files of 2023 hold the factor alone, and mean linear
    if "rope_freqs.weight" in tensors:
        shape, needed = tensors["rope_freqs.weight"][0], (config["head_dim"] // 2,)
        if shape != needed:
            raise UserError(f"{path}: tensor rope_freqs.weight is {shape}, the head asks for {needed}")
        factors = gguf.read_tensor(path, "rope_freqs.weight").float().tolist()
        known = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192}
        from model import llama3_frequencies
        base = config["rope_theta"] ** -(torch.arange(0, config["head_dim"], 2).float() / config["head_dim"])
        for factor in (8.0, 32.0):                            # recognised, it can be written down again for other tools
            table = base / llama3_frequencies(base, {**known, "factor": factor}, 8192)
            if torch.allclose(table, torch.tensor(factors), rtol=1e-4):
                return {**known, "factor": factor}
        return {"rope_type": "factors", "factors": factors}
    if kind in ("none", "linear", "yarn"):
        factor = meta.get(f"{arch}.rope.scaling.factor", meta.get(f"{arch}.rope.scale_linear", 1.0))
        trained = meta.get(f"{arch}.rope.scaling.original_context_length")
        if kind == "none" or factor in (0, 1):
            return None
        scaling = {"rope_type": kind, "factor": factor}
        return {**scaling, "original_max_position_embeddings": trained} if trained else scaling
    raise UserError(f"{path}: {arch}.rope.scaling.type is {kind!r}; known: none, linear, yarn")


# ---------------------------------------------------------------- llama2.c

def open_llama2c(path: Path) -> Source:
    """Version 0 of llama2.c: dim, hidden, layers, heads, kv heads, vocabulary (negative: head of its own), length; then
    fp32 tensors kind by kind, all layers of a kind together."""
    import struct

    import numpy as np
    size = path.stat().st_size
    if size < 28:
        raise UserError(f"{path}: {size} bytes are too few for a llama2.c model")
    with open(path, "rb") as file:
        C, I, L, H, K, V, T = struct.unpack("<7i", file.read(28))  # noqa: E741
    tied, V = V > 0, abs(V)
    if min(C, I, L, H, K, V, T) <= 0 or max(C, I, V, T) > 1 << 24 or L > 1 << 12 or C % H or H % K:
        raise UserError(f"{path}: a .bin file that is neither a pytorch_model*.bin nor a llama2.c model (its first "
                        f"integers are {C, I, L, H, K, V, T})")
    D = C // H
    kinds = [("model.embed_tokens", (V, C)), ("input_layernorm", (C,)), ("self_attn.q_proj", (C, C)),
             ("self_attn.k_proj", (K * D, C)), ("self_attn.v_proj", (K * D, C)), ("self_attn.o_proj", (C, C)),
             ("post_attention_layernorm", (C,)), ("mlp.gate_proj", (I, C)), ("mlp.down_proj", (C, I)),
             ("mlp.up_proj", (I, C)), ("model.norm", (C,)), ("rope", (T * D,)), ("lm_head", (V, C))]
    kinds = kinds[:-1] if tied else kinds
    spans, at = {}, 28
    for kind, shape in kinds:
        whole = kind.startswith(("model.", "rope", "lm_head"))
        for i in range(1 if whole else L):
            spans[(kind if whole else f"model.layers.{i}.{kind}") + ".weight"] = (at, shape)
            at += 4 * math.prod(shape)
    if at != size:
        raise UserError(f"{path}: a llama2.c model of these sizes has {at} bytes, this file has {size}: damaged, or "
                        "another version")
    data = np.memmap(path, dtype="<f4", mode="c", offset=28, shape=((size - 28) // 4,))

    def reader(start: int, shape: tuple) -> Callable[[], Tensor]:
        return lambda: torch.from_numpy(data[(start - 28) // 4:][:math.prod(shape)]).view(shape)

    entries = {name: Entry(shape, interleaved(name, reader(start, shape), H, K), path)
               for name, (start, shape) in spans.items() if name != "rope.weight"}
    config = {"model_type": "llama", "hidden_size": C, "intermediate_size": I, "num_hidden_layers": L,
              "num_attention_heads": H, "num_key_value_heads": K, "vocab_size": V, "max_position_embeddings": T,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied}
    return Source(path, config, entries)
