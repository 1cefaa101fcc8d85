"""Adapters that are being trained: from our linears to the tensors of the base's own file, and back.

PEFT, and `load(base, lora=[...])`, know a layer by its name in that file, and where the file holds q, k and v in one
matrix, the adapter is one of that matrix. Ours sit on q_proj, k_proj and v_proj. Three adapters are one of their ranks'
sum, B block by block:

    [dq]   [Bq      ]  [Aq]
    [dk] = [   Bk   ]  [Ak]         A (3r, C), B (3C, 3r), then B's rows in the file's order (layouts.py)
    [dv]   [      Bv]  [Av]

Backwards, q, k and v share A, each with its rows of B; ranks of which a part has only zeros in B are left out, so that
what was saved here comes back as it was.
"""
import re

import torch
from torch import Tensor, nn

from checkpoints import layouts, others
from checkpoints.layouts import Recipe

Triple = tuple[Tensor, Tensor, float]      # A (r, in), B (out, r), and what their product counts for


def recipes(model: nn.Module) -> dict[str, Recipe]:
    """PEFT's path -> recipe, of every linear of the model. A model that was built here and never loaded is called as
    export.py would write it."""
    linears = {f"{path}.weight": tuple(m.weight.shape) for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    origin = getattr(model, "origin", None)
    if origin is None and type(getattr(model, "config", None)) in others.CLASSES:
        origin = others.origin(model)
    if origin is None:
        found = [Recipe(n if n.startswith("lm_head") else "model." + n, [n], [s]) for n, s in linears.items()]
        return {path_of(r.file): r for r in found}
    family, found = origin.family, {}
    for r in origin.recipes:
        if all(name in linears for name in r.ours):
            bare = r.file == layouts.strip(r.file, family.prefixes) and "lm_head.weight" not in r.ours
            found[path_of((next(iter(family.prefixes), "") if bare else "") + r.file)] = r
    if "lm_head.weight" in linears and not any("lm_head.weight" in r.ours for r in found.values()):      # tied
        head = layouts.file_name("lm_head.weight", family)
        found[path_of(head)] = Recipe(head, ["lm_head.weight"], [linears["lm_head.weight"]])
    return found


def path_of(name: str) -> str:
    return name.removesuffix(".weight")


def to_file(model: nn.Module, ours: dict[str, Triple]) -> dict[str, Triple]:
    """Our paths -> PEFT's paths."""
    theirs = {}
    for path, r in recipes(model).items():
        pairs = [ours.get(path_of(name)) for name in r.ours]
        if any(pairs):
            A, scale = torch.cat([p[0] for p in pairs if p]), max(p[2] for p in pairs if p)
            blocks, at = [], 0
            for pair, shape in zip(pairs, r.shapes):
                blocks.append(torch.zeros(shape[0], len(A), dtype=A.dtype, device=A.device))
                if pair:
                    blocks[-1][:, at:at + len(pair[0])] = pair[1] * (pair[2] / scale)
                    at += len(pair[0])
            B = r.join(blocks)
            theirs[path] = (A, B.T if r.transpose else B, scale)
    return theirs


def from_file(model: nn.Module, theirs: dict[str, Triple]) -> dict[str, Triple]:
    """PEFT's paths, each of them one of `recipes`, -> our paths."""
    ours = {}
    known = recipes(model)
    for path, (A, B, scale) in theirs.items():
        r = known[path]
        for name, part in zip(r.ours, r.split(B.T if r.transpose else B)):
            used = part.any(0) if len(r.ours) > 1 else torch.ones(len(A), dtype=torch.bool)
            if used.any():
                ours[path_of(name)] = (A[used], part[:, used], scale)
    return ours


def targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """target_modules: the last part of the paths, where it says which layers are meant, else all of them."""
    last = {path.rpartition(".")[2] for path in adapted}
    clear = not any(path.rpartition(".")[2] in last for path in set(recipes(model)) - adapted)
    return sorted(last if clear else adapted)


def unchanged(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """PEFT copies embedding and head into the file when it adapts the head: is this such a copy of ours?"""
    name = re.sub(r"\.base_layer(?=\.)", "", key.removeprefix("base_model.model."))
    origin = getattr(model, "origin", None)
    same = [r for r in (origin.recipes if origin else ()) if name == r.file or name.endswith("." + r.file)]
    own = model.state_dict().get(same[0].ours[0] if same else name.removeprefix("model."))
    return own is not None and own.shape == tensor.shape and torch.equal(own, tensor.to(own))
