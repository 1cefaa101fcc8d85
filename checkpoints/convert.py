"""Any format in, a Hugging Face directory out, in the file's own names: nothing passes through our model.

    config.json  generation_config.json  model.safetensors (or shards, index)  tokenizer files  remote code as it was

A tensor is read, merged (checkpoints/adapters.py), rounded and written before the next one is read: the header of a
safetensors file stands in front of the numbers, and all of it is known beforehand. So this works for every family, also
for those that only remote code describes, and needs the memory of one tensor. config.json comes last: a directory that
has one is complete.
"""
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import common
from checkpoints import adapters, export, formats, gguf
from common import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
BLOCKS = {unpack.__name__.upper() for weights, _, unpack in gguf.KINDS.values() if weights > 1}
VOCABULARY = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "ice_text.model", "*.tiktoken")
TOKENIZER = (*VOCABULARY, "*.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "vocab.txt", "merges.txt", "chat_template.*", "tokenization_*.py")
OTHERS = ("generation_config.json", "configuration_*.py", "modeling_*.py", "quantization.py")


def convert(base: str | Path, out: Path, lora: list[str] = (), delta: str | None = None, new_rows: str | None = None,
            dtype: torch.dtype | None = None) -> str:
    """Writes `out`; says in a line what it wrote. dtype None: every tensor keeps its own, block formats become bf16."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another directory")
    source, tokenizer_at = checkpoints.open_any(checkpoints.resolve(base))
    formats.check_plain(source)
    delta = None if delta is None else checkpoints.resolve(delta)
    adapters.apply(source, [Path(p) for p in lora], delta, new_rows)
    settle_head(source)
    plan = {name: (source.shape(name), target(name, entry, dtype)) for name, entry in source.entries.items()}
    config = new_config(source, plan)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(source, plan, out)
    note = copy_files(source, tokenizer_at, [p for p in (delta, *map(Path, lora)) if p], out)
    common.atomic_write(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False))
    numbers = sum(math.prod(shape) for shape, _ in plan.values())
    kinds = Counter(kind for _, kind in plan.values())
    return (f"{out}: {config.get('model_type')}, {common.human(numbers)} parameters in {len(plan)} tensors ("
            f"{', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}){note}")


def target(name: str, entry: formats.Entry, dtype: torch.dtype | None) -> str:
    if entry.kind in BLOCKS:                                  # no other format can hold them
        return formats.KINDS[dtype or torch.bfloat16]
    if entry.kind not in formats.DTYPES:
        raise UserError(f"{entry.file}: tensor {name} is stored as {entry.kind}, which is not supported")
    return formats.KINDS[dtype] if dtype is not None and entry.kind in FLOATS else entry.kind


def settle_head(source: formats.Source) -> None:
    """"Tied" in the config loses against another head in the file, as everywhere: others would not even look at it."""
    embedding, head = adapters.embedding_of(source), next((h for h in adapters.HEADS if h in source.entries), None)
    if embedding and head and source.config.get("tie_word_embeddings") is not False:
        same = source.shape(embedding) == source.shape(head) and torch.equal(source.read(embedding), source.read(head))
        if not same:
            for config in adapters.parts(source.config):
                config["tie_word_embeddings"] = False


def new_config(source: formats.Source, plan: dict[str, tuple]) -> dict:
    config = source.config
    if (config.get("rope_scaling") or {}).get("rope_type") == "factors":
        raise UserError(f"{source.path}: its RoPE is a table of divisors, which no public family's config.json can say")
    numbers: Counter = Counter()
    for shape, kind in plan.values():
        numbers[kind] += math.prod(shape) if kind in FLOATS else 0
    dtype = str(formats.DTYPES[max(numbers, key=numbers.get)]).removeprefix("torch.") if numbers else "float32"
    for part in adapters.parts(config):
        for key in {"dtype", "torch_dtype"} & set(part) or {"torch_dtype"}:
            part[key] = dtype
    return config


# ---------------------------------------------------------------- weights

def write_weights(source: formats.Source, plan: dict[str, tuple], out: Path) -> None:
    def size(name: str) -> int:
        return math.prod(plan[name][0]) * formats.DTYPES[plan[name][1]].itemsize

    shards: list[list[str]] = [[]]
    room = export.SHARD
    for name in plan:
        if size(name) > room and shards[-1]:
            shards.append([])
            room = export.SHARD
        shards[-1].append(name)
        room -= size(name)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards):
        write_file(source, {name: plan[name] for name in names}, out / file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(map(size, plan))},
                 "weight_map": {name: file for file, names in zip(files, shards) for name in names}}
        common.atomic_write(out / "model.safetensors.index.json", json.dumps(index, indent=2))


def write_file(source: formats.Source, plan: dict[str, tuple], path: Path) -> None:
    """Length of the header, 8 bytes | the header, JSON | the numbers. Wide types first: so every tensor is aligned."""
    names = sorted(plan, key=lambda name: -formats.DTYPES[plan[name][1]].itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        shape, kind = plan[name]
        end = at + math.prod(shape) * formats.DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with common.atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = rounded(source, name, *plan[name])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def rounded(source: formats.Source, name: str, shape: tuple, kind: str) -> Tensor:
    tensor = source.read(name)
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{source.path}: tensor {name} was read as {tuple(tensor.shape)}, its header says {shape}")
    out = tensor.to(formats.DTYPES[kind])
    if (source.patches or kind == "F16") and out.is_floating_point() and not bool(torch.isfinite(out).all()):
        if bool(torch.isfinite(source.entries[name].read()).all()):
            why = "too large for fp16: --dtype bf16" if kind == "F16" else "the adapter or delta is of another base"
            raise UserError(f"{source.path}: tensor {name} is not finite as {kind}: {why}")
    return out


# ---------------------------------------------------------------- what else lies in the directory

def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({f for pattern in patterns for f in folder.glob(pattern) if f.is_file()})


def copy_files(source: formats.Source, tokenizer_at: Path, patched: list[Path], out: Path) -> str:
    """Tokenizer files come from the last adapter or delta that has some: a larger vocabulary is in there. Files of
    other formats (GGUF, tiktoken, llama2.c) are written anew, as tokenizer.json."""
    own = source.path if source.path.is_dir() else source.path.parent
    theirs = [p for p in patched if p.is_dir() and matching(p, VOCABULARY)]
    plain = (own / "config.json").exists()
    for file in matching(own, OTHERS) if plain else []:
        shutil.copyfile(file, out / file.name)
    folder = theirs[-1] if theirs else own if plain else None
    if folder is not None:
        for file in matching(folder, TOKENIZER):
            shutil.copyfile(file, out / file.name)
        return "" if matching(folder, VOCABULARY) else "; the base has no tokenizer, so this has none"
    from data.tokenizer import load_tokenizer  # not at the top: it reads GGUF through us
    try:
        tokenizer = load_tokenizer(tokenizer_at)
    except UserError as error:
        return f"; its tokenizer cannot be read, so this has none: {error}"
    if tokenizer is None:
        return "; the base has no tokenizer, so this has none"
    export.write_tokenizer(tokenizer, out)
    return ""
