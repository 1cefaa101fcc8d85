"""Our kernels beside what a user would pick instead, in one run on one card.

    python -m kernels.bench                                   every row; --minutes bounds the whole
    python -m kernels.bench --ops attention,decode --minutes 3 --json out/attention.json
    python -m kernels.bench --tune attention                  times tile sizes and prints the table's best lines

A row is an operation at one shape in one direction; its columns are providers: ours, plain PyTorch, torch.compile,
Liger, TRL, CCE, the variants of SDPA, FlexAttention. What is not installed is a dash. Providers take turns, each on its
own copy of the same random numbers:

    sleep 1 ms | write 256 MB | start | step | stop       the sleep lets the host run ahead, so that its pace does not
                                                          count; the write empties the cache. The median of the turns
                                                          is the GPU time; wall is the time of eager calls in a row.

Before it is timed each provider is compared with a reference in fp32: ||x - ref|| / ||ref||, the worst of the outputs
and gradients. A wrong one of ours fails the run. `floor` is the larger of FLOPs / (a large matrix product's rate) and
bytes / (a large copy's rate), both measured first; `share` is floor / ours; `ratio` is the best correct peer / ours:
above 1 we win.

Rows run in a child process. If one hangs or takes the card's context down, it is noted and the next child goes on.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import bench_more, bench_rows
from kernels.bench_rows import Row

ROW_SECONDS = 75.0                     # a row with its compilations; then its child is ended
TURNS = (5, 25)                        # at least, at most
TURN_SECONDS = 1.2                     # all turns of a row together, once there are enough
WRONG = 2e-2                           # bf16 against fp32: rounding is below 1e-2


# ---------------------------------------------------------------- measuring

def median_gpu_ms(steps: dict[str, Callable], flush: torch.Tensor) -> dict[str, dict]:
    """Interleaved turns of all providers: {name: {"ms", "low", "high", "turns"}}."""
    times, start = {name: [] for name in steps}, time.perf_counter()
    for turn in range(TURNS[1]):
        if turn >= TURNS[0] and time.perf_counter() - start > TURN_SECONDS:
            break
        for name, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)
            flush.zero_()
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: {"ms": statistics.median(t), "low": min(t), "high": max(t), "turns": len(t)}
            for name, t in times.items()}


def wall_ms(step: Callable) -> float:
    """Eager calls back to back, as a training loop makes them."""
    torch.cuda.synchronize()
    n, start = 0, time.perf_counter()
    while n < 3 or (time.perf_counter() - start < 0.05 and n < 200):
        step()
        n += 1
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n * 1e3


def peak_mib(step: Callable) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def distance(got: tuple, expected: tuple) -> float:
    worst = 0.0
    for a, b in zip(got, expected):
        a, b = a.detach().float(), b.detach().float()
        if a.shape != b.shape:
            return float("nan")
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-30)))
        if worst != worst:
            return worst
    return worst


def calibrate() -> dict:
    """The two ceilings of this card: bytes a second of a copy, FLOPs a second of a bf16 product."""
    x = torch.randn(2 ** 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flush = torch.empty(2 ** 28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        y.copy_(x), a @ b
    ms = median_gpu_ms({"copy": lambda: y.copy_(x), "product": lambda: a @ b}, flush)
    return {"copy_bytes_per_s": 2 * x.nbytes / ms["copy"]["ms"] * 1e3,
            "product_flops_per_s": 2 * 8192 ** 3 / ms["product"]["ms"] * 1e3}


# ---------------------------------------------------------------- one row

def prepare(row: Row) -> tuple[dict, dict, dict]:
    """Steps that work, their errors against the reference, and what was said by those that do not."""
    data = row.inputs()
    expected = tuple(t.detach().float() for t in row.exact(data)) if row.exact else None
    steps, errors, notes = {}, {}, {}
    for name, make in row.providers.items():
        try:
            step = make(bench_rows.own(data))
            got = step()
            torch.cuda.synchronize()
            errors[name] = distance(got, expected) if expected is not None else None
            del got
            for _ in range(2):
                step()
            torch.cuda.synchronize()
            steps[name] = step
        except ImportError as e:
            notes[name] = f"not installed: {e}"
        except Exception as e:                                               # a peer's failure is a result too
            notes[name] = f"{type(e).__name__}: {str(e)[:300]}"
            torch.cuda.synchronize()                                         # raises if the context is gone: child ends
    return steps, errors, notes


def measure(row: Row, ceilings: dict, flush: torch.Tensor) -> dict:
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    steps, errors, notes = prepare(row)
    out = median_gpu_ms(steps, flush)
    for name, step in steps.items():
        out[name] |= {"wall_ms": wall_ms(step), "peak_mib": peak_mib(step), "error": errors[name]}
    floor = max(row.flops / ceilings["product_flops_per_s"], row.bytes / ceilings["copy_bytes_per_s"]) * 1e3
    result = {"row": row.name, "flops": row.flops, "bytes": row.bytes, "floor_ms": floor, "providers": out,
              "notes": notes}
    right = {n: p["ms"] for n, p in out.items() if n != "ours" and (p["error"] is None or p["error"] < WRONG)}
    if "ours" in out:
        result |= {"share": floor / out["ours"]["ms"]}
        if right:
            best = min(right, key=right.get)
            result |= {"best_peer": best, "ratio": right[best] / out["ours"]["ms"]}
    return result


def child(names: list[str], path: Path, ceilings: dict) -> None:
    """Runs rows and appends a line when one begins and when it ends."""
    flush = torch.empty(2 ** 28, dtype=torch.int8, device="cuda")
    rows = {row.name: row for row in all_rows()}
    with path.open("a", encoding="utf-8") as file:
        for name in names:
            print(json.dumps({"begin": name}), file=file, flush=True)
            try:
                print(json.dumps(measure(rows[name], ceilings, flush)), file=file, flush=True)
            except Exception as e:
                note = f"{type(e).__name__}: {str(e)[:500]}"
                print(json.dumps({"row": name, "failed": note}), file=file, flush=True)
                torch.cuda.synchronize()


# ---------------------------------------------------------------- all rows

class Progress(NamedTuple):
    done: list[dict]
    running: str | None


def progress(path: Path) -> Progress:
    done, running = [], None
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        entry = json.loads(line)
        running = entry.get("begin")
        done += [] if running else [entry]
    return Progress(done, running)


def run_rows(names: list[str], path: Path, ceilings: dict, deadline: float) -> None:
    """Children, one after the other, until every row has an answer or the time is over."""
    while time.time() < deadline:
        before = {entry["row"] for entry in progress(path).done}
        left = [name for name in names if name not in before]
        if not left:
            return
        command = [sys.executable, "-m", "kernels.bench", "--child", json.dumps([left, str(path), ceilings])]
        process, seen, since = subprocess.Popen(command, start_new_session=True), (len(before), None), time.time()
        while process.poll() is None:
            time.sleep(0.3)
            now = progress(path)
            if (len(now.done), now.running) != seen:
                seen, since = (len(now.done), now.running), time.time()
                if now.done:
                    show(now.done[-1])
            if time.time() - since > ROW_SECONDS or time.time() > deadline:
                os.killpg(process.pid, signal.SIGKILL)                       # its own group: compilers' workers too
                process.wait()
        now = progress(path)
        if now.running or len(now.done) == len(before):                      # no row finished: do not try it again
            with path.open("a", encoding="utf-8") as file:
                why = "out of time" if time.time() > deadline else f"child ended with {process.returncode}"
                print(json.dumps({"row": now.running or left[0], "failed": why}), file=file, flush=True)


SHOWN = set()


def show(entry: dict) -> None:
    """One line a row."""
    if entry["row"] in SHOWN:
        return
    SHOWN.add(entry["row"])
    if "failed" in entry:
        return print(f"{entry['row']:46} FAILED {entry['failed'][:150]}", flush=True)
    columns = [f"{name} {p['ms']:.3f}" + ("!" if (p["error"] or 0) >= WRONG or p["error"] != p["error"] else "")
               for name, p in entry["providers"].items()]
    columns += [f"{name} -" for name in entry["notes"]]
    ours = entry["providers"].get("ours")
    end = f"ratio {entry.get('ratio', 0):.2f}  share {entry['share']:.2f}  wall {ours['wall_ms']:.3f}" if ours else ""
    print(f"{entry['row']:46} {'  '.join(columns)}  {end}", flush=True)


def all_rows() -> list[Row]:
    """In order of value: when the time ends, the last ones are missing."""
    return [*(first := bench_rows.rows())[:16], *bench_more.rows(), *first[16:]]


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench")
    parser.add_argument("--ops", default="", help="first words of the rows' names, with commas between them")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row is begun or finished behind it")
    parser.add_argument("--json", default="", help="where the results go; none: printed only")
    parser.add_argument("--list", action="store_true", help="the rows' names, no card needed")
    parser.add_argument("--tune", default="", choices=["", "attention"], help="time tile sizes instead")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")                   # triton 3.10 turns it off by default
    if args.child:
        names, path, ceilings = json.loads(args.child)
        return child(names, Path(path), ceilings)
    ops = tuple(op for op in args.ops.split(",") if op)
    names = [row.name for row in all_rows() if not ops or row.name.startswith(ops)]
    if args.list:
        return print("\n".join(names))
    if not torch.cuda.is_available():
        sys.exit("kernels.bench needs an NVIDIA GPU; `--list` shows its rows")
    deadline = time.time() + 60 * args.minutes
    meta = {"device": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(),
            "command": "python -m kernels.bench " + " ".join(sys.argv[1:]),
            "versions": {n: version(n) for n in ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy")},
            **calibrate()}
    print(f"{meta['device']}, torch {meta['versions']['torch']}, triton {meta['versions']['triton']}: copy "
          f"{meta['copy_bytes_per_s'] / 1e12:.2f} TB/s, product {meta['product_flops_per_s'] / 1e12:.0f} TFLOP/s; ms",
          flush=True)
    torch.cuda.empty_cache()
    if args.tune:
        found = bench_rows.tune_attention(deadline, median_gpu_ms, distance)
        if args.json:
            Path(args.json).write_text(json.dumps({**meta, "tune": found}, indent=1), encoding="utf-8")
        return
    path = Path(args.json + ".lines" if args.json else f"/tmp/kernels-bench-{os.getpid()}.lines")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    run_rows(names, path, meta, deadline)
    done = progress(path).done
    for entry in done:
        show(entry)
    if args.json:
        Path(args.json).write_text(json.dumps({**meta, "rows": done}, indent=1), encoding="utf-8")
        path.unlink()
    wrong = [e["row"] for e in done if "failed" in e or "ours" not in e["providers"]
             or not (e["providers"]["ours"]["error"] or 0) < WRONG]
    missing = sorted(set(names) - {e["row"] for e in done})
    if wrong or missing:
        sys.exit(f"wrong or failed: {wrong or 'none'}; no time for: {missing or 'none'}")


if __name__ == "__main__":
    main()
