"""How fast is it beside what a reader would install instead? Same weights, same adapter, same batch, same run, in turn.

    python bench.py                                             # sampling and LoRA training beside transformers + peft
    python bench.py --repeats 7 --out docs/results/bench_cpu.json
    python bench.py --what recipe --out docs/results/recipe_cpu.json  generation and SFT beside plain transformers
    python bench.py --what growth --out docs/results/growth_cpu.json  time and memory against sizes, with a figure
    python bench.py --what load --out docs/results/load_cpu.json      time and memory of loading, beside transformers

Both sides have the model in the same dtype, a rank-16 adapter on all seven linears, the same prompts (left-padded) and
the same training rows (right-padded). Sampling draws exactly `new_tokens` tokens a row on both sides: no end token
stops it. transformers + peft run in a process of their own, as they do for their users: what we tell the allocator
(common.keep_memory) would make them faster. The two processes take turns, and one waits while the other computes.

Loading: a LLaMA of random weights, each load in a process of its own that has imported everything before the clock
starts. `ready` is when every page of the weights was read once: a loader that only maps the file pays then. `private`
is the most memory that the process had of its own, as seen from outside every 2 ms (RssAnon); the mapped file comes on
top in `rss`, but its pages are the system's to take back. What no loader can be faster than stands beside: reading the
file once (cold: its pages are dropped from the cache first), and copying it.
"""
import importlib.metadata
import json
import math
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import bench_growth
import bench_recipe
import checkpoints
import common
import lora
import sft
from data import batch as data_batch
from data import chat, formats
from model import ModelConfig


@dataclass
class Config:
    what: str = "train"                # train: sampling and a LoRA SFT step; recipe, growth, load: see above
    init: str = "smollm2-135m"         # the model on both sides; --what load makes one of its own
    rows: int = 32                     # answers sampled at once
    new_tokens: int = 48               # tokens per answer
    train_rows: int = 16               # rows of a training batch
    data_batches: int = 4              # recipe: batches of a step on real conversations,
    packed_len: int = 512              # which we pack into rows of so many tokens
    full_rows: int = 4                 # recipe: rows of a step that trains every weight, and their length;
    full_len: int = 512                # as sft.py has them
    largest: int = 2048                # growth: the longest row; smaller for a try
    lora_r: int = 16
    repeats: int = 5                   # counted repeats of each side, in turn: A B A B ...
    seed: int = 0
    device: str = "auto"
    dtype: str = "bf16"
    out: str = ""                      # write the figures there as JSON
    peer: str = ""                     # set by bench.py itself: what another process is for


# ---------------------------------------------------------------- their side: a process of its own

def peer(folder: Path, cfg: Config) -> None:
    """Loads the model and adapter from `folder` with transformers + peft, then does what each line of stdin says and
    answers with the seconds it took."""
    try:
        import peft
        import transformers
    except ImportError as missing:
        raise common.UserError(f"{missing.name} is not installed: pip install -r requirements-test.txt") from None
    transformers.logging.set_verbosity_error()
    work = torch.load(folder / "work.pt", weights_only=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=common.DTYPES[cfg.dtype])
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).to(work["device"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def logits() -> None:
        with torch.no_grad():
            torch.save(model(work["ids"], attention_mask=work["mask"]).logits[:, -1].float(), folder / "logits.pt")

    def sample() -> None:
        model.eval()
        with torch.no_grad():
            out = model.generate(input_ids=work["ids"], attention_mask=work["mask"], do_sample=True, top_k=0, top_p=1.0,
                                 temperature=1.0, pad_token_id=0, min_new_tokens=cfg.new_tokens,
                                 max_new_tokens=cfg.new_tokens)
        assert out.shape[1] == work["ids"].shape[1] + cfg.new_tokens

    def train() -> None:
        model.train()
        model(input_ids=work["t_ids"], attention_mask=work["attention"], labels=work["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(transformers.__version__, peft.__version__, flush=True)
    for line in sys.stdin:
        print(timed({"logits": logits, "sample": sample, "train": train}[line.strip()]), flush=True)


class Peer:
    """The other process; ask("sample") waits for it and returns its seconds."""
    def __init__(self, folder: Path, cfg: Config):
        command = [sys.executable, __file__, "--peer", str(folder)]
        for name in ("what", "new_tokens", "lora_r", "dtype"):
            command += [f"--{name}", str(getattr(cfg, name))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        encoding="utf-8")
        self.versions = self.line()

    def line(self) -> str:
        if not (text := self.process.stdout.readline()):
            raise common.UserError(f"the process of transformers + peft ended with {self.process.wait()}, see above")
        return text.strip()

    def ask(self, what: str) -> float:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.line())


# ---------------------------------------------------------------- turns and tables

def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, one uncounted turn first."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, call in sides.items():
            spent = call()
            seconds[name] += [spent] if i else []
    return seconds


def table(title: str, tokens: int, seconds: dict[str, list[float]], against: str) -> dict:
    print(f"\n{title}")
    result = {}
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(times, seconds[against]))
        speed = tokens / statistics.median(times)
        result[name] = {"tokens_per_sec": speed, "ratio_to_peer": ratio, "seconds": times}
        print(f"  {name:34s} {speed:8.0f} tok/s   {ratio:5.2f}x   (median of {len(times)}, "
              f"{min(times):.2f} .. {max(times):.2f} s)")
    return result


# ---------------------------------------------------------------- loading

LOADED = ModelConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_layers=16, num_heads=16,
                     num_kv_heads=16)                                          # 271M parameters, 541 MB in bf16
CASES = {"safetensors bf16 -> bf16": ("safetensors", "bf16", False), "safetensors bf16 -> fp32": ("safetensors", "fp32",
         False), "pytorch_model.bin fp16 -> bf16": ("bin", "bf16", False),
         "safetensors bf16 -> bf16, cold": ("safetensors", "bf16", True)}
LOADERS = ("ours", "transformers", "read", "copy")


def write_models(folder: Path) -> None:
    """The same weights twice: safetensors in bf16, and in two shards of pytorch_model.bin in fp16."""
    model = checkpoints.build(LOADED, torch.bfloat16)
    for p in model.parameters():
        p.data.normal_(0, 0.02)
    checkpoints.save(model, None, folder / "safetensors")
    state = {n: t.half() for n, t in safetensors.torch.load_file(folder / "safetensors" / "model.safetensors").items()}
    (folder / "bin").mkdir()
    shutil.copyfile(folder / "safetensors" / "config.json", folder / "bin" / "config.json")
    where = {name: f"pytorch_model-0000{1 + 2 * i // len(state)}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({n: t for n, t in state.items() if where[n] == file}, folder / "bin" / file)
    (folder / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}),
                                                                encoding="utf-8")


def weights_of(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))


def load_once(cfg: Config) -> None:
    """The process that loads. It says ready, waits for a line, loads, answers with seconds and peak, then with a sum of
    all weights."""
    folder, dtype = Path(cfg.init), common.DTYPES[cfg.dtype]
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))         # wakes the threads up
    if cfg.peer == "transformers":
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        theirs = transformers.LlamaForCausalLM                                 # imported here, not on the clock
        load = lambda: theirs.from_pretrained(folder, dtype=dtype)  # noqa: E731
    elif cfg.peer == "ours":
        load = lambda: checkpoints.load(folder, dtype=dtype)[0]  # noqa: E731
    else:
        load = lambda: [touch(file, cfg.peer) for file in weights_of(folder)] and torch.nn.Module()  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")            # the peak counts from here
    print("ready", flush=True)
    sys.stdin.readline()
    before, start, cpu = memory_of("self"), time.perf_counter(), time.process_time()
    model = load()
    seconds = time.perf_counter() - start
    for p in model.parameters():
        p.detach().view(-1)[::1024].sum()                                      # a number of every page
    print(json.dumps({"load": seconds, "ready": time.perf_counter() - start, "cpu": time.process_time() - cpu,
                      "rss": memory_of("self", "VmHWM") - before}), flush=True)
    print(sum(float(p.detach().double().abs().sum()) for p in model.parameters()), flush=True)


def touch(file: Path, how: str) -> Tensor | None:
    """The least that a loader does: look at every byte once; or copy it to memory of its own."""
    if how == "read":
        buffer = bytearray(1 << 23)
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
        return None
    return torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8).clone()


def memory_of(process: int | str, what: str = "VmRSS") -> int:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * int(next((line.split()[1] for line in status.splitlines() if line.startswith(what)), 0))    # 0: gone


def measure(side: str, folder: Path, dtype: str, cold: bool) -> dict[str, float]:
    """One load in a fresh process, its memory watched from here."""
    for file in weights_of(folder) if cold else []:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--what", "load", "--peer", side, "--init", str(folder), "--dtype", dtype]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if process.stdout.readline().strip() != "ready":
        raise common.UserError(f"the process of {side} ended with {process.wait()}, see above")
    before = most = memory_of(process.pid, "RssAnon")
    process.stdin.write("\n")
    process.stdin.flush()
    while not select.select([process.stdout], [], [], 0.002)[0]:
        most = max(most, memory_of(process.pid, "RssAnon"))
    answer, total = process.stdout.readline(), process.stdout.readline()
    process.stdin.close()
    if process.wait() or not total:
        raise common.UserError(f"the process of {side} ended with {process.wait()}, see above")
    return json.loads(answer) | {"sum": float(total), "private": most - before}


def bench_load(cfg: Config) -> dict:
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        size = sum(math.prod(p.shape) for p in checkpoints.build(LOADED).parameters())
        for case, (kind, dtype, cold) in CASES.items():
            sides = LOADERS if (kind, dtype) == ("safetensors", "bf16") else LOADERS[:2]
            runs: dict[str, list[dict]] = {side: [] for side in sides}
            for turn in range(cfg.repeats + 1):                                # the first turn is not counted
                for side in sides:
                    found = measure(side, Path(folder) / kind, dtype, cold)
                    runs[side] += [found] if turn else []
            assert math.isclose(runs["ours"][0]["sum"], runs["transformers"][0]["sum"], rel_tol=1e-9)
            figures[case] = load_table(case, size * common.DTYPES[dtype].itemsize, runs)
    return figures


def load_table(case: str, size: int, runs: dict[str, list[dict]]) -> dict:
    """Medians; memory in sizes of the loaded model; the ratio is that of neighbours in time."""
    print(f"\n{case}   (the model: {size / 1e6:.0f} MB)")
    result: dict = {"model_bytes": size}
    for side, found in runs.items():
        ratio = statistics.median(a["ready"] / b["ready"] for a, b in zip(found, runs["ours"]))
        load, ready, cpu, private, rss = (statistics.median(r[key] for r in found)
                                          for key in ("load", "ready", "cpu", "private", "rss"))
        result[side] = {"ready_to_ours": ratio, "private_per_model": private / size, "rss_per_model": rss / size,
                        **{key: [r[key] for r in found] for key in ("load", "ready", "cpu")}}
        print(f"  {side:14s} loaded {load:6.3f} s, ready {ready:6.3f} s ({ratio:5.2f}x ours; cpu {cpu:6.3f} s)   "
              f"private {private / size:5.3f} of the model, with the file's pages {rss / size:5.3f}")
    return result


# ---------------------------------------------------------------- our side

def main(cfg: Config) -> None:
    if cfg.what not in (known := ("train", "recipe", "growth", "load")):
        raise common.UserError(f"--what {cfg.what} is unknown; known: {', '.join(known)}")
    if cfg.what != "train" and not cfg.peer:
        if cfg.device not in ("auto", "cpu") or cfg.dtype != Config.dtype:
            raise common.UserError(f"--what {cfg.what} measures a CPU in dtypes of its own: "
                                   "--device and --dtype are for --what train")
    if cfg.what == "load":
        versions = {"transformers": importlib.metadata.version("transformers")}
        return load_once(cfg) if cfg.peer else write_figures(cfg, bench_load(cfg), versions)
    if cfg.what == "growth":
        return bench_growth.child(cfg) if cfg.peer else bench_growth.run(cfg)
    if cfg.what == "recipe":
        if cfg.peer:
            return bench_recipe.answer(Path(cfg.peer), cfg)
        with tempfile.TemporaryDirectory() as folder:
            figures, versions = bench_recipe.run(cfg, Path(folder))
        return write_figures(cfg, figures, {"device": "cpu", "dtype": "bf16", "peers": versions})
    if cfg.peer:
        return peer(Path(cfg.peer), cfg)
    world = common.setup(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = checkpoints.load(cfg.init, world.device, world.dtype)
    chat.use_format(tokenizer)
    lora.apply(model, cfg.lora_r, 32.0, name="bench")
    for _, p in lora.parameters(model, "bench"):
        torch.nn.init.normal_(p.data, std=0.02)                                # an adapter that is not zero
    prompts = data_batch.encode_prompts(formats.read_prompts("data/demo/prompts.jsonl"), tokenizer, 128)[:cfg.rows]
    ids, mask = (x.to(world.device) for x in data_batch.pad([p["ids"] for p in prompts], tokenizer.pad_id, side="left"))
    samples = data_batch.encode_sft(formats.read_sft("data/demo/sft.jsonl")[:cfg.train_rows], tokenizer, 256)
    t_ids, _, t_mask = sft.collate(samples, tokenizer.pad_id, world.device)
    attention = data_batch.pad([[1] * len(s["ids"]) for s in samples], 0)[0].to(world.device)
    optimizer = torch.optim.AdamW([p for _, p in lora.parameters(model, "bench")], lr=1e-5)

    def sample(how: Callable) -> float:
        def call() -> None:
            with how(model, "bench"):
                assert model.generate(ids, cfg.new_tokens, mask).shape[1] == cfg.new_tokens
        return timed(call)

    def train() -> None:
        with lora.use(model, "bench"):
            sft.batch_loss(model, t_ids, None, t_mask).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lora.save(model, "bench", folder / "adapter", base=str(folder / "model"))
        plain, _ = checkpoints.load(cfg.init, "cpu", world.dtype)
        checkpoints.save(plain, tokenizer, folder / "model")
        torch.save({"ids": ids, "mask": mask, "t_ids": t_ids, "attention": attention, "device": str(world.device),
                    "labels": t_ids.masked_fill(t_mask == 0, -100)}, folder / "work.pt")
        them = Peer(folder, cfg)
        them.ask("logits")
        with torch.no_grad(), lora.use(model, "bench"):
            ours, theirs = model(ids, mask)[:, -1].float(), torch.load(folder / "logits.pt", weights_only=True)
        print(f"largest difference of the logits: {float((ours - theirs).abs().max()):.3f} (logits up to "
              f"{float(ours.abs().max()):.1f}, {cfg.dtype}; mean difference {float((ours - theirs).abs().mean()):.4f})")
        figures = {"sample": table(
            f"sampling {cfg.rows} answers of {cfg.new_tokens} tokens with a LoRA policy", cfg.rows * cfg.new_tokens,
            interleave({"ours (lora.packed)": lambda: sample(lora.packed),
                        "ours (lora.merged)": lambda: sample(lora.merged),
                        "transformers + peft": lambda: them.ask("sample")}, cfg.repeats), "transformers + peft")}
        figures["sft"] = table(
            f"LoRA SFT step, {cfg.train_rows} rows, {int(attention.sum())} real tokens of {t_ids.numel()}",
            int(attention.sum()), interleave({"ours": lambda: timed(train), "transformers + peft":
                                              lambda: them.ask("train")}, cfg.repeats), "transformers + peft")
        them.process.stdin.close()
        them.process.wait()
    write_figures(cfg, figures, {"device": str(world.device), "dtype": cfg.dtype, "transformers and peft":
                                 them.versions})


def write_figures(cfg: Config, figures: dict, about: dict) -> None:
    if cfg.out:
        figures["about"] = {
            "command": "python " + " ".join(sys.argv), **about, "machine": platform.machine(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        common.atomic_write(cfg.out, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
