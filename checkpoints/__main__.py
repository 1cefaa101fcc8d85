"""python -m checkpoints names                                            the names that --init takes
python -m checkpoints show DIR_OR_NAME                                 family, sizes, memory, tensors; nothing is loaded
python -m checkpoints convert BASE [--lora DIR ...] [--delta DIR --new-rows zero|mean] [--dtype bf16] OUT
                                                                       any format in, a Hugging Face directory out
"""
import argparse
import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path

import torch

import checkpoints
import common
from checkpoints import families, formats, hub
from model import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parameters(config: object) -> int:
    """Counted on models of one and of two layers: every further layer is like the second."""
    with torch.device("meta"):
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


def show(name: str) -> None:
    path = checkpoints.resolve(name)
    source, _ = checkpoints.open_any(path)
    config = families.to_config(source.config, source.path)
    n = parameters(config)
    print(f"{path}\n  family      {source.config['model_type']}\n  parameters  {n:,} ({common.human(n)})")
    print("  memory      " + ", ".join(f"{kind} {size * n / 1e9:.2f} GB" for kind, size in (("fp32", 4), ("bf16", 2))))
    default = ModelConfig()
    always = ("vocab_size", "hidden_size", "num_layers", "num_heads")
    print("  config      " + ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()
                                       if v != getattr(default, k) or k in always))
    kinds = Counter(kind_of(source, entry) for entry in source.entries.values())
    files = sorted({entry.file.name for entry in source.entries.values()})
    numbers = sum(math.prod(source.shape(k)) for k in source.entries)
    print(f"  file        {len(source.entries)} tensors in {len(files)} file(s) "
          f"({files[0]}{' ...' if len(files) > 1 else ''}), {numbers:,} numbers: "
          + ", ".join(f"{c} {k}" for k, c in kinds.most_common()))


def kind_of(source: formats.Source, entry: formats.Entry) -> str:
    """Name and storage of one tensor, without reading it where the header says it."""
    if entry.file.suffix == ".gguf":
        return entry.file.suffix[1:]
    if entry.file.suffix == ".safetensors":
        from safetensors import safe_open
        with safe_open(entry.file, framework="pt") as f:
            name = next(k for k, e in source.entries.items() if e is entry)
            return f.get_slice(name).get_dtype()
    return str(entry.read().dtype).removeprefix("torch.")


def convert(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise common.UserError(f"{out} is not empty: choose another directory")
    model, tokenizer = checkpoints.load(args.base, dtype=DTYPES[args.dtype], lora=args.lora, delta=args.delta,
                                        new_rows=args.new_rows)
    checkpoints.save(model, tokenizer, out)
    print(f"{out}: {common.human(parameters(model.config))} parameters in {args.dtype}"
          + ("" if tokenizer else "; the base has no tokenizer, so this has none"))


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
    c.add_argument("--delta", help="checkpoint whose weights are differences to BASE")
    c.add_argument("--new-rows", "--new_rows", dest="new_rows", choices=("zero", "mean"),
                   help="what the base's missing rows count as")
    c.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args(argv)
    if args.what == "names":
        print_names()
    elif args.what == "show":
        show(args.path)
    else:
        convert(args)


if __name__ == "__main__":
    common.main(lambda: main(sys.argv[1:]))
