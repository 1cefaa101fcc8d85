"""The certificates in their full form: what takes minutes, and the figures that the README states.

    optimum       PPO on the enumerable tree, at two prices of KL, whole models and adapters on one base, five seeds:
                  the regret against the closed-form optimum, by enumeration
    adaptive KL   the controller holds 1 and 2 nats with real PPO
    ceiling       the reward model against the accuracy that its labels allow (course/ceiling.py)
    randomwalks   three seeds (course/randomwalks.py)
    trlx          the same with trlx's own loss (course/peer_trlx.py), where --trlx names a checkout of it
    processes     the gradient of two processes (gloo) is that of one
    memory        a 7B PPO on one base and as four models, as --dry_run counts them
    certificates  the fast ones (course/certificates.py), with their figures

Each run is kept in docs/results/proof.json as soon as it is there; what is there is not run again.

    python course/proof.py                         # all parts                       (make proof)
    python course/proof.py --only optimum --again  # one part, anew
    python course/proof.py --trlx DIR              # with trlx's curve beside ours
"""
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import common  # noqa: E402
import memory  # noqa: E402
import ppo  # noqa: E402
from course import ceiling, certificates, figure, peer_trlx, randomwalks, tree  # noqa: E402
from model import ModelConfig  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


@dataclass
class Config:
    # --- proof ---
    only: tuple[str, ...] = ()         # parts; empty: all
    again: bool = False                # also those that proof.json holds
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    trlx: str = ""                     # a checkout of github.com/CarperAI/trlx, for its curve on randomwalks
    workers: int = 0                   # runs at a time; 0: as many as there are cores
    out_dir: str = str(RESULTS)


# ---------------------------------------------------------------- the known optimum

# Whole models take the steps of the anchor; adapters start from B = 0 and take larger ones.
LAYOUTS = {"separate models": {"lora_r": 0, "lr": 1e-3, "value_lr": 1e-3},
           "adapters on one base": {"lora_r": 8, "lr": 3e-3, "value_lr": 3e-3}}


def optimum(seed: int, beta: float, layout: str, steps: int = 60) -> dict:
    """The exact regret along one run; at the start the ratio is 1 and the KL 0."""
    torch.set_num_threads(1)
    cfg = tree.config(seed=seed, kl_coef=beta, steps=steps, **LAYOUTS[layout])
    history = tree.train(tree.build(cfg), cfg, every=4)
    return {"seed": seed, "beta": beta, "layout": layout, "first_gap": history[0]["val/first_ratio_gap"],
            "first_kl": history[0]["val/largest_kl"], "kl": history[-1]["exact/kl"],
            "regret": [[row["step"], row["exact/regret"]] for row in history if "exact/regret" in row]}


def held_kl(target: float, steps: int = 150) -> dict:
    """Mean KL of the last 30 updates under the adaptive controller."""
    torch.set_num_threads(1)
    cfg = tree.config(steps=steps, temperature=1.0, kl_coef=0.1, kl_target=target, kl_horizon=1000)
    history = tree.train(tree.build(cfg), cfg, every=steps)
    tail = history[-30:]
    return {"target": target, "kl": statistics.mean(row["objective/kl"] for row in tail),
            "beta": history[-1]["kl_coef"], "curve": [round(row["objective/kl"], 4) for row in history]}


# ---------------------------------------------------------------- two processes

def half(rank: int, size: int, folder: str) -> None:
    """One rank: whitening, counts and gradients over its share of a rollout that all of them know."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    cfg = tree.config(lora_r=8, ppo_epochs=1, grad_clip=0.0, micro_batch=5)
    with certificates.exact_arithmetic():
        roles = certificates.moved(certificates.double(tree.build(cfg)))
        whole = ppo.rollout(roles, tree.PROMPTS * 6, tree.TOKENIZER, cfg, torch.Generator().manual_seed(3))
        r = certificates.permuted(whole, torch.arange(rank, 24, size))
        world = common.World(torch.device("cpu"), torch.float32, rank, size)
        ppo.score(roles, r, cfg, world)
        _, _, advantages, returns = ppo.credit(r, cfg, cfg.kl_coef)
        found = torch.cat(certificates.gradients(roles, r, advantages, returns, cfg, world))
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def processes() -> dict[str, float]:
    """The gradients of two processes with 12 answers each against one with 24, in fp64."""
    with tempfile.TemporaryDirectory() as folder:
        half(0, 1, folder)
        torch.multiprocessing.spawn(half, (2, folder), nprocs=2)
        one, first, second = (torch.load(f"{folder}/{name}.pt") for name in ("1-0", "2-0", "2-1"))
    below, distance = certificates.below, certificates.distance
    return {"two against one": below("two processes against one", distance(first, one), 1e-9),
            "between the two": below("first against second", distance(second, first), 0.0)}


# ---------------------------------------------------------------- memory

LLAMA2_7B = ModelConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32)


def memory_of_7b() -> dict[str, float]:
    """GB that stay for the whole run, Llama-2-7B with rank 16. By hand: 6.738 B parameters in bf16, two adapters of
    40 M with 16 bytes a number (weight, gradient, two moments) and the reward's in fp32: 13.48 + 2 * 0.64 + 0.16."""
    table = memory.estimate(LLAMA2_7B, "ppo", batch=1, prompt=64, response=64, rollout=1, dtype=torch.bfloat16,
                            device="cuda")
    return {"one base": table.static / 1e9, **{what: n / 1e9 for what, n in table.compare}}


# ---------------------------------------------------------------- the parts

def parts(cfg: Config) -> dict:
    """{part: [(function, arguments)]}: every run may go to another core."""
    return {"certificates": [(fast, (name,)) for name in certificates.FAST],
            "processes": [(processes, ())],
            "memory": [(memory_of_7b, ())],
            "optimum": [(optimum, (seed, beta, layout)) for layout in LAYOUTS for beta in (0.3, 0.1)
                        for seed in cfg.seeds],
            "adaptive KL": [(held_kl, (target,)) for target in (1.0, 2.0)],
            "randomwalks": [(walks, (seed,)) for seed in cfg.seeds[:3]],
            "trlx": [(their_walks, (cfg.trlx, seed)) for seed in cfg.seeds[:3] if cfg.trlx],
            "ceiling": [(learned, (pairs, k)) for pairs, k in ((2000, 2), (10000, 2), (40000, 2), (100000, 2),
                                                               (100000, 4))]}


def fast(name: str) -> dict:
    return {"name": name, **certificates.FAST[name]()}


def walks(seed: int) -> dict:
    torch.set_num_threads(1)
    return {"seed": seed, "optimality": [round(x, 4) for x in randomwalks.train(seed)]}


def their_walks(checkout: str, seed: int) -> dict:
    torch.set_num_threads(1)
    return {"seed": seed, "optimality": [round(x, 4) for x in peer_trlx.train(checkout, seed)]}


def learned(pairs: int, k: int) -> dict:
    torch.set_num_threads(1)
    return {"pairs": pairs, "k": k, **ceiling.run(pairs, k)}


def walked(rows: list[dict]) -> tuple[float, float, float]:
    """Mean optimality at the start, and what every seed has reached (mean of five updates) within 60 and within 100."""
    curves = [r["optimality"] for r in rows]
    return (statistics.mean(c[0] for c in curves),
            *(min(max(statistics.mean(c[i - 5:i]) for i in range(5, n + 1)) for c in curves) for n in (60, 100)))


def verdicts(found: dict) -> list[tuple[str, bool, str]]:
    """What the issue asks, part by part."""
    checks = []
    for layout, beta in dict.fromkeys((r["layout"], r["beta"]) for r in found.get("optimum", [])):
        ends = [r["regret"][-1][1] for r in found["optimum"] if (r["layout"], r["beta"]) == (layout, beta)]
        checks.append((f"regret, {layout}, beta {beta}", max(ends) <= 0.02, f"{max(ends):.4f} at most of {len(ends)}"))
    for r in found.get("adaptive KL", []):
        checks.append((f"KL held at {r['target']:g}", abs(r["kl"] / r["target"] - 1) <= 0.05, f"{r['kl']:.3f}"))
    if "randomwalks" in found:
        start, at60, at100 = walked(found["randomwalks"])
        checks += [("randomwalks begin low", start <= 0.40, f"{start:.3f}"),
                   ("within 60 updates", at60 >= 0.98, f"{at60:.3f}"),
                   ("within 100 updates", at100 >= 0.99, f"{at100:.3f}")]
    if found.get("trlx"):
        checks.append(("trlx's loss beside it", True, " -> ".join(f"{x:.3f}" for x in walked(found["trlx"]))))
    if "ceiling" in found:
        table = {(r["pairs"], r["k"]): r for r in found["ceiling"]}
        most, grown = table[100000, 2], [r["accuracy"] for (_, k), r in sorted(table.items()) if k == 2]
        checks += [("reward model near its ceiling", most["accuracy"] >= 0.79 and most["pearson"] >= 0.93,
                    f"accuracy {most['accuracy']:.3f} of {most['ceiling']:.3f}, Pearson {most['pearson']:.3f}"),
                   ("better with more data", grown == sorted(grown), " < ".join(f"{x:.3f}" for x in grown)),
                   ("K = 4 beats pairs", table[100000, 4]["accuracy"] >= most["accuracy"],
                    f"{table[100000, 4]['accuracy']:.3f}")]
    if "memory" in found:
        one, four, whole = found["memory"][0].values()
        checks.append(("7B on one base", abs(one - 14.92) < 0.05, f"{one:.2f} GB; four copies {four:.1f}, trained "
                       f"whole {whole:.1f}"))
    return checks


def table(result: dict) -> str:
    found = result["parts"]
    lines = ["# The proof", "", f"Made by `make proof`, torch {result['torch']}, {result['machine']}. The machine was "
             "busy with other work: wall times are upper bounds.", "", "| what | figure | |", "|---|---|---|"]
    lines += [f"| {name} | {text} | {'pass' if ok else '**FAIL**'} |" for name, ok, text in verdicts(found)]
    for name, rows in found.items():
        lines += ["", f"## {name}", "", f"{result['seconds'][name]:.0f} s, {result['dates'][name]}", ""]
        for row in rows:
            shown = {k: v[-1] if isinstance(v, list) else v for k, v in row.items()}
            shown = {k: v[-1] if isinstance(v, list) else v for k, v in shown.items()}
            lines.append("- " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                          for k, v in shown.items()))
    return "\n".join(lines) + "\n"


def draw(found: dict) -> str:
    """Regret of every run on the tree, the held KL, the reward model under its ceiling, randomwalks."""
    panels = []
    for layout, beta in dict.fromkeys((r["layout"], r["beta"]) for r in found.get("optimum", [])):
        curves = [r["regret"] for r in found["optimum"] if (r["layout"], r["beta"]) == (layout, beta)]
        lines = [figure.Line([tuple(p) for p in c]) for c in curves]
        last = max(x for c in curves for x, _ in c)
        panels.append(figure.Panel(f"{layout}, beta {beta}", [*lines, figure.Line([(0, 0.02), (last, 0.02)],
                                                                                  colour="#c0392b", dashed=True)],
                                   "updates", "regret (dashed: 0.02)", 0.0, 0.3))
    if "adaptive KL" in found:
        lines = [figure.Line(list(enumerate(r["curve"])), label=f"target {r['target']:g}", colour=c)
                 for r, c in zip(found["adaptive KL"], ("#2c6fbb", "#2e8b57"))]
        lines += [figure.Line([(0, r["target"]), (len(r["curve"]), r["target"])], colour="#8a8a8a", dashed=True)
                  for r in found["adaptive KL"]]
        panels.append(figure.Panel("adaptive KL", lines, "updates", "nats per answer"))
    if "ceiling" in found:
        rows = [r for r in found["ceiling"] if r["k"] == 2]
        xs = [torch.tensor(float(r["pairs"])).log10().item() for r in rows]
        panels.append(figure.Panel("reward model under its ceiling", [
            figure.Line(list(zip(xs, (r["accuracy"] for r in rows))), dots=True, label="accuracy"),
            figure.Line(list(zip(xs, (r["ceiling"] for r in rows))), colour="#8a8a8a", dashed=True, label="ceiling"),
            figure.Line([(xs[-1], r["accuracy"]) for r in found["ceiling"] if r["k"] == 4], colour="#c0392b",
                        dots=True, label="K = 4")], "log10 of pairs", "held-out labels"))
    if "randomwalks" in found:
        lines = [figure.Line(list(enumerate(r["optimality"], 1)), colour=colour, label=label if not i else "")
                 for name, colour, label in (("trlx", "#c0392b", "trlx's loss"), ("randomwalks", "#2c6fbb", "ours"))
                 for i, r in enumerate(found.get(name, []))]
        panels.append(figure.Panel("randomwalks, three seeds", lines, "updates", "optimality", 0.0, 1.0,
                                   legend="bottom"))
    return figure.grid(panels, 4, "Against known answers") if panels else ""


def main(cfg: Config) -> bool:
    warnings.simplefilter("ignore")
    file = Path(cfg.out_dir) / "proof.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"parts": {}, "seconds": {}, "dates": {}}
    result |= json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    result |= {"torch": torch.__version__, "machine": f"{os.cpu_count()} cores of {platform.machine()}"}
    for name, jobs in parts(cfg).items():
        if cfg.only and name not in cfg.only:
            continue
        if cfg.again:
            result["parts"].pop(name, None)
        rows = result["parts"].setdefault(name, [])
        if len(rows) >= len(jobs):
            continue
        began, before = time.perf_counter(), result["seconds"].get(name, 0.0) if rows else 0.0
        workers = min(cfg.workers or os.cpu_count() or 1, len(jobs))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for job in [pool.submit(function, *given) for function, given in jobs[len(rows):]]:
                rows.append(job.result())
                result["seconds"][name] = before + time.perf_counter() - began
                result["dates"][name] = time.strftime("%Y-%m-%d")
                common.atomic_write(file, json.dumps(result) + "\n")
        print(f"{name}: {len(jobs)} runs, {result['seconds'][name]:.0f} s", flush=True)
    common.atomic_write(file.with_suffix(".md"), table(result))
    common.atomic_write(file.with_suffix(".svg"), draw(result["parts"]))
    return common.gate("proof", verdicts(result["parts"]))


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
