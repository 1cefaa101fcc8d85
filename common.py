"""Plumbing that would be the same for a ResNet: command line, devices, ranks, schedule, optimiser, run folder, gates.

Nothing of the algorithms stands here: what a paper's algorithm box would show is in the script that teaches it.

    @dataclass
    class Config:
        # --- training ---              a banner opens a group of --help
        lr: float = 1e-4                # type and default are the flag's, this comment is its help

    def main(cfg):
        world = common.setup(cfg.device, cfg.dtype, cfg.seed)
        run = common.Run(cfg.out_dir, "sft", cfg, world, resume=cfg.resume)
        ...
    common.main(lambda: main(common.parse(Config)))

A run may be killed at any moment. A state is written under another name, synced and then renamed: what has the name of
a state is whole. It remembers how long the logs were, and resuming cuts them back to that length: in the end the log of
an interrupted run is that of an uninterrupted one.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import inspect
import io
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
import tokenize
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


class UserError(Exception):
    """Something the user can put right: what was found, where, what to do. Printed without a traceback."""


class NonFinite(RuntimeError):
    """A loss or gradient that is not a number: going on would only spread it."""


def main(fn: Callable[[], object]) -> None:
    """Runs a script. Exit code 1 when its gate failed (it returned False) or the user has something to put right."""
    try:
        code = 1 if fn() is False else 0
    except (UserError, NonFinite) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except BrokenPipeError:                              # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---------------------------------------------------------------- command line

def parse(Config: type, argv: list[str] | None = None):
    """The command line as a Config: --a b, --a=b, `_` and `-` alike, --flag, --no_flag; first --config FILE.json."""
    hints, notes, script = typing.get_type_hints(Config), field_notes(Config), sys.modules[Config.__module__]
    parser = argparse.ArgumentParser(
        description=script.__doc__, usage="%(prog)s [--option value ...]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,              # only what was typed comes back: the defaults are Config's
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=120))
    parser.add_argument("--config", metavar="FILE", help="JSON with any of these options, or the config.json of a run")
    groups: dict[str, typing.Any] = {}
    for field in dataclasses.fields(Config):
        (group, note), kind = notes[field.name], hints[field.name]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        many, add = typing.get_origin(kind) in (tuple, list), groups[group].add_argument
        shape = {"nargs": "*"} if many else {"nargs": "?", "const": True} if kind is bool else {}
        add("--" + field.name, metavar=typing.get_args(kind)[0].__name__ if many else type_name(kind), **shape,
            help=f"{note} {shown_default(field)}".strip().replace("%", "%%"))
        if kind is bool:
            add("--no_" + field.name, dest=field.name, action="store_false", help=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(spell(sys.argv[1:] if argv is None else argv))
    given = vars(given)
    try:
        if unknown:
            raise UserError(no_such("argument", unknown[0].split("=")[0], ["--" + name for name in hints]))
        values = read_options(given.pop("config"), hints) if "config" in given else {}
        values |= {name: checked(f"--{name}", value, hints[name]) for name, value in given.items()}
        return Config(**values)
    except (UserError, TypeError) as error:              # TypeError: a field without a default was not given
        parser.error(str(error))                         # exit code 2


def spell(argv: list[str]) -> list[str]:
    """--lr-floor -1e-3 -> --lr_floor=-1e-3: dashes become underscores, and no number is taken for a flag."""
    words: list[str] = []
    for word in argv:
        if re.match(r"-\.?\d", word) and words and re.fullmatch(r"--\w+", words[-1]):
            words[-1] += "=" + word
        else:
            words.append(re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word))
    return words


def read_options(path: str, hints: dict) -> dict:
    """A JSON file of options, or the config.json of a run, checked like the command line."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    values = values["config"] if isinstance(values.get("config"), dict) else values
    for name in values:
        if name not in hints:
            raise UserError(f"{path}: {no_such('option', name, hints)}")
    return {name: checked(f"{path}: {name}", value, hints[name]) for name, value in values.items()}


def checked(what: str, value, kind):
    try:
        return convert(value, kind)
    except ValueError:
        raise UserError(f"{what}: expected {type_name(kind)}, found {value!r}") from None


def convert(value, kind):
    """Text of the command line, or a value of a JSON file, as a value of type `kind`; ValueError when it is none."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in inside and value in (None, "none", "None"):
            return None
        for option in inside:
            with contextlib.suppress(ValueError):
                return convert(value, option)
    elif origin in (tuple, list):                        # "a,b"; "a b"; the words ["a", "b,c"]; numbers of a JSON file
        words = [value] if isinstance(value, str) else list(value or ())
        items = [x for word in words for x in (re.findall(r"[^,\s]+", word) if isinstance(word, str) else [word])]
        kinds = [inside[0]] * len(items) if origin is list or inside[-1] is ... else inside
        if len(items) == len(kinds):
            return origin(convert(x, k) for x, k in zip(items, kinds, strict=True))
    elif kind is bool and str(value).lower() in ("true", "false", "1", "0", "yes", "no"):
        return str(value).lower() in ("true", "1", "yes")
    elif kind is str and isinstance(value, str):
        return value
    elif kind is int and (isinstance(value, str) or type(value) is int):
        return int(value)
    elif kind is float and (isinstance(value, str) or type(value) in (int, float)):
        return float(value)
    raise ValueError(value)


def type_name(kind) -> str:
    return kind.__name__ if typing.get_origin(kind) is None else str(kind)


def shown_default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "(required)"
    text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else "''" if value == "" else value
    return f"(default: {text})"


def field_notes(Config: type) -> dict[str, tuple[str, str]]:
    """Field -> (group, help) from the source: `# --- x ---` opens a group, the comment behind a field is its help."""
    notes, group = {field.name: ("options", "") for field in dataclasses.fields(Config)}, "options"
    for cls in (c for c in reversed(Config.__mro__) if dataclasses.is_dataclass(c)):
        # Tokens rather than lines: a # inside a string is no comment.
        for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(inspect.getsource(cls))).readline):
            field, comment = re.match(r"    (\w+) *:", token.line), token.type == tokenize.COMMENT
            if comment and (banner := re.fullmatch(r"# -+ (.+?) -+", token.string)):
                group = banner[1]
            elif field and field[1] in notes:
                notes[field[1]] = (group, token.string[1:].strip() if comment else notes[field[1]][1])
    return notes


def no_such(what: str, name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"no {what} {name}" + (f": did you mean {near[0]}?" if near else "")


# ---------------------------------------------------------------- devices and ranks

@dataclass
class World:
    """Where this process computes, and which of how many processes it is."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def setup(device: str = "auto", dtype: str = "auto", seed: int = 0, quiet: bool = False) -> World:
    """Device, arithmetic, seeds, and the process group under torchrun. Every rank gets the same seed, because all must
    draw the same first weights; what a rank samples for itself it seeds with seed + 100003 * rank."""
    rank, size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    keep_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"          # mps only when asked for
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}, but torch {torch.__version__} sees no GPU: --device cpu, or a CUDA build")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but this machine has none: --device cpu")
    where, note = torch.device(f"cuda:{local}" if device == "cuda" else device), ""
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if dtype == "auto":
        # By compute capability: torch.cuda.is_bf16_supported() also says yes where bf16 is only emulated (T4).
        bf16 = torch.cuda.get_device_capability(where) >= (8, 0) if where.type == "cuda" else cpu_has_bf16(where)
        dtype = "bf16" if bf16 else "fp32"
        note = " (this GPU has no bf16, and fp16 would need loss scaling)" if where.type == "cuda" and not bf16 else ""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not supported: auto, bf16 or fp32 (fp16 overflows without loss scaling)")
    if size > 1 and not dist.is_initialized():
        # A rank that waits for a dead one gives up after this time, and all_reduce then says which rank it was.
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=20))
    seed_all(seed)
    if rank == 0 and not quiet:
        name = f"{where} ({torch.cuda.get_device_name(where)})" if where.type == "cuda" else str(where)
        print(f"device {name}, dtype {dtype}{note}, ranks {max(1, size)}, threads {torch.get_num_threads()}, "
              f"torch {torch.__version__}", flush=True)
    return World(where, DTYPES[dtype], rank, max(1, size))


def cpu_has_bf16(where: torch.device) -> bool:
    """Whether this CPU multiplies bf16 in hardware: twice as fast there, many times slower elsewhere."""
    return where.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def keep_memory() -> None:
    """Tells glibc to keep large buffers instead of returning each to the kernel and getting it back page by page, which
    made a backward pass ten times slower (docs/LOG.md). Other systems do this already."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 2**30)                               # M_MMAP_THRESHOLD: below 1 GiB from the heap
        mallopt(-1, 2**31 - 1)                           # M_TRIM_THRESHOLD: the heap is not given back


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)                              # of the GPUs too


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: Tensor) -> Tensor:
    """Sum over ranks, in place. A rank that waits in vain says which one it is."""
    try:
        dist.all_reduce(x)
    except RuntimeError as error:
        raise RuntimeError(f"rank {dist.get_rank()} of {ranks()} waited in vain for the sum of {tuple(x.shape)}: one "
                           "of them stopped or took another path, look for the first error above") from error
    return x


def all_sum(x):
    """The sum over ranks of a number or tensor; an int stays an int, a float a float, a tensor on its device."""
    if ranks() == 1:
        return x
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if isinstance(x, Tensor):
        return all_reduce(x.detach().clone().to(device)).to(x.device)
    kind = torch.int64 if isinstance(x, int) else torch.float64
    return type(x)(all_reduce(torch.tensor(x, dtype=kind, device=device)).item())


def sync_gradients(parameters: Iterable, bucket: int = 2**24) -> None:
    """Sums gradients over ranks: sums, because losses are already divided by the count over all ranks.
    `parameters`: tensors, or (name, tensor), in the same order on every rank; many small tensors share a message."""
    if ranks() == 1:
        return
    named = [p if isinstance(p, tuple) else (f"number {i}, {tuple(p.shape)}", p) for i, p in enumerate(parameters)]
    if missing := [name for name, p in named if p.grad is None]:
        raise RuntimeError(f"rank {dist.get_rank()}: {len(missing)} parameters without a gradient, first {missing[0]}")
    grads = [p.grad for _, p in named]
    while grads:
        n, full = 1, grads[0].numel()
        while n < len(grads) and grads[n].dtype == grads[0].dtype and full + grads[n].numel() <= bucket:
            full, n = full + grads[n].numel(), n + 1
        part, grads = grads[:n], grads[n:]
        flat = all_reduce(torch.cat([g.flatten() for g in part]))
        for g, total in zip(part, flat.split([g.numel() for g in part]), strict=True):
            g.copy_(total.view_as(g))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------- optimiser

def lr_at(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine", floor: float = 0.0) -> float:
    """Learning rate of optimiser step 0 .. steps-1: rises over `warmup` steps, never 0, then falls to floor."""
    if schedule not in ("cosine", "linear", "constant"):
        raise UserError(f"--schedule {schedule} is unknown: cosine, linear or constant")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
    return floor + (peak - floor) * left


def optimizer(model: nn.Module | list, groups: list[dict], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
              weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over groups {"name", "params": [(name, tensor)], "lr": multiplier}: exactly the trainable parameters of
    `model` (a module, or its named parameters), as torch says nothing of one that was left out.
    Before every step the caller sets group["lr"] = lr_at(...) * group["scale"]."""
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    trainable, owner, parts = {id(p): name for name, p in named if p.requires_grad}, {}, []
    for group in groups:
        for name, p in group["params"]:
            if id(p) in owner:
                raise RuntimeError(f"parameter {name} is in two optimiser groups, {owner[id(p)]} and {group['name']}")
            if id(p) not in trainable:
                raise RuntimeError(f"parameter {name} of optimiser group {group['name']} is frozen or of another model")
            owner[id(p)] = group["name"]
        for decay in (True, False):                      # biases and norm weights scale, they do not mix: no decay
            params = [p for _, p in group["params"] if (p.dim() >= 2) == decay]
            parts.append({"params": params, "name": group["name"], "scale": group["lr"], "lr": 0.0,
                          "weight_decay": weight_decay if decay else 0.0})
    if forgotten := [name for key, name in trainable.items() if key not in owner]:
        raise RuntimeError(f"{len(forgotten)} trainable parameters are in no optimiser group, first {forgotten[0]}")
    return torch.optim.AdamW([part for part in parts if part["params"]], betas=betas, eps=eps, fused=True)


def check_gradients(named_params: Iterable[tuple[str, Tensor]]) -> None:
    """Every trainable parameter has a gradient, no frozen one has: the first backward shows what is not connected."""
    named = list(named_params)
    without = [name for name, p in named if p.requires_grad and p.grad is None]
    frozen = [name for name, p in named if not p.requires_grad and p.grad is not None]
    for names, what in ((without, "trainable parameters got no gradient"), (frozen, "frozen parameters got one")):
        if names:
            raise RuntimeError(f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")


def grad_norm(params: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, as a tensor on their device: nothing waits for it yet."""
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])


def clip(params: Iterable[Tensor], max_norm: float) -> float:
    """Scales the gradients down to a norm of max_norm (0: leaves them), returns what it was. One wait for the GPU."""
    params = list(params)
    norm = grad_norm(params)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return float(norm)


def check_finite(named: dict[str, Tensor | float], step: int, where: list[str], run: "Run | None" = None,
                 state: dict | None = None) -> None:
    """Stops at the first value that is not finite. `state`, from before this update, is kept to look into."""
    bad = [f"{name} is {float(x)}" for name, x in named.items() if not math.isfinite(float(x))]
    if not bad:
        return
    kept = ""
    if run is not None and state is not None and run.world.main:
        kept = f"The state before this update: {run.write_state('before_nan.pt', state)}\n"
    places = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
    raise NonFinite(f"step {step}: {', '.join(bad)}\nThe samples of this step: {places}\n{kept}What helps, in this "
                    "order: look at those samples (one symbol all over?); --dtype fp32; a lower --lr or more --warmup")


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[typing.BinaryIO]:
    """A file that appears whole or not at all, even when the power fails: other name, sync, rename, sync the folder."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":                               # Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    with atomic(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def human(n: float) -> str:
    """1300000000 -> 1.3B, 412345678 -> 412M, 52002 -> 52K"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.1f}{unit}" if abs(n) < 9.95 * size else f"{n / size:.0f}{unit}"
    return f"{n:.3g}"


def duration(seconds: float) -> str:
    """34 -> 0:34, 312 -> 5:12, 3723 -> 1:02:03"""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"


def plain(x):
    """As JSON holds it: tensors and numpy numbers are numbers; what is no number is null, strict readers refuse NaN."""
    x = x.item() if hasattr(x, "item") else x
    return None if isinstance(x, float) and not math.isfinite(x) else x


def cell(name: str, value) -> str:
    """One figure of the step line."""
    value = plain(value)
    if not isinstance(value, float):
        return f"{name} {'nan' if value is None else value}"
    if name == "tokens_per_sec":
        return f"{value:5.0f} tok/s"
    return f"{name} {value:6.3f}" if value == 0 or 0.01 <= abs(value) < 1e5 else f"{name} {value:.1e}"


def git_hash() -> str:
    """The commit of this code, with -dirty when files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):         # no git
        return ""
    return done.stdout.strip()


# ---------------------------------------------------------------- run folder

LOGS = ("metrics.jsonl", "samples.jsonl")
CONTENTS = ("gate.json", "report.html", *LOGS, "state", "model", "adapter", "policy", "value",
            "config.json")                               # what --overwrite removes
# The weights in a state, or its place in the data, depend on these options: with other values it would not fit.
FIXED = ("init", "reward", "data", "valid", "valid_share", "format", "template", "skip_bad", "max_len", "max_prompt",
         "eval_prompts", "packing", "batch_size", "lora_r", "lora_alpha", "lora_targets", "quant", "seed")


class Run:
    """The run folder. Every rank has one, only rank 0 writes and prints. `total`: the steps of the run, for the ETA."""
    def __init__(self, out_dir: str | Path, stage: str, cfg, world: World, resume: bool = False):
        self.dir, self.stage, self.world, self.total = Path(out_dir), stage, world, 0
        self.started = self.last = time.time()
        self.earlier, self.first = 0.0, 0                # seconds of the sessions before this one, and where it began
        if world.main:
            options = json.loads(json.dumps(dataclasses.asdict(cfg), default=str))       # as they will read back
            old = self.open(options, resume, getattr(cfg, "overwrite", False))
            self.dir.mkdir(parents=True, exist_ok=True)
            about = {"stage": stage, "config": options, "command": " ".join(sys.argv), "git": git_hash(),
                     "date": time.strftime("%Y-%m-%d %H:%M:%S"), "ranks": world.size, "device": str(world.device),
                     "dtype": str(world.dtype), "versions": {
                         "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
                     "sessions": [*old.pop("sessions", []), old] if old else []}          # before this one
            atomic_write(self.dir / "config.json", json.dumps(about, indent=2, ensure_ascii=False))
            (self.dir / "state").mkdir(exist_ok=True)
            for leftover in self.dir.glob("state/*.tmp"):                                # killed while it wrote
                leftover.unlink()
        barrier()

    def open(self, options: dict, resume: bool, overwrite: bool) -> dict:
        """The config.json of the run that goes on, {} for a new one. Two runs are never mixed in one folder."""
        file = self.dir / "config.json"
        if not file.exists():
            if there := [name for name in CONTENTS if (self.dir / name).exists()]:
                raise UserError(f"{self.dir} holds {there[0]} but is no run (no config.json): choose another --out_dir")
            if resume:
                print(f"nothing to resume in {self.dir}: starting from the beginning")
            return {}
        old = json.loads(file.read_text(encoding="utf-8"))
        if not resume and not overwrite:
            raise UserError(f"{self.dir} already holds a run ({old['stage']}, {old['date']}): --resume goes on with "
                            "it, --overwrite replaces it, another --out_dir keeps both. Nothing was changed")
        if not resume:
            self.clear(options)
            return {}
        changed = {k: f"--{k} was {old['config'].get(k)!r} and is now {v!r}" for k, v in options.items()
                   if k not in ("resume", "overwrite") and old["config"].get(k) != v}
        same = (("stage", self.stage), ("ranks", self.world.size))
        changed |= {k: f"{k} was {old[k]} and is now {new}" for k, new in same if old[k] != new}
        if bad := [text for k, text in changed.items() if k in (*FIXED, "stage", "ranks")]:
            raise UserError(f"{self.dir} cannot be resumed: {', '.join(bad)}. Give it what it was started with, "
                            "or another --out_dir")
        for text in changed.values():
            print(f"resuming: {text}")
        return old

    def clear(self, options: dict) -> None:
        """--overwrite: removes what a run writes and nothing else, unless this very run reads from there."""
        for path in (Path(options[name]) for name in ("init", "reward", "data", "valid") if options.get(name)):
            if path.exists() and self.dir.resolve() in path.resolve().parents:
                raise UserError(f"--overwrite would delete {path}, which this run reads: choose another --out_dir")
        for path in (self.dir / name for name in CONTENTS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # ---- logs

    def log(self, step: int, metrics: dict, show: tuple[str, ...] | None = None, tokens: int = 0) -> None:
        """Appends to metrics.jsonl, prints  sft  12/200 (  6%) | loss  2.113 | lr 1.0e-04 | 412 tok/s | 0:34 | eta 5:12
        show: the metrics to print (None: all); tokens: of this step, when tokens_per_sec is not among the metrics."""
        now = time.time()
        if tokens:
            metrics = {**metrics, "tokens_per_sec": tokens / max(1e-9, now - self.last)}
        self.last, elapsed, total = now, self.earlier + now - self.started, max(self.total, step, 1)
        self.append("metrics.jsonl", [{"step": step, **metrics, "seconds": round(elapsed, 2)}])
        line = [f"{self.stage} {step:{len(str(total))}}/{total} ({step / total:4.0%})"]
        line += [cell(name, metrics[name]) for name in show or metrics if name in metrics] + [duration(elapsed)]
        if self.first < step < total:                    # for the run, at the pace of this session
            line.append("eta " + duration((now - self.started) / (step - self.first) * (total - step)))
        if self.world.main:
            print(" | ".join(line), flush=True)

    def sample(self, step: int, rows: list[dict]) -> None:
        self.append("samples.jsonl", [{"step": step, **row} for row in rows])

    def append(self, name: str, rows: list[dict]) -> None:
        if self.world.main:
            with open(self.dir / name, "a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({k: plain(v) for k, v in row.items()}, ensure_ascii=False) + "\n")

    # ---- states

    def save_state(self, step: int, state: dict, per_rank: dict | None = None) -> None:
        """state/step_N.pt: `state` of rank 0; random generators and `per_rank` of every rank. Keeps the last two."""
        ranks = [{"rng": get_rng(self.world.device), **(per_rank or {})}] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(ranks, ranks[0])
        if not self.world.main:
            return
        for name in LOGS:                                # the state vouches for these lines: they go to the disk first
            with open(self.dir / name, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        self.write_state(f"step_{step:08}.pt", state, ranks=ranks, seconds=self.earlier + time.time() - self.started,
                         logs={name: (self.dir / name).stat().st_size for name in LOGS})
        for path in sorted(self.dir.glob("state/step_*.pt"))[:-2]:
            path.unlink()

    def write_state(self, name: str, state: dict, **more) -> Path:
        with atomic(self.dir / "state" / name) as file:
            torch.save({"state": state, **more}, file)
        return self.dir / "state" / name

    def load_state(self) -> dict | None:
        """The newest state that is whole, or None. Restores random generators, cuts the logs back to that moment."""
        saved, path, damaged = None, None, []
        for path in sorted(self.dir.glob("state/step_*.pt"), reverse=True):
            try:
                saved = read_state(path)
                break
            except (RuntimeError, EOFError, KeyError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                damaged.append(f"{path} is damaged ({' '.join(str(error).split())[:100]})")
        if damaged and not saved:
            raise UserError("; ".join(damaged) + ". No whole state is left: --overwrite starts from the beginning")
        if self.world.main:
            text = f"resuming from {path}" if saved else f"{self.dir} has no state yet: starting from the beginning"
            print("\n".join([*damaged, text]), flush=True)
            for name in LOGS:
                if (self.dir / name).exists():
                    os.truncate(self.dir / name, saved["logs"][name] if saved else 0)
        barrier()
        if not saved:
            return None
        self.earlier, self.first = saved["seconds"], int(path.stem.removeprefix("step_"))
        mine = saved["ranks"][self.world.rank]
        set_rng(mine.pop("rng"), self.world.device)
        return {**saved["state"], **mine}


def read_state(path: Path) -> dict:
    # torch checks no checksums when it reads: a state with a flipped bit would train on without a word.
    with zipfile.ZipFile(path) as file:
        if broken := file.testzip():
            raise zipfile.BadZipFile(f"wrong checksum in {broken}")
    return torch.load(path, map_location="cpu", weights_only=True)       # a state is data and runs no code


def get_rng(device: torch.device) -> dict:
    """The states of all random generators, as numbers and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng(rng: dict, device: torch.device) -> None:
    random.setstate(rng["python"])
    np.random.set_state(rng["numpy"])
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], device)


# ---------------------------------------------------------------- gates

def gate(stage: str, checks: list[tuple[str, bool, str]], advice: str = "", run: Run | None = None,
         run_dir: str | Path | None = None) -> bool:
    """Says whether a stage worked: checks are (name, passed, figure). Kept as gate.json in the run folder."""
    passed, folder = all(ok for _, ok, _ in checks), run.dir if run else run_dir
    if dist.is_initialized() and dist.get_rank():
        return passed
    figures = " | ".join(f"{'' if ok else 'FAILED: '}{name} {figure}" for name, ok, figure in checks)
    print(f"GATE {stage} {'PASS' if passed else 'FAIL'}  {figures}", flush=True)
    if advice and not passed:
        print(f"  what to do: {advice}", flush=True)
    if folder is not None:
        checks = [{"name": name, "ok": bool(ok), "figure": figure} for name, ok, figure in checks]
        record = {"stage": stage, "passed": passed, "advice": advice, "checks": checks}
        atomic_write(Path(folder) / "gate.json", json.dumps(record, indent=2, ensure_ascii=False))
    return passed
