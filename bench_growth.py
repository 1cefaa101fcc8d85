"""How time and memory grow, beside what theory says: `python bench.py --what growth --out docs/results/growth_cpu.json`
writes the figures and, next to it, growth_cpu.svg.

    time    a step takes at least   FLOPs / rate of a matrix product  +  bytes / rate of a copy
            Both rates are measured first. FLOPs: 2 for each weight and token forward, 2 for the gradient of what went
            in, 2 more where the weight is trained; attention 4 H D a pair of tokens, 8 more backward, and 2 where the
            scores are made again. Bytes: the weights once in each direction, everything that autograd keeps written
            once and read once, 28 for each trained number (AdamW); a decoding step reads weights and cache.
    memory  what memory.py adds up without a model: weights, gradients, moments, activations, logits.

One constant is fitted to each curve, the mean of log(measured / theory): the dashed line is theory times that. For
time it says how far from the ceiling the program is, for memory it should be near 1. What the dashed line does not
follow has a cause that theory does not know: at small sizes the interpreter, 60 operations a layer.

Every point is a process of its own. Its memory is what it had of its own (RssAnon, seen from outside every 2 ms)
beyond what it had before it made the model.
"""
import json
import math
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import bench
import checkpoints
import common
import lora
import memory
import sampling
import sft
from course.figure import Line, Panel, grid
from kernels import blocks
from model import SHORT, ModelConfig, Transformer

# Small LLaMAs: their width, layers, heads, key heads. The last one is about the default model's size.
SIZES = {"1M": (128, 4, 4, 2), "4M": (256, 4, 4, 2), "16M": (384, 8, 6, 3), "50M": (576, 14, 9, 3),
         "135M": (576, 36, 9, 3)}
DECODED = 16                               # tokens that a decoding point is the mean of


# ---------------------------------------------------------------- the points

def curves(cfg) -> dict[str, tuple[str, list[dict]]]:
    """name -> (what the x axis is, points); a point is what a child is told, with its place on the axis as "x"."""
    def upto(low: int, high: int) -> list[int]:
        return [n for n in (2**k for k in range(18)) if low <= n <= high]

    long, default = cfg.largest, {"init": cfg.init, "r": cfg.lora_r}
    small = {"shape": SIZES["4M"], "r": 0, "batch": 4, "length": min(128, long)}
    return {
        "length": ("tokens in a row, LoRA step of 1 row",
                   [default | {"x": n, "batch": 1, "length": n} for n in upto(64, long)]),
        "batch": ("rows of 128 tokens, LoRA step",
                  [default | {"x": n, "batch": n, "length": 128} for n in upto(1, long // 64)]),
        "vocabulary": ("vocabulary, full step of a 3M model, 4 x 128 tokens",
                       [small | {"x": n, "vocab": n} for n in upto(1024, long * 64)]),
        "size": ("parameters, full step, 2 x 128 tokens",
                 [small | {"x": parameters(shape), "shape": shape, "batch": 2}
                  for shape in list(SIZES.values())[:5 if long >= 512 else 2]]),
        "context": ("tokens before the new one, decoding 4 rows",
                    [default | {"x": n, "batch": 4, "length": n, "decode": True} for n in upto(64, long)]),
        "rows": ("rows, decoding behind 64 tokens",
                 [default | {"x": n, "batch": n, "length": 64, "decode": True} for n in upto(1, long // 32)])}


def config_of(point: dict) -> ModelConfig:
    if "init" in point:
        return checkpoints.read_config(point["init"])
    C, L, H, K = point["shape"]
    return ModelConfig(vocab_size=point.get("vocab", 4096), hidden_size=C, intermediate_size=8 * C // 3 // 64 * 64,
                       num_layers=L, num_heads=H, num_kv_heads=K, tie_embeddings=True, max_positions=4096)


def parameters(shape: tuple) -> int:
    return memory.count(config_of({"shape": shape}))


# ---------------------------------------------------------------- theory

def theory(point: dict, rates: dict[str, float]) -> tuple[float, int]:
    """(seconds, bytes) that the point would take at the ceiling."""
    config, B, T, r = config_of(point), point["batch"], point["length"], point["r"]
    H, L, D, V = config.num_heads, config.num_layers, config.head_dim, config.vocab_size
    linear, head = memory.count(config, lora.ALL_LINEAR), V * config.hidden_size
    plan = memory.Plan(config, "sft", B, T, lora_r=r, dtype=torch.bfloat16)
    if point.get("decode"):
        context = T + DECODED / 2                                              # on average
        cache = 2 * 2 * L * config.num_kv_heads * D * B * (T + DECODED + 1)
        flops = 2 * B * (linear + head) + 4 * L * H * D * B * context
        return flops / rates["product"] + (2 * (linear + head) + cache) / rates["copy"], \
            2 * (linear + head) + memory.packed_bytes(plan) + cache
    table = memory.estimate(config, "sft", batch=B, length=T, lora_r=r, dtype=torch.bfloat16)
    in_blocks = sum((rows.stop - rows.start) * keys.stop for rows, keys in blocks.spans(None, T, T))
    pairs = in_blocks if T > SHORT else T * T
    adapter = table.trainable if r else 0
    attention = (14 if T > SHORT else 12) * H * D * B * pairs
    flops = B * T * ((4 if r else 6) * (linear + head) + 6 * adapter) + L * attention
    kept = memory.activations(plan) + 4 * 4 * B * T * V
    moved = 2 * 2 * (linear + head) + 2 * kept + 28 * table.trainable
    return flops / rates["product"] + moved / rates["copy"], table.total


def rates_of_this_machine() -> dict[str, float]:
    """FLOP/s of a bf16 product that fits the cache, bytes/s (read + written) of a copy that does not."""
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    big = torch.ones(2**26)
    other = torch.empty_like(big)
    product = [bench.timed(lambda: a @ b) for _ in range(8)]
    copy = [bench.timed(lambda: other.copy_(big)) for _ in range(8)]
    return {"product": 2 * 2048**3 / statistics.median(product[1:]),
            "copy": 2 * big.nbytes / statistics.median(copy[1:])}


# ---------------------------------------------------------------- one point, in a process of its own

def child(cfg) -> None:
    """Says ready, waits for a line, answers with the seconds of each repeat."""
    point = json.loads(cfg.peer)
    common.setup("cpu", "bf16", cfg.seed, quiet=True)
    tiny = Transformer(config_of({"shape": (64, 1, 2, 1)})).bfloat16()         # wakes the threads and libraries up, and
    ids = torch.arange(512)[None]
    for call in (decoding(tiny, ids), training(tiny, ids, 4)):                 # they keep 60 MB of their own
        call()
    del tiny, call
    print("ready", flush=True)
    sys.stdin.readline()
    full = point["r"] == 0
    model = checkpoints.build(config_of(point), torch.float32 if full else torch.bfloat16)
    for p in model.parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(1.0)
    model.tie_weights()
    generator = torch.Generator().manual_seed(cfg.seed)
    ids = torch.randint(0, model.config.vocab_size, (point["batch"], point["length"]), generator=generator)
    call = decoding(model, ids) if point.get("decode") else training(model, ids, point["r"])
    print(json.dumps([call() for _ in range(cfg.repeats + 1)][1:]), flush=True)


def decoding(model: Transformer, ids: torch.Tensor):
    """Seconds a token, of the DECODED tokens behind the first: that one waits for the reading of the prompts."""
    def call() -> float:
        at: list[float] = []
        with sampling.packed(model):
            model.generate(ids, DECODED + 1, on_token=lambda _: at.append(time.perf_counter()))
        return (at[-1] - at[0]) / DECODED
    return call


def training(model: Transformer, ids: torch.Tensor, r: int):
    """Seconds of an optimiser step on rows without padding, all tokens supervised."""
    world = common.World(torch.device("cpu"), torch.bfloat16)
    if r:
        lora.apply(model, r, 32.0, name="bench")
    trained = lora.parameters(model, "bench") if r else list(model.named_parameters())
    optimizer = common.optimizer(model, [{"name": "model", "params": trained, "lr": 1.0}])
    mask = torch.ones_like(ids)

    def step() -> None:
        with lora.use(model, "bench" if r else None), sft.autocast(world, r == 0):
            part = sft.batch_loss(model, ids, None, mask)
        part.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: bench.timed(step)


def measure(point: dict, cfg) -> dict:
    command = [sys.executable, bench.__file__, "--what", "growth", "--peer", json.dumps(point), "--repeats",
               str(cfg.repeats), "--seed", str(cfg.seed)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if process.stdout.readline().strip() != "ready":
        raise common.UserError(f"the process of {point} ended with {process.wait()}, see above")
    before = most = bench.memory_of(process.pid, "RssAnon")
    process.stdin.write("\n")
    process.stdin.flush()
    while not select.select([process.stdout], [], [], 0.002)[0]:
        most = max(most, bench.memory_of(process.pid, "RssAnon"))
    answer = process.stdout.readline()
    process.stdin.close()
    if process.wait() or not answer:
        raise common.UserError(f"the process of {point} ended with {process.wait()}, see above")
    return {"seconds": json.loads(answer), "bytes": most - before}


# ---------------------------------------------------------------- all curves, a table, a figure

def fit(measured: list[float], expected: list[float]) -> tuple[float, float]:
    """The constant that theory is multiplied by, and the largest factor by which a point then misses it.
    [2, 4, 8], [1, 2, 4] -> 2, 1"""
    logs = [math.log(m / e) for m, e in zip(measured, expected)]
    constant = statistics.mean(logs)
    return math.exp(constant), math.exp(max(abs(x - constant) for x in logs))


def run(cfg) -> None:
    rates = rates_of_this_machine()
    print(f"product {rates['product'] / 1e9:.0f} GFLOP/s, copy {rates['copy'] / 1e9:.1f} GB/s")
    figures: dict[str, dict] = {}
    for name, (axis, points) in curves(cfg).items():
        found = [measure(point, cfg) for point in points]
        expected = [theory(point, rates) for point in points]
        seconds = [statistics.median(f["seconds"]) for f in found]
        time_constant, time_miss = fit(seconds, [s for s, _ in expected])
        bytes_constant, bytes_miss = fit([f["bytes"] for f in found], [b for _, b in expected])
        figures[name] = {
            "axis": axis, "time": {"constant": time_constant, "largest_miss": time_miss},
            "memory": {"constant": bytes_constant, "largest_miss": bytes_miss},
            "points": [{"x": p["x"], "theory_seconds": s, "theory_bytes": b, **f}
                       for p, (s, b), f in zip(points, expected, found)]}
        print(f"\n{axis}\n  time {time_constant:.2f} x theory, at most {time_miss:.2f} off; "
              f"memory {bytes_constant:.2f} x theory, at most {bytes_miss:.2f} off")
        for p, s, f in zip(points, seconds, found):
            print(f"  {p['x']:>10,}  {1000 * s:10.1f} ms   {f['bytes'] / 2**20:8.0f} MiB")
    bench.write_figures(cfg, figures, {"rates": rates})
    if cfg.out:
        del figures["about"]
        common.atomic_write(str(Path(cfg.out).with_suffix(".svg")), figure(figures))


def figure(figures: dict[str, dict]) -> str:
    """For each curve its time and its memory; theory, times its constant, dashed."""
    panels = []
    for name, found in figures.items():
        xs = [p["x"] for p in found["points"]]
        for what, values, unit in (
                ("time", [1000 * statistics.median(p["seconds"]) for p in found["points"]], "ms"),
                ("memory", [p["bytes"] / 2**20 for p in found["points"]], "MiB")):
            line = [p["theory_seconds"] * 1000 if what == "time" else p["theory_bytes"] / 2**20
                    for p in found["points"]]
            k = found[what]["constant"]
            band = [(p["x"], 1000 * min(p["seconds"]), 1000 * max(p["seconds"])) for p in found["points"]]
            panels.append(Panel(f"{what} against {name}", [
                Line(list(zip(xs, [k * v for v in line])), colour="#999999", label=f"theory x {k:.2g}", dashed=True),
                Line(list(zip(xs, values)), band if what == "time" else [], label="measured", dots=True)],
                x=found["axis"], y=unit, log=True, legend="low"))
    return grid(panels, columns=4, title="Growth on a CPU: measured, and theory with one constant a curve")
