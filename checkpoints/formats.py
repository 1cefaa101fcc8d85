"""Every file format under one interface: a Source knows a config and, name by name, how to read a tensor.

    directory with *.safetensors        Hugging Face, one file or shards with an index
    directory with pytorch_model*.bin   the same, older; or config.json and one .pt, .pth, .ckpt, .bin of any name
    consolidated.* + params.json        Meta's own LLaMA files, cut over several GPUs; Mistral's, as safetensors
    *.gguf                              llama.cpp, one file or -00001-of-00003 (checkpoints/gguf_models.py)
    *.bin of llama2.c                   seven integers, then fp32
    ckpt.pt of nanoGPT                  a GPT-2 without Conv1D

Config and tensor names of a Source are always Hugging Face's, and RoPE is always in the half layout: whatever comes
after this file (adapters, families, the model) does not know which format it was. Tensors are read one at a time, from
memory maps, so that loading needs the model and one tensor. Nothing that a file says is believed before it was held
against the file's size, and no code of a file is run.
"""
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints import readers
from common import UserError

# What a tensor is stored as, in the words of safetensors; GGUF adds its block formats (Q4_K ...).
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass
class Entry:
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    file: Path
    kind: str = "F32"                                      # a key of DTYPES, or a block format


@dataclass
class Source:
    """Where a model comes from: config as in config.json, tensors by name."""
    path: Path
    config: dict
    entries: dict[str, Entry] = field(default_factory=dict)
    patches: list = field(default_factory=list)            # adapters and deltas, in order (checkpoints/adapters.py)

    @property
    def config_file(self) -> Path:
        """What to name when the config is wrong: config.json, params.json, or a file that has everything in it."""
        return next((f for n in ("config.json", "params.json") if (f := self.path / n).exists()), self.path)

    def weights(self) -> str:
        """What to name when a tensor is missing."""
        files = sorted({entry.file.name for entry in self.entries.values()}) or ["a file without tensors"]
        return files[0] + (f" and {len(files) - 1} other files" if len(files) > 1 else "")

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
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    if (path / "params.json").exists() and not any(any(path.glob(pattern)) for pattern in HF_FILES):
        return open_meta(path)                             # Mistral puts a config.json beside its own files
    if (path / "config.json").exists():
        return Source(path, read_json(path / "config.json"), hf_entries(path))
    files = sorted(f for kind in ("gguf", "pth", "pt", "bin", "safetensors") for f in path.glob(f"*.{kind}")
                   if not f.match("tok*.bin"))               # llama2.c's tokenizer
    whole = [f for f in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", f.name)]
    if len(whole) == 1 and whole[0].suffix in (".gguf", ".bin", ".pt", ".pth"):
        return open_file(whole[0])
    if len(many := [f.name for f in whole if f.suffix == ".gguf"]) > 1:
        raise UserError(f"{path} holds several GGUF files, name one: {', '.join(many)}")
    what = ", ".join(f.name for f in files[:4]) + " but no config.json" if files else list_names(path)
    raise UserError(f"{path} is no checkpoint: it has {what}. Expected config.json with *.safetensors or "
                    "pytorch_model*.bin, params.json with consolidated.*, or one .gguf file")


def open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        from checkpoints import gguf_models  # not at the top: it builds what stands here
        return gguf_models.open_gguf(path)
    if path.name.startswith("consolidated"):
        return open_meta(path.parent)
    if path.suffix == ".json" or any(path.match(pattern) for pattern in HF_FILES):
        if not (path.parent / "config.json").exists():
            raise UserError(f"{path} has no config.json beside it, which says what model it is: take it from where the "
                            "weights came from")
        return open_source(path.parent)
    if path.suffix in STATES and (path.parent / "config.json").exists():
        return Source(path.parent, read_json(path.parent / "config.json"), merge_files([path]))
    if path.suffix == ".safetensors":
        return open_source(path.parent)                    # which says what is missing
    if path.suffix == ".bin":
        return open_llama2c(path)
    if path.suffix in STATES:
        return open_nanogpt(path)
    raise UserError(f"{path}: a file of this kind is not known; expected .gguf, consolidated.*.pth, nanoGPT's ckpt.pt, "
                    "llama2.c's .bin, or a directory")


def check_plain(source: Source) -> None:
    """Weights that GPTQ, AWQ, bitsandbytes or fp8 packed are no matrices: their names are there, their numbers not."""
    quantised, bits = source.config.get("quantization_config"), source.config.get("quantization_bit")
    if quantised or bits:                                      # ChatGLM's own way has a number of bits
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised or f"int{bits}"
        raise UserError(f"{source.path}: its weights are packed by {str(method)[:40]!r}; of quantised files only GGUF "
                        "is read. Take the model's original weights, or a GGUF file of it")


def list_names(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "nothing in it"


def read_json(path: Path) -> dict:
    try:
        if (size := path.stat().st_size) > 1 << 28:
            raise UserError(f"{path} has {size} bytes: no config and no index is that long")
        data = json.loads(path.read_text(encoding="utf-8-sig"))    # an editor may have put a mark in front
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, expected an object")
    return data


# ---------------------------------------------------------------- Hugging Face directories

HF_FILES = ("model*.safetensors", "pytorch_model*.bin")
STATES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
OTHER_STATES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|tok|adapter_model).*|"
                          r".*optim_states\.pt")            # what a training leaves beside the weights


def hf_entries(folder: Path) -> dict[str, Entry]:
    """Tensors of model.safetensors, of shards with an index, of the .bin files where there are no safetensors, or of
    the one file that is there (codegeex_13b.pt, mp_rank_00_model_states.pt)."""
    for pattern in HF_FILES:
        index = next(iter(sorted(folder.glob(f"{pattern}.index.json"))), None)
        files = sorted(folder.glob(pattern))
        if index is not None:
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise UserError(f"{index} has no weight_map")
            files = sorted({inside(folder, name, index) for name in map(str, listed.values())})
            if missing := [f.name for f in files if not f.exists()]:
                raise UserError(f"{index.name} lists {missing[0]}, which is not in {folder} ({len(missing)} of "
                                f"{len(files)} shards missing): the download is incomplete")
        if files:
            entries = merge_files(files)
            if index is not None and (lost := sorted(set(listed) - set(entries))):
                raise UserError(f"{index} promises {lost[0]}, but no shard holds it ({len(lost)} such tensors)")
            return entries
    files = sorted(f for f in folder.iterdir() if f.suffix in STATES and not OTHER_STATES.fullmatch(f.name))
    if len(files) == 1:
        return merge_files(files)
    if files:
        raise UserError(f"{folder} has a config.json and {len(files)} files that may be its weights: name the one, or "
                        f"take the others away ({', '.join(f.name for f in files[:6])})")
    raise UserError(f"{folder} has a config.json but no weights (model*.safetensors or pytorch_model*.bin); "
                    f"it has {list_names(folder)}")


def inside(folder: Path, name: str, index: Path) -> Path:
    if Path(name).name != name or "\0" in name or not name.endswith((".safetensors", ".bin")):
        raise UserError(f"{index} points to {name[:80]!r}, outside of its folder or no file of weights")
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
        slices = {name: handle.get_slice(name) for name in handle.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: {error}. The file is damaged or incomplete ({size_of(file)}): download it "
                        "again") from None

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            try:
                return handle.get_tensor(name)
            except (SafetensorError, OSError, KeyError, AttributeError) as error:       # e.g. a dtype that torch lacks
                raise UserError(f"{file}: tensor {name} cannot be read: {error}") from None
        return read
    return {name: Entry(tuple(part.get_shape()), reader(name), file, part.get_dtype())
            for name, part in slices.items()}


def size_of(file: Path) -> str:
    return f"{file.stat().st_size} bytes" if file.exists() else "there is no such file"


def pickle_entries(file: Path) -> dict[str, Entry]:
    """A .bin / .pth file as a table of tensors."""
    state = load_pickle(file)
    for wrapper in ("state_dict", "model", "module"):               # what training scripts put around it
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if isinstance(state, dict) and all(isinstance(t, Tensor) for t in flat(state).values()):
        state = flat(state)
    for prefix in ("module.", "_orig_mod."):                        # DDP's and torch.compile's, on every name
        if isinstance(state, dict) and state and all(str(name).startswith(prefix) for name in state):
            state = {str(name).removeprefix(prefix): t for name, t in state.items()}
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        kinds = sorted({type(v).__name__ for v in (state.values() if isinstance(state, dict) else [state])})
        raise UserError(f"{file} is no table of tensors; it holds {', '.join(kinds)}")
    return {str(name): Entry(tuple(t.shape), lambda t=t: t, file, KINDS.get(t.dtype, str(t.dtype)))
            for name, t in state.items() if honest(file, name, t)}


def load_pickle(file: Path):
    """weights_only: what is no tensor or plain container is refused, no code of the file runs."""
    import pickle
    try:
        if zipped := zipfile.is_zipfile(file):
            check_zip(file)                                         # files written before 2020 are no zip archives
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} holds something else than tensors and is not opened, it could run code ({reason}). "
                        "Convert it to safetensors where you trust it") from None
    except UserError:
        raise
    except Exception as error:           # a damaged pickle makes the reader stumble in any way that Python knows
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{file} ({size_of(file)}) asks for more memory than there is: damaged, or too large for "
                            "this machine") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file} cannot be read: {reason}. The file is damaged or incomplete ({size_of(file)}): "
                        "download it again") from None


def check_zip(file: Path) -> None:
    """torch stores its archives uncompressed. Compressed or overlapping members are how a small file becomes a huge
    one, and torch would unpack them."""
    members = zipfile.ZipFile(file).infolist()
    if packed := next((m for m in members if m.compress_type != zipfile.ZIP_STORED), None):
        raise UserError(f"{file}: its member {packed.filename[:100]} is compressed ({packed.file_size} bytes in "
                        f"{packed.compress_size}), which torch never writes: not opened")
    if (claimed := sum(m.file_size for m in members)) > file.stat().st_size:
        raise UserError(f"{file}: its members claim {claimed} bytes, the file has {file.stat().st_size}: not opened")


def honest(file: Path, name: str, t: Tensor) -> bool:
    """A tensor that says it is larger than its bytes (strides of 0, no storage at all) would be copied at that size."""
    if t.layout != torch.strided or t.is_quantized or t.device.type != "cpu":
        raise UserError(f"{file}: tensor {name} is {t.layout}, quantised or without numbers: only plain tensors are "
                        "supported")
    if t.numel() * t.element_size() > t.untyped_storage().nbytes():
        raise UserError(f"{file}: tensor {name} {tuple(t.shape)} claims more numbers than the "
                        f"{t.untyped_storage().nbytes()} bytes it has: the file is damaged")
    return True


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


META_NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight", "attention_norm": "input_layernorm",
              "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj",
              "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
              "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
              "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}


def from_meta(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight; unknown names stay, and are reported."""
    if name in META_NAMES:
        return META_NAMES[name]
    m = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    return f"model.layers.{m[1]}.{META_NAMES[m[2]]}.{m[3]}" if m and m[2] in META_NAMES else name


def interleaved(where: Path, name: str, shape: tuple, read: Callable[[], Tensor], config: dict) -> Callable[[], Tensor]:
    """The reader of a tensor of an interleaved file: q and k come out in the half layout."""
    kind = name.split(".")[-2] if "." in name else ""
    if kind not in ("q_proj", "k_proj"):
        return read
    heads = config["num_attention_heads" if kind == "q_proj" else "num_key_value_heads"]
    if not shape or shape[0] % (2 * heads):
        raise UserError(f"{where}: tensor {name} is {shape}, which cannot be cut into {heads} heads of an even size")
    return lambda: to_halves(read(), heads)


# ---------------------------------------------------------------- Meta and Mistral

def open_meta(folder: Path) -> Source:
    """consolidated.00.pth, .01.pth, ...: each matrix is cut over the files, along rows or columns. Mistral publishes
    the same names and layout in consolidated.safetensors, whole or as an ordinary set of shards."""
    shards, files = meta_shards(folder)
    config = meta_config(folder, shards)
    entries = {}
    for name in sorted(set().union(*shards)):
        if name == "rope.freqs":
            continue
        if absent := [f.name for f, s in zip(files, shards) if name not in s]:
            raise UserError(f"{folder}: tensor {name} is not in {absent[0]}")
        parts = [s[name] for s in shards]
        axis = meta_axis(name, parts[0].shape, config["hidden_size"], len(shards))
        shape = joined_shape(folder, name, [p.shape for p in parts], axis)
        new, read = from_meta(name), joined([p.read for p in parts], axis)
        entries[new] = Entry(shape, interleaved(folder, new, shape, read, config), parts[0].file, parts[0].kind)
    if "model.embed_tokens.weight" in entries:
        config["vocab_size"] = entries["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in entries
    return Source(folder, config, entries)


def meta_shards(folder: Path) -> tuple[list[dict[str, Entry]], list[Path]]:
    if files := sorted(folder.glob("consolidated*.safetensors")):
        return [merge_files(files)], files[:1]
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder} has params.json but no consolidated.*.pth; it has {list_names(folder)}")
    expected = [f"consolidated.{i:02}.pth" for i in range(len(files))]
    if [f.name for f in files] != expected:
        raise UserError(f"{folder}: the shards are {', '.join(f.name for f in files)}, expected {expected[0]} .. "
                        f"{expected[-1]} without a gap")
    return [pickle_entries(f) for f in files], files


def meta_config(folder: Path, shards: list[dict[str, Entry]]) -> dict:
    if not (folder / "params.json").exists():
        raise UserError(f"{folder} has consolidated.* but no params.json, which says how many heads there are")
    params = read_json(folder / "params.json")
    try:
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": params["dim"],
                  "num_hidden_layers": params["n_layers"], "num_attention_heads": params["n_heads"],
                  "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
                  "rms_norm_eps": params["norm_eps"], "rope_theta": params.get("rope_theta") or 10000.0}
        first = shards[0]["layers.0.feed_forward.w1.weight"]
    except KeyError as missing:
        raise UserError(f"{folder}: {missing} is missing in params.json or in the weights") from None
    config["intermediate_size"] = (first.shape or (0,))[0] * len(shards)
    config |= {"head_dim": params["head_dim"]} if params.get("head_dim") else {}           # Mistral's say it
    readers.check_numbers(config, folder / "params.json")
    newest, oldest = config["rope_theta"] > 1e5, config["rms_norm_eps"] < 5e-6          # Llama 3, Llama 1: the length
    config["max_position_embeddings"] = 8192 if newest else 2048 if oldest else 4096    # is not written in the file
    if params.get("use_scaled_rope"):          # Meta's own code knows the factor by heart: 8, in 3.2's small models 32
        small = config["hidden_size"] in (2048, 3072)          # Llama 3.2's 1B and 3B
        config["rope_scaling"] = {"rope_type": "llama3", "factor": 32.0 if small else 8.0,
                                  "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 8192}
        config["max_position_embeddings"] = 131072
    if window := params.get("sliding_window"):
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window,
                   "max_position_embeddings": 32768}
    return config


def meta_axis(name: str, shape: tuple, dim: int, shards: int) -> int | None:
    """The axis along which Meta cut this tensor; None: every file has all of it."""
    if "norm" in name or shards == 1:
        return None
    if "tok_embeddings" in name:                              # Llama 1 and 2 cut the columns, Llama 3 the rows
        return 1 if shape[-1] * shards == dim else 0
    return 1 if ".wo." in name or ".w2." in name else 0


def joined_shape(folder: Path, name: str, shapes: list[tuple], axis: int | None) -> tuple:
    if axis is None:
        return shapes[0]
    rest = {(*s[:axis], *s[axis + 1:]) if len(s) == 2 else s for s in shapes}
    if len(rest) > 1 or len(shapes[0]) != 2:
        raise UserError(f"{folder}: tensor {name} is {', '.join(map(str, shapes))} in the {len(shapes)} shards, which "
                        "do not fit together: shards of two models")
    whole = list(shapes[0])
    whole[axis] = sum(s[axis] for s in shapes)
    return tuple(whole)


def joined(readers: list[Callable[[], Tensor]], axis: int | None) -> Callable[[], Tensor]:
    return readers[0] if axis is None else lambda: torch.cat([read() for read in readers], dim=axis)


# ---------------------------------------------------------------- nanoGPT

def open_nanogpt(path: Path) -> Source:
    """ckpt.pt: {"model": GPT-2's tensors, "model_args": sizes}. Its matrices are nn.Linear, GPT-2's Conv1D: turned."""
    state = load_pickle(path)
    args = state.get("model_args") if isinstance(state, dict) else None
    if not isinstance(args, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: a file of this kind is read when nanoGPT wrote it (model and model_args); this one "
                        "holds something else. A state_dict belongs into pytorch_model.bin beside its config.json")
    try:
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu",
                  "vocab_size": args["vocab_size"], "n_positions": args["block_size"], "n_embd": args["n_embd"],
                  "n_layer": args["n_layer"], "n_head": args["n_head"], "layer_norm_epsilon": 1e-5,
                  "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
    except KeyError as missing:
        raise UserError(f"{path}: model_args lacks {missing}") from None
    readers.check_numbers(config, f"{path}: model_args")
    entries = {}
    for name, entry in pickle_entries(path).items():
        name = name.removeprefix("_orig_mod.").removeprefix("module.")         # torch.compile's, DDP's
        if name.endswith(".attn.bias") or name == "lm_head.weight":            # the causal mask; the embedding again
            continue
        if re.search(r"\.c_(attn|proj|fc)\.weight$", name) and len(entry.shape) == 2:
            entry = Entry(entry.shape[::-1], lambda read=entry.read: read().T, path, entry.kind)
        entries[name] = entry
    for name, entry in list(entries.items()):                # bias=False leaves them out; a GPT-2 has them, as zeros
        bias = name.removesuffix("weight") + "bias"
        if re.search(r"\.(c_attn|c_proj|c_fc|ln_1|ln_2|ln_f)\.weight$", name) and bias not in entries:
            size = entry.shape[-1:]
            entries[bias] = Entry(size, lambda size=size: torch.zeros(size), path)
    return Source(path, config, entries)


# ---------------------------------------------------------------- llama2.c

def open_llama2c(path: Path) -> Source:
    """Version 0 of llama2.c: dim, hidden, layers, heads, kv heads, vocabulary (negative: head of its own), length; then
    fp32 tensors kind by kind, all layers of a kind together."""
    size = path.stat().st_size
    if size < 28:
        raise UserError(f"{path}: {size} bytes are too few for a llama2.c model")
    with open(path, "rb") as file:
        C, I, L, H, K, V, T = struct.unpack("<7i", file.read(28))  # noqa: E741
    other = {20240326: "an llm.c model", 0x616b3432: "a llama2.c model of version 1 or 2"}.get(C)
    if other:
        raise UserError(f"{path}: {other}; only llama2.c's version 0 is read. Export it anew (export.py --version 0), "
                        "or take the Hugging Face files it came from")
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

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": C, "intermediate_size": I,
              "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K, "vocab_size": V,
              "max_position_embeddings": T,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied}
    entries = {name: Entry(shape, interleaved(path, name, shape, reader(start, shape), config), path)
               for name, (start, shape) in spans.items() if name != "rope.weight"}
    return Source(path, config, entries)
