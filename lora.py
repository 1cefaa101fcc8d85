"""Low-rank adapters by hand (Hu et al. 2021, arXiv 2106.09685): a frozen matrix W learns a correction of rank r.

    y = x W^T + (alpha / r) (x A^T) B^T       A (r, in) random,  B (out, r) zero: at first y is x W^T, bit for bit

              x --------- W (frozen) ---------- + -- y
               \\--- A (r x in) --- B (out x r) --/

Adapters have names, and several of them live on one base. This is what makes PPO affordable: policy, value and reward
are three adapters over the same frozen weights, and the reference model is the base with no adapter at all.

    lora.apply(model, r=16, alpha=32, name="policy")
    with lora.use(model, "policy"):  logits = model(ids)       # policy
    with lora.use(model, None):      logits = model(ids)       # reference, exactly the weights that were loaded
    with lora.use(model, "policy", None):  model(ids)          # half of the rows each, one product with the base

The layer itself is kernels/lora.py: forward and backward by hand, the base product once whatever the rows wear.

The base may be bf16 while A and B stay fp32: they are what the optimiser moves. It may also be in four bits (QLoRA:
load(..., quant="nf4"), kernels/nf4.py): adapters train on it as on any other, and are merged into the weights that it
was made from. Files are PEFT's, in and out.
"""
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sampling
from checkpoints import live
from common import UserError
from kernels.lora import Adapter, lora_linear
from kernels.nf4 import QuantisedLinear, nf4_linear

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Switch:
    """Which adapter is on: one object, shared by all linears of a model. Several names: each for its part of the
    rows."""
    active: tuple[str | None, ...] = (None,)


class LoRALinear(nn.Linear):
    """nn.Linear with adapters beside it. Its own keys stay `weight` and `bias`, so checkpoints do not notice."""
    def __init__(self, linear: nn.Linear, switch: Switch):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias          # the very same tensors, nothing is copied
        self.quantised = getattr(linear, "quantised", None)          # the matrix in four bits; `weight` is empty then
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.switch = switch
        self.merged: str | None = None                               # the adapter that `weight` contains just now
        # And the weight without it, to restore it exactly; in a tuple, or it would be a parameter of the model.
        self.original: tuple[nn.Parameter] | None = None

    def add(self, name: str, r: int, scale: float) -> None:
        device = self.weight.device if self.quantised is None else self.quantised.packed.device
        A = torch.empty(r, self.in_features, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))                  # uniform in +-1/sqrt(in), as for a fresh nn.Linear
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=torch.float32))
        self.scale[name] = scale

    def delta(self, name: str) -> Tensor:
        return self.scale[name] * (self.lora_B[name].float() @ self.lora_A[name].float())      # (out, in)

    def active(self) -> tuple[str | None, ...]:
        """The adapters that are on; never another than the one that `weight` contains."""
        if self.merged is not None and set(self.switch.active) != {self.merged}:
            raise RuntimeError(f"adapter {self.merged!r} is merged, {self.switch.active} was asked for: unmerge first")
        return self.switch.active

    def forward(self, x: Tensor) -> Tensor:
        names, n = self.active(), len(x) // len(self.switch.active)                   # n rows of the batch for each
        if n * len(names) != len(x):
            raise UserError(f"{len(x)} rows are no equal shares for {len(names)} adapters: {names}")
        adapters = [Adapter(self.lora_A[name], self.lora_B[name], self.scale[name], slice(i * n, (i + 1) * n))
                    for i, name in enumerate(names) if name in self.scale and name != self.merged]
        matrix, plain = (self.weight, F.linear) if self.quantised is None else (self.quantised, nf4_linear)
        return lora_linear(x, matrix, self.bias, adapters) if adapters else plain(x, matrix, self.bias)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """`forward` as sampling.packed wants it: x W^T and x A^T are one product with [W; A]."""
        name, = self.active()
        if name not in self.scale or self.merged == name:
            return sampling.pack(self.weight, self.bias)
        A, B = self.lora_A[name].to(self.weight.dtype), self.lora_B[name].to(self.weight.dtype).t().contiguous()
        bias = None if self.bias is None else F.pad(self.bias, (0, len(A)))
        both, scale = sampling.pack(torch.cat((self.weight, A)), bias), self.scale[name]
        sizes = len(self.weight), len(A)

        def forward(x: Tensor) -> Tensor:
            y, h = both(x.flatten(0, -2)).split(sizes, dim=-1)
            return torch.addmm(y, h, B, alpha=scale).view(*x.shape[:-1], sizes[0])

        return forward


# ---------------------------------------------------------------- put on, choose, train

def layers(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted linears of the model with their paths; with a name, only those that have this adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and (name is None or name in module.scale):
            yield path, module


def apply(model: nn.Module, r: int = 16, alpha: float = 32.0, targets: tuple[str, ...] = ALL_LINEAR,
          name: str = "default") -> None:
    """Freezes the model and puts a new adapter on every linear whose last name, ours or its file's, is in targets. The
    default means all linears but the head, whatever this family calls them."""
    targets = all_linear(model) if tuple(targets) == ALL_LINEAR else targets
    known: dict[str, list[str]] = {}                     # last name -> paths; query_key_value means q, k and v of ours
    for path, m in model.named_modules():
        if isinstance(m, nn.Linear):
            known.setdefault(path.split(".")[-1], []).append(path)
    for path, recipe in live.recipes(model).items():
        known.setdefault(path.split(".")[-1], []).extend(live.path_of(ours) for ours in recipe.ours)
    if missing := set(targets) - set(known):
        raise UserError(f"LoRA target {sorted(missing)[0]!r} is no linear layer of this model; it has: "
                        f"{', '.join(sorted(known))}")
    wanted = {path for target in targets for path in known[target]}
    paths = [path for path, _ in model.named_modules() if path in wanted]
    attach(model, name, {path: (r, alpha / r) for path in paths})


def all_linear(model: nn.Module) -> tuple[str, ...]:
    """The last names of the model's linears, without the head: ALL_LINEAR in a LLaMA, key, value, ... in RWKV."""
    names = (path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear))
    return tuple(dict.fromkeys(name for name in names if name != "lm_head"))


def attach(model: nn.Module, name: str, sizes: dict[str, tuple[int, float]]) -> None:
    """Puts on adapter `name` with the rank and scale given for each path; everything else is frozen."""
    if any(True for _ in layers(model, name)):
        raise UserError(f"the model already has an adapter named {name!r}")
    switch = next((m.switch for _, m in layers(model)), None)
    if switch is None:
        switch = Switch()
        model.requires_grad_(False)
    for path, (r, scale) in sizes.items():
        parent, _, last = path.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, LoRALinear):
            module = LoRALinear(module, switch)
            setattr(model.get_submodule(parent), last, module)
        module.add(name, r, scale)

    def recompute_context():            # gradient checkpointing runs a layer again in backward, after `use` has ended:
        return contextlib.nullcontext(), use(model, *switch.active)            # it must see the adapter its forward saw

    model.recompute_context = recompute_context


def check(model: nn.Module, name: str) -> None:
    """A name that is not there is an error: merging or copying nothing would look like success."""
    if not any(True for _ in layers(model, name)):
        have = sorted({n for _, m in layers(model) for n in m.scale})
        raise KeyError(f"no adapter {name!r} on this model; it has {have}")


@contextlib.contextmanager
def use(model: nn.Module, *names: str | None):
    """Within the block the model computes with adapter `name`, or as the bare base with None. With several names each
    has its equal share of the batch's rows: use(m, "policy", None) of 8 rows is policy for 4, base for 4."""
    switch = next((m.switch for _, m in layers(model)), Switch())
    if not names:
        raise UserError("lora.use needs a name, or None for the bare base")
    for name in names:
        if name is not None:
            check(model, name)
    before, switch.active = switch.active, names
    try:
        yield model
    finally:
        switch.active = before


def parameters(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """(path, tensor) of one adapter, in the order of the layers."""
    return [(f"{path}.{half}.{name}", getattr(m, half)[name])
            for path, m in layers(model, name) for half in ("lora_A", "lora_B")]


def copy(model: nn.Module, source: str, target: str) -> None:
    """A new adapter that starts as a copy of another: PPO's value starts from the reward model."""
    check(model, source)
    attach(model, target, {path: (m.lora_A[source].shape[0], m.scale[source]) for path, m in layers(model, source)})
    with torch.no_grad():
        for _, m in layers(model, source):
            m.lora_A[target].copy_(m.lora_A[source])
            m.lora_B[target].copy_(m.lora_B[source])


def fingerprint(model: nn.Module) -> str:
    """Of the frozen base: equal before and after training, or the reference has moved."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if "lora_" not in name and not p.is_meta:
            digest.update(p.detach().float().cpu().numpy().tobytes())
    for m in model.modules():
        for t in (getattr(m, "quantised", None) or ())[:4]:
            digest.update(t.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- merge

@torch.no_grad()
def merge(model: nn.Module, name: str, keep_original: bool = True) -> None:
    """W <- W + scale B A, summed in fp32 and rounded once. The original is kept: unmerge restores it bit for bit,
    where subtracting the same product again would leave a rounding error behind."""
    check(model, name)
    for path, m in layers(model, name):
        if m.merged is not None:
            raise RuntimeError(f"{path} already contains adapter {m.merged!r}: unmerge first")
        if m.quantised is not None:
            raise UserError(f"{path} is in four bits, and W + BA is no matrix of four bits: sample with the adapter "
                            "live, and merge it into the weights the base was made from: python -m checkpoints "
                            "convert BASE --lora ADAPTER OUT")
        m.original = (m.weight,) if keep_original else None
        # A new Parameter: writing into the old one would change the embedding too where the head is tied to it.
        m.weight = nn.Parameter((m.weight.float() + m.delta(name)).to(m.weight.dtype), requires_grad=False)
        m.merged = name


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    for path, m in layers(model):
        if m.merged is not None:
            if m.original is None:
                raise RuntimeError(f"{path} was merged with keep_original=False: load the base again")
            m.weight, m.original, m.merged = m.original[0], None, None


@contextlib.contextmanager
def merged(model: nn.Module, name: str):
    """Within the block the adapter is part of the weights: sampling many tokens then costs what the bare base costs."""
    merge(model, name)
    try:
        with use(model, name):
            yield model
    finally:
        unmerge(model)


@contextlib.contextmanager
def packed(model: nn.Module, name: str | None):
    """`use` for sampling, the same bits faster where sampling.packed can: the adapter may not change meanwhile."""
    with use(model, name), sampling.packed(model):
        yield model


def strip(model: nn.Module) -> None:
    """Takes every adapter off again; what was merged stays in the weights."""
    for path, m in list(layers(model)):
        parent, _, last = path.rpartition(".")
        linear = nn.Linear(m.in_features, m.out_features, m.bias is not None, device="meta")
        linear.weight, linear.bias = m.weight, m.bias
        linear = linear if m.quantised is None else QuantisedLinear(m.quantised, m.bias)
        setattr(model.get_submodule(parent), last, linear)
    model.recompute_context = None


# ---------------------------------------------------------------- PEFT's files

def save(model: nn.Module, name: str, out_dir: str | Path, base: str = "", head: Tensor | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them. `head` (1, C) is a reward head.
    Refuses what users of other tools found in their 443-byte files: no tensors, or an adapter that learned nothing."""
    ours = {path: (m.lora_A[name].detach(), m.lora_B[name].detach(), m.scale[name]) for path, m in layers(model, name)}
    theirs = live.to_file(model, ours)                       # in the names and the layout of the base's own file
    tensors = {}
    for path, (A, B, _) in theirs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.cpu().contiguous()
    if not tensors:
        raise UserError(f"adapter {name!r} has no tensors: nothing to save in {out_dir}")
    bad = [key for key, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise UserError(f"adapter {name!r} is not finite in {bad[0]} ({len(bad)} tensors): not saved")
    if all(not bool(t.any()) for key, t in tensors.items() if "lora_B" in key):
        raise UserError(f"adapter {name!r} is all zero in B: it was never trained, saving it would save nothing. "
                        "Check that the optimiser got lora.parameters(model, name) and that the learning rate is not 0")
    ranks = {path: len(A) for path, (A, _, _) in theirs.items()}
    alphas = {path: scale * len(A) for path, (A, _, scale) in theirs.items()}
    r, alpha = max(ranks.values()), max(alphas.values())
    conv1d = any(live.recipes(model)[path].transpose for path in theirs)                # GPT-2 stores (in, out)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS", "base_model_name_or_path": base,
        "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": conv1d, "use_rslora": False,
        "target_modules": live.targets(model, set(theirs)),
        "rank_pattern": {p: k for p, k in ranks.items() if k != r},
        "alpha_pattern": {p: a for p, a in alphas.items() if a != alpha},
        "modules_to_save": None if head is None else ["score"], "inference_mode": True}
    if head is not None:
        tensors["base_model.model.score.weight"] = head.detach().float().cpu().contiguous()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    (out_dir / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load(model: nn.Module, adapter_dir: str | Path, name: str = "default") -> Tensor | None:
    """Puts a PEFT adapter on the model as a live adapter (checkpoints.load(..., lora=) merges instead). Returns the
    reward head (1, C) if the directory holds one. Every tensor must find its place."""
    adapter_dir = Path(adapter_dir)
    file = adapter_dir / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(f"no adapter_model.safetensors in {adapter_dir}: is it the directory of a LoRA adapter?")
    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(file)
    head = tensors.pop("base_model.model.score.weight", None)
    known = live.recipes(model)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B") and live.unchanged(model, key, tensor):
            continue
        if path not in known or half not in ("lora_A", "lora_B"):
            raise UserError(f"{file}: tensor {key} has no place in this model (is it an adapter of another base, or "
                            "one with "
                            f"trained embeddings? merge it at load: load(base, lora=[{str(adapter_dir)!r}]))")
        halves.setdefault(path, {})[half] = tensor
    patterns = config.get("alpha_pattern") or {}
    theirs = {}
    for path, pair in halves.items():
        if len(pair) != 2:
            raise UserError(f"{file}: {path} has only {next(iter(pair))}, its other half is missing")
        r, (n_out, n_in) = pair["lora_A"].shape[0], known[path].matrix
        for half, needed in (("lora_A", (r, n_in)), ("lora_B", (n_out, r))):
            if pair[half].shape != needed:
                raise UserError(f"{file}: {half} of {path} is {tuple(pair[half].shape)}, the model needs {needed}")
        # PEFT's keys are expressions for the end of this name.
        alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"])
        theirs[path] = (pair["lora_A"], pair["lora_B"], alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    ours = live.from_file(model, theirs)
    attach(model, name, {path: (len(A), scale) for path, (A, _, scale) in ours.items()})
    with torch.no_grad():
        for path, m in layers(model, name):
            m.lora_A[name].copy_(ours[path][0])
            m.lora_B[name].copy_(ours[path][1])
    return head
