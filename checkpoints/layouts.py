"""How one tensor of a public file becomes ours, and back: transposed, its rows in another order, cut into parts.

    file                                  ours
    h.3.attn.c_attn.weight   (C, 3C)      layers.3.self_attn.q_proj.weight, .k_proj.weight, .v_proj.weight   (C, C) each

Whatever way q, k and v are woven together and whichever numbers RoPE pairs up, it comes down to one order of the rows.
So a Recipe is a permutation with a cut, and what it does can be undone exactly: this is how `save` writes a trained
GPT-2 or Falcon in the layout that other tools read.
"""
import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from common import UserError
from model import ModelConfig

Entries = dict                         # name -> formats.Entry: the tensors of a file, none of them read yet


def derived(shape: tuple[int, ...], read: Callable[[], Tensor], like):
    """An entry that is computed from others when it is read."""
    return dataclasses.replace(like, shape=tuple(shape), read=read)


def qkv_rows(kind: str, config: ModelConfig) -> Tensor:
    """Which rows of a fused matrix are those of all q, then all k, then all v.

        concat     q q q | k k k | v v v      GPT-2, Falcon 7B, ChatGLM2, Phi-3, MPT, Baichuan's W_pack
        per head   q k v | q k v | q k v      GPT-NeoX, BLOOM, ChatGLM-6B
        per group  q q k v | q q k v          Falcon 40B, InternLM2: the queries of a key head, then key and value
        codegen    q v k | q v k | ...        four parts, each with a quarter of the heads (they were on four TPUs)
    """
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    rows = torch.arange((H + 2 * K) * D)
    if kind == "concat":
        return rows
    if kind == "per head":
        q, k, v = rows.view(H, 3, D).unbind(1)
    elif kind == "per group":
        rows = rows.view(K, H // K + 2, D)
        q, k, v = rows[:, :-2], rows[:, -2], rows[:, -1]
    elif kind == "codegen":
        q, v, k = rows.view(4, 3, -1).unbind(1)
    else:
        raise ValueError(f"unknown layout of q, k, v: {kind!r}")
    return torch.cat([part.flatten() for part in (q, k, v)])


def rope_rows(kind: str, heads: int, config: ModelConfig) -> Tensor:
    """Which rows of q or k come first, in every head, so that RoPE may pair row i with row i + R/2 (R rows turn).

        halves    as we do it: (0, 4) (1, 5) (2, 6) (3, 7) of R = 8
        pairs     (0, 1) (2, 3) ..     the paper's, GPT-J, GLM, Meta's files
        2d        (0, 2) (1, 3) | (4, 6) (5, 7)     ChatGLM-6B: each half of the head for itself, with its own position
        swapped   (4, 0) (5, 1) ..     nanochat turns the other way round: the same with the partners exchanged
    """
    D, R = config.head_dim, config.rope_dim or config.head_dim
    row = torch.arange(D)
    if kind == "pairs":
        row = torch.cat((row[0:R:2], row[1:R:2], row[R:]))
    elif kind == "2d":
        row = row.view(2, 2, -1).transpose(0, 1).flatten()
    elif kind == "swapped":
        row = torch.cat((row[R // 2:R], row[:R // 2], row[R:]))
    elif kind != "halves":
        raise ValueError(f"unknown RoPE layout {kind!r}")
    return (torch.arange(heads)[:, None] * D + row).flatten()


@dataclass
class Recipe:
    """From one tensor of the file to the parameters of ours that are in it."""
    file: str                          # its name in the file, as it stands there
    ours: list[str]
    shapes: list[tuple[int, ...]]      # of ours
    rows: Tensor | None = None         # order of the rows; None: as they are
    transpose: bool = False            # Conv1D stores (in, out)
    plus_one: bool = False             # Gemma stores w of 1 + w; the sum stays in fp32, bf16 would round it
    factors: list[float] | None = None # of each of ours: constants of a config that are in our weights instead

    @property
    def matrix(self) -> tuple[int, ...]:
        """(out, in) of ours, one under the other."""
        return (sum(s[0] for s in self.shapes), *self.shapes[0][1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """What the file should hold."""
        return self.matrix[::-1] if self.transpose else self.matrix

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of the file -> ours."""
        tensor = tensor.T if self.transpose else tensor
        tensor = tensor if self.rows is None else tensor[self.rows]
        tensor = tensor.float() + 1 if self.plus_one else tensor
        parts = tensor.split([s[0] for s in self.shapes])
        return [p.float() * f if f != 1 else p for p, f in zip(parts, self.factors or [1] * len(parts))]

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Ours -> the tensor of the file."""
        tensors = [t / f if f != 1 else t for t, f in zip(tensors, self.factors or [1] * len(tensors))]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        tensor = tensor - 1 if self.plus_one else tensor
        tensor = tensor if self.rows is None else tensor[self.rows.argsort()]
        return tensor.T if self.transpose else tensor


# ---------------------------------------------------------------- names

SUFFIX = re.compile(r"(.*)\.(weight|bias)")


def strip(name: str, prefixes: Iterable[str]) -> str:
    """Without the first of the prefixes that it has: transformer.h.0.ln_1.weight -> h.0.ln_1.weight."""
    return next((name[len(p):] for p in prefixes if name.startswith(p)), name)


def split_name(name: str) -> tuple[str, str, str]:
    """h.3.ln_1.weight -> (h.*.ln_1, 3, .weight)"""
    m = SUFFIX.fullmatch(name)
    stem, suffix = (m[1], "." + m[2]) if m else (name, "")
    number = re.search(r"(?<=\.)\d+(?=\.|$)", stem)
    return (stem, "", suffix) if number is None else (stem[:number.start()] + "*" + stem[number.end():], number[0],
                                                      suffix)


def write(family, config: ModelConfig, raw: dict, shapes: dict[str, tuple[int, ...]],
          file_names: Iterable[str]) -> list[Recipe]:
    """One recipe for each of the file's tensors that the family's table of names knows and the model has a place for.
    raw: config.json; shapes: of our parameters."""
    recipes = []
    for file in file_names:
        stem, number, suffix = split_name(strip(file, family.prefixes))
        ours = [o.replace("*", number, 1) + suffix for o in family.names.get(stem, "").split()]
        if ours and all(name in shapes for name in ours):
            recipes.append(recipe(family, config, raw, file, ours, [shapes[name] for name in ours]))
    return recipes


def recipe(family, config: ModelConfig, raw: dict, file: str, ours: list[str], shapes: list[tuple[int, ...]]) -> Recipe:
    rows = None
    if any(".q_proj." in o or ".k_proj." in o for o in ours) and (len(ours) == 3 or family.rope != "halves"):
        fused = qkv_rows(family.cut(config), config) if len(ours) == 3 else torch.arange(sum(s[0] for s in shapes))
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        parts = zip([o.split(".")[-2] for o in ours], fused.split([s[0] for s in shapes]))
        rows = torch.cat([part[rope_rows(family.rope, heads[kind], config)] if kind in heads else part
                          for kind, part in parts])
        rows = None if torch.equal(rows, torch.arange(len(rows))) else rows
    matrix = len(shapes[0]) == 2
    return Recipe(file, ours, shapes, rows, matrix and family.is_transposed(file),
                  family.plus_one and not matrix and "norm" in ours[0],
                  [family.factor(name, config, raw) for name in ours] if family.factor else None)


def file_name(ours: str, family, prefix: str | None = None, there: Iterable[str] = ()) -> str:
    """What the family's files call one of our parameters, or a module of ours; prefix None: what transformers puts in
    front. Where the family has several words for it, those of a file with the tensors `there`."""
    stem, number, suffix = split_name(ours)
    words, stems = [n for n, o in family.names.items() if stem in o.split()], {split_name(n)[0] for n in there}
    theirs = next((n for n in words if n in stems), [*words, stem][0]).replace("*", number or "0") + suffix
    prefix = next(iter(family.prefixes), "") if prefix is None else prefix
    return theirs if stem == "lm_head" else prefix + theirs


def their_name(ours: str, family, as_there: dict[str, str]) -> str:
    """The same under the prefix of this file, for an error message."""
    prefix = next((full.removesuffix(n) for n, full in as_there.items() if full != n), "")
    return file_name(ours, family, prefix, as_there)


def check(recipes: list[Recipe], files: Entries, as_there: dict[str, str], where) -> None:
    """Shapes, before the first byte is read, and whether two tensors want the same place."""
    seen: dict[str, str] = {}
    for r in recipes:
        there, shown = tuple(files[r.file].shape), as_there.get(r.file, r.file)
        if there != r.shape:
            what = f" ({' + '.join(o.split('.')[-2] for o in r.ours)})" if len(r.ours) > 1 else ""
            raise UserError(f"{where}: tensor {shown} is {there}, the config asks for {r.shape}{what}, in "
                            f"{files[r.file].file.name}: the config is of another model, or the file is damaged")
        for name in r.ours:
            if name in seen:
                raise UserError(f"{where}: tensors {seen[name]} and {shown} are both {name}: the file holds two models")
            seen[name] = shown
