"""python -m checkpoints names                                            the names that --init takes
python -m checkpoints show DIR_OR_NAME                                 family, sizes, memory, tensors; nothing is loaded
python -m checkpoints convert BASE [--lora DIR ...] [--delta DIR --new-rows zero|mean] [--dtype bf16] OUT
                                                                       any format in, a Hugging Face directory out
"""
import argparse
import dataclasses
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch

import checkpoints
import common
from checkpoints import adapters, families, formats, gguf, hub
from checkpoints.convert import convert
from common import UserError
from model import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parameters(config: object) -> int:
    """Counted on models of one and of two layers: every further layer is like the second."""
    with checkpoints.hollow():
        one, two = (sum(p.numel() for p in checkpoints.build(dataclasses.replace(config, num_layers=n)).parameters())
                    for n in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


def print_names() -> None:
    """By family: name, parameters, repository on the hub, and where the weights are if they are on this machine."""
    for title, group in hub.GROUPS.items():
        print(f"\n# {title}")
        for name, (repo, _) in group.items():
            here = next((where for where, paths in checkpoints.places(name) if paths), "")
            print(f"{name:26} {common.human(parameters(hub.config(name))):>6}  {repo:46} {here}".rstrip())


# ---------------------------------------------------------------- show

def show(name: str) -> None:
    """Headers, configs and the tokenizer are read; of the weights only names, shapes and types."""
    path = checkpoints.resolve(name)
    line = lambda title, text: print(f"  {title:12}{text}")  # noqa: E731
    print(path)
    if path.is_dir() and (path / "adapter_config.json").exists():
        show_adapter(path, line)
        if not (path / "config.json").exists():
            return
    try:
        source, tokenizer_at = checkpoints.open_any(path)
    except UserError:
        if path.is_dir() or path.suffix == ".gguf":          # some are a vocabulary and nothing else
            show_tokenizer(path, line)
        raise
    weights = {n: e for n, e in source.entries.items() if not adapters.NO_WEIGHTS.fullmatch(n)}
    total = sum(math.prod(e.shape) for e in weights.values())
    line("format", format_of(source))
    line("family", f"{source.config.get('model_type')} {' '.join(map(str, source.config.get('architectures') or []))}")
    line("parameters", f"{total:,} ({common.human(total)})")
    line("memory", ", ".join(f"{kind} {bytes_of(size * total)}" for kind, size in (("fp32", 4), ("bf16", 2))))
    if packed := source.config.get("quantization_config"):
        line("packed", f"{packed}: only GGUF's quantisations can be loaded")
    show_config(source, line)
    show_tokenizer(tokenizer_at, line, path)
    show_tensors(source.entries, line)


def bytes_of(n: float) -> str:
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if n >= s), ("KB", 1e3))
    return f"{n / size:.3g} {unit}"


def format_of(source: formats.Source) -> str:
    """Which of the formats of formats.py this is."""
    file = next((e.file for e in source.entries.values()), source.path)
    if file.suffix == ".gguf":
        meta, _ = gguf.read_header(file)
        arch, called = meta.get("general.architecture"), str(meta.get("general.name", ""))[:60]
        return f"GGUF, architecture {arch}" + (f", called {called!r}" if called else "")
    kind = "safetensors" if file.suffix == ".safetensors" else "pickle (its code is never run)"
    if file.name.startswith("consolidated"):
        return f"Meta's names, {kind}"
    if (file.parent / "config.json").exists():
        return f"Hugging Face, {kind}"
    others = {"gpt2": f"nanoGPT, {kind}", "rwkv": f"BlinkDL's RWKV, {kind}"}
    return others.get(source.config.get("model_type"), "llama2.c")


def show_config(source: formats.Source, line) -> None:
    try:
        config = families.to_config(dict(source.config), source.path)
    except UserError as error:
        return line("config", f"cannot be loaded: {error}")
    default, always = ModelConfig(), ("vocab_size", "hidden_size", "num_layers", "num_heads")
    values = {k: v for k, v in vars(config).items() if k in always or v != getattr(default, k, None)}
    line("config", ", ".join(f"{k}={v}" for k, v in values.items() if not k.startswith("rope")))
    if getattr(config, "positions", "") == "rope":
        line("rope", f"theta {config.rope_theta:g}, " + (f"scaling {config.rope_scaling}" if config.rope_scaling else
                                                         "no scaling") + f", trained on {config.max_positions} tokens")


def show_tokenizer(where: Path, line, name: Path | None = None) -> None:
    from data import chat  # not at the top: it reads GGUF through us
    from data.tokenizer import load_tokenizer
    try:
        tokenizer = load_tokenizer(where)
    except UserError as error:
        return line("tokenizer", f"cannot be read: {error}")
    template, guessed = tokenizer and tokenizer.chat_template, chat.guess((name or where).name, tokenizer)
    line("tokenizer", f"{type(tokenizer.core).__name__}, {tokenizer.vocab_size} tokens, ends with {tokenizer.eos_ids}"
         if tokenizer else "none")
    if tokenizer or guessed:
        line("chat", f"a Jinja template of {len(template)} characters" if template and "{" in template else template or
             (f"{guessed}, to go by its name or its tokens" if guessed else "no format: choose one with --template"))


def show_tensors(entries: dict[str, formats.Entry], line) -> None:
    """One line for each kind of tensor: layers that look alike are counted, not listed."""
    files, kinds = (Counter(getattr(e, key) for e in entries.values()) for key in ("file", "kind"))
    groups: dict[tuple, list[tuple[str, int]]] = {}
    for name, entry in entries.items():
        before, number, behind = re.fullmatch(r"(.*?)(?:(?<=\.)(\d+)(?=\.))?((?(2)\..*|))", name).groups()
        groups.setdefault((before, behind, entry.shape, entry.kind), []).append((name, int(number or 0)))
    first = min(files, key=lambda f: f.name)
    line("file", f"{len(entries)} tensors in {len(files)} file(s) ({first.name}" + (" ...)" if len(files) > 1 else ")")
         + f", {bytes_of(sum(f.stat().st_size for f in files))}: "
         + ", ".join(f"{c} {k}" for k, c in kinds.most_common()))
    for (before, behind, shape, kind), found in groups.items():
        low, high, n = min(i for _, i in found), max(i for _, i in found), len(found)
        among = f"{low}..{high}" if high - low == n - 1 else "*"
        print(f"    {f'{n} x' if n > 1 else '':>6} {found[0][0] if n == 1 else before + among + behind:60} "
              f"{str(tuple(shape)):20} {kind}")


def show_adapter(folder: Path, line) -> None:
    config = formats.read_json(folder / "adapter_config.json")
    file = next((f for n in ("safetensors", "bin") if (f := folder / f"adapter_model.{n}").exists()), None)
    line("adapter", f"{config.get('peft_type')}, r={config.get('r')}, lora_alpha={config.get('lora_alpha')}"
         + "".join(f", {key}" for key in ("use_rslora", "use_dora", "fan_in_fan_out") if config.get(key)))
    for key in ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            line(key, f" {config[key]}")
    line("base", config.get("base_model_name_or_path"))
    if file is None:
        return line("file", "no adapter_model.safetensors or .bin: saved without its weights")
    entries = formats.merge_files([file])
    total = sum(math.prod(e.shape) for e in entries.values())
    line("parameters", f"{total:,} ({common.human(total)})")
    show_tensors(entries, line)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m checkpoints", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    sub.add_parser("names", help="the names that --init takes")
    sub.add_parser("show", help="what a checkpoint is").add_argument("path")
    c = sub.add_parser("convert", help="any format to a Hugging Face directory")
    c.add_argument("base")
    c.add_argument("out")
    c.add_argument("--lora", action="append", default=[], help="PEFT directory to merge; several are merged in order")
    c.add_argument("--delta", help="checkpoint whose weights are differences to BASE; it is added before any adapter")
    c.add_argument("--new-rows", "--new_rows", dest="new_rows", choices=("zero", "mean"),
                   help="what the base's missing rows count as")
    c.add_argument("--dtype", choices=DTYPES, help="default: what the file has; GGUF's blocks become bf16")
    args = parser.parse_args(argv)
    if args.what == "names":
        print_names()
    elif args.what == "show":
        show(args.path)
    else:
        print(convert(args.base, Path(args.out), args.lora, args.delta, args.new_rows, DTYPES.get(args.dtype)))


if __name__ == "__main__":
    common.main(lambda: main(sys.argv[1:]))
