"""The certificates in their full form: what takes minutes, and the figures that the README states.

    optimum       PPO on the enumerable tree: whole models and adapters on one base, paid by the true reward and by a
                  learned reward model, at two prices of KL, five seeds: the regret against the closed-form optimum
    adaptive      the controller holds 1 and 2 nats with real PPO
    ceiling       the reward model against the accuracy that its labels allow (course/ceiling.py)
    randomwalks   three seeds (course/randomwalks.py)
    trlx          the same with trlx's own loss (course/peer_trlx.py), where --trlx names a checkout of it
    processes     the gradient of two processes (gloo) is that of one
    memory        a 7B PPO on one base and as four models, as --dry_run counts them, against arithmetic by hand
    certificates  the fast ones (course/certificates.py), with their figures

Everything is run whenever this is called. A run that was interrupted goes on where it was, unless the code has changed.
Parts that are left out keep the record that docs/results/proof.json has of them, with its date, torch and code.

    python course/proof.py                         # all parts                       (make proof)
    python course/proof.py --only optimum          # one part
    python course/proof.py --trlx DIR              # with trlx's curve beside ours
"""
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import common  # noqa: E402
import memory  # noqa: E402
import ppo  # noqa: E402
from course import ceiling, certificates, figure, peer_trlx, randomwalks, record, tree  # noqa: E402
from model import ModelConfig  # noqa: E402

RESULTS = record.ROOT / "docs" / "results"


@dataclass
class Config:
    # --- proof ---
    only: tuple[str, ...] = ()         # parts; empty: all
    seeds: tuple[int, ...] = (30, 31, 32, 33, 34)      # 0 to 24 are those that settings and thresholds were made with
    trlx: str = ""                     # a checkout of github.com/CarperAI/trlx, for its curve on randomwalks
    workers: int = 0                   # runs at a time; 0: as many as there are cores
    out_dir: str = str(RESULTS)


# ---------------------------------------------------------------- the known optimum

# The value learns twice as fast as the policy. With equal rates, in either layout, one seed of some fifteen at beta 0.1
# was certain of a second-best answer before it had drawn the best one, and stayed there.
LAYOUTS = {"separate models": {"lora_r": 0, "lr": 5e-4, "value_lr": 1e-3, "steps": 90},
           "adapters on one base": {"lora_r": 8, "lr": 1.5e-3, "value_lr": 3e-3, "steps": 90}}


def optimum(seed: int, beta: float, layout: str, judge: str) -> dict:
    """The exact regret along one run; at the start the ratio is 1 and the KL 0. Where the judge is learned, on one base
    an adapter beside the other three, the optimum is that of what it says; the true reward is kept beside it."""
    cfg = tree.config(seed=seed, kl_coef=beta, **LAYOUTS[layout])
    history = tree.train(tree.build(cfg, learned=judge == "learned"), cfg, every=4)
    first, last = history[0], history[-1]
    return {"seed": seed, "beta": beta, "layout": layout, "judge": judge, "first_gap": first["val/first_ratio_gap"],
            "first_kl": first["val/largest_kl"], "kl": last["exact/kl"], "gold": last["exact/gold"],
            "regret": [[row["step"], row["exact/regret"]] for row in history if "exact/regret" in row]}


def held_kl(seed: int, target: float, steps: int = 300) -> dict:
    """Mean KL of the last 100 updates under the adaptive controller, which swings about its target with a period of
    about 40."""
    cfg = tree.config(seed=seed, steps=steps, temperature=1.0, kl_coef=0.1, kl_target=target, kl_horizon=1000)
    history = tree.train(tree.build(cfg), cfg, every=steps)
    return {"seed": seed, "target": target, "kl": statistics.mean(row["objective/kl"] for row in history[-100:]),
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

def memory_of_7b() -> dict[str, float]:
    """GB that stay for the whole run, Llama-2-7B with rank 16: as --dry_run counts them, and by hand. A weight that is
    trained takes 16 bytes (weight, gradient, Adam's two moments, all fp32), a frozen one of the base 2 and of the
    reward's adapter 4; heads of 4097 numbers are left out."""
    V, C, F, L, r = 32000, 4096, 11008, 32, 16
    config = ModelConfig(vocab_size=V, hidden_size=C, intermediate_size=F, num_layers=L, num_heads=32)
    found = memory.estimate(config, "ppo", batch=1, prompt=64, response=64, rollout=1, dtype=torch.bfloat16,
                            device="cuda")
    n = 2 * V * C + L * (4 * C * C + 3 * C * F + 2 * C) + C                # embedding and head, layers, last norm
    adapter = L * r * (4 * (C + C) + 3 * (C + F))
    four, whole = (size for _, size in found.compare)
    return {"one base": found.static / 1e9, "by hand": (2 * n + (2 * 16 + 4) * adapter) / 1e9,
            "by hand, reward in bf16": (2 * n + (2 * 16 + 2) * adapter) / 1e9,
            "four bf16 copies": four / 1e9, "four by hand": 4 * 2 * n / 1e9,
            "two trained whole": whole / 1e9, "two by hand": (2 * 16 + 2 * 2) * n / 1e9}


# ---------------------------------------------------------------- the parts

def parts(cfg: Config) -> dict:
    """{part: [(function, arguments)]}: every run may go to another core."""
    return {"certificates": [(fast, (name,)) for name in certificates.FAST],
            "processes": [(processes, ())],
            "memory": [(memory_of_7b, ())],
            "optimum": [(optimum, (seed, beta, layout, judge)) for layout in LAYOUTS for judge in ("true", "learned")
                        for beta in (0.3, 0.1) for seed in cfg.seeds],
            "adaptive": [(held_kl, (seed, target)) for target in (1.0, 2.0) for seed in cfg.seeds[:3]],
            "randomwalks": [(walks, (seed,)) for seed in cfg.seeds[:3]],
            "trlx": [(their_walks, (cfg.trlx, seed)) for seed in cfg.seeds[:3] if cfg.trlx],
            "ceiling": [(learned, (pairs, k)) for pairs, k in ((2000, 2), (10000, 2), (40000, 2), (100000, 2),
                                                               (100000, 4))]}


def fast(name: str) -> dict:
    return {"name": name, **certificates.FAST[name]()}


def walks(seed: int) -> dict:
    return {"seed": seed, "fine-tuned": randomwalks.measure(seed),
            "optimality": [round(x, 4) for x in randomwalks.train(seed)]}


def their_walks(checkout: str, seed: int) -> dict:
    return {"seed": seed, "optimality": [round(x, 4) for x in peer_trlx.train(checkout, seed)]}


def learned(pairs: int, k: int) -> dict:
    return {"pairs": pairs, "k": k, **ceiling.run(pairs, k)}


def within(curve: list[float], n: int) -> float:
    """The best mean of five updates in a row among the first n."""
    return max(statistics.mean(curve[i - 5:i]) for i in range(5, n + 1))


def settings(found: dict) -> dict[str, list[dict]]:
    """The runs on the tree, the seeds of one setting together."""
    groups: dict[str, list[dict]] = {}
    for r in found.get("optimum", []):
        groups.setdefault(f"{r['layout']}, {r['judge']} reward, beta {r['beta']}", []).append(r)
    return groups


def verdicts(found: dict) -> list[tuple[str, bool, str]]:
    """What must hold, part by part; of several seeds the worst."""
    checks = []
    for setting, rows in settings(found).items():
        ends = {r["seed"]: r["regret"][-1][1] for r in rows}
        checks.append((f"regret, {setting}", max(ends.values()) <= 0.02,
                       f"at most {max(ends.values()):.4f}, seeds {', '.join(map(str, ends))}"))
    if rows := found.get("optimum"):
        gap, first = (max(r[what] for r in rows) for what in ("first_gap", "first_kl"))
        checks.append(("before the first step ratio 1 and KL 0", gap <= 1e-6 and first == 0,
                       f"log ratio {gap:.1g} and KL {first:.1g} at most"))
    for target in dict.fromkeys(r["target"] for r in found.get("adaptive", [])):
        held = [r["kl"] for r in found["adaptive"] if r["target"] == target]
        checks.append((f"KL held at {target:g}", all(abs(x / target - 1) <= 0.05 for x in held),
                       ", ".join(f"{x:.3f}" for x in held)))
    if rows := found.get("randomwalks"):
        start, last = max(r["fine-tuned"] for r in rows), min(statistics.mean(r["optimality"][-5:]) for r in rows)
        at60, at100 = (min(within(r["optimality"], n) for r in rows) for n in (60, 100))
        checks += [("randomwalks, fine-tuned", start <= 0.40, f"at most {start:.3f}, by {randomwalks.PATHS} paths"),
                   ("best five updates within 60", at60 >= 0.98, f"at least {at60:.3f}"),
                   ("best five updates within 100", at100 >= 0.99, f"at least {at100:.3f}; the last five {last:.3f}")]
    if rows := found.get("trlx"):
        best, last = (min(f(r["optimality"]) for r in rows) for f in (lambda c: within(c, 100),
                                                                      lambda c: statistics.mean(c[-5:])))
        checks.append(("with trlx's loss, for comparison", True, f"at least {best:.3f}; the last five {last:.3f}"))
    if "ceiling" in found:
        table = {(r["pairs"], r["k"]): r for r in found["ceiling"]}
        most, grown = table[100000, 2], [r["accuracy"] for (_, k), r in sorted(table.items()) if k == 2]
        checks += [("reward model near its ceiling", most["accuracy"] >= 0.79 and most["pearson"] >= 0.93,
                    f"accuracy {most['accuracy']:.3f} of {most['ceiling']:.3f}, Pearson {most['pearson']:.3f}"),
                   ("better with more data", grown == sorted(grown), " < ".join(f"{x:.3f}" for x in grown)),
                   ("K = 4 beats pairs", table[100000, 4]["accuracy"] >= most["accuracy"],
                    f"{table[100000, 4]['accuracy']:.3f}")]
    if "memory" in found:
        sizes = found["memory"][0]
        checks += [(f"7B, {what}", abs(sizes[what] / sizes[hand] - 1) < 0.001,
                    f"{sizes[what]:.2f} GB, by hand {sizes[hand]:.2f}") for what, hand in (
                        ("one base", "by hand"), ("four bf16 copies", "four by hand"),
                        ("two trained whole", "two by hand"))]
    if "certificates" in found:
        fast = {r["name"]: r for r in found["certificates"]}
        worst, slow = (max(fast["exact gradient"][f"{layout}, {what}"] for layout in ("whole models", "adapters"))
                       for what in ("policy", "CPU seconds"))
        kinds = {name: (fast["KL estimators"][name], other) for name, other in certificates.ELSEWHERE.items()}
        checks += [("exact gradient in a second", worst <= 1e-8 and slow < 1, f"{worst:.1g} off, {slow:.2f} s"),
                   ("KL estimators as elsewhere", all(abs(x / y - 1) < 0.1 for x, y in kinds.values()),
                    ", ".join(f"{name} {x:.3f} ({y:g})" for name, (x, y) in kinds.items()))]
    return checks


def judge(recorded: dict) -> list[tuple[str, bool, str]]:
    return verdicts({name: part["rows"] for name, part in recorded.items()})


def table(recorded: dict) -> str:
    lines = ["# The proof", "", "Made by `make proof`.", "", "| what | figure | |", "|---|---|---|"]
    lines += [f"| {name} | {text} | {'pass' if ok else '**FAIL**'} |" for name, ok, text in judge(recorded)]
    for name, part in recorded.items():
        about = f"{part['date']}, torch {part['torch']}, {part['machine']}, code {part['code']}"
        lines += ["", f"## {name}", "", about, ""]
        for row in part["rows"]:
            shown = {k: v[-1] if isinstance(v, list) else v for k, v in row.items()}
            shown = {k: v[-1] if isinstance(v, list) else v for k, v in shown.items()}
            lines.append("- " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                          for k, v in shown.items()))
    return "\n".join(lines) + "\n"


def draw(found: dict) -> str:
    """Regret of every run on the tree, the held KL, the reward model under its ceiling, randomwalks."""
    panels = []
    for setting, rows in settings(found).items():
        lines = [figure.Line([tuple(p) for p in r["regret"]]) for r in rows]
        limit = figure.Line([(0, 0.02), (lines[0].points[-1][0], 0.02)], colour="#c0392b", dashed=True)
        short = setting.replace(" models", "").replace(" on one base", "")
        panels.append(figure.Panel(short, [*lines, limit], "updates", "regret (dashed: 0.02)", 0.0, 0.3))
    if "adaptive" in found:
        colours = dict(zip((1.0, 2.0), ("#2c6fbb", "#2e8b57")))
        lines = [figure.Line(list(enumerate(r["curve"])), colour=colours[r["target"]])
                 for r in found["adaptive"]]
        lines += [figure.Line([(0, r["target"]), (len(r["curve"]), r["target"])], colour="#8a8a8a", dashed=True)
                  for r in found["adaptive"]]
        panels.append(figure.Panel("adaptive KL", lines, "updates", "nats per answer"))
    if "ceiling" in found:
        rows = [r for r in found["ceiling"] if r["k"] == 2]
        xs = [torch.tensor(float(r["pairs"])).log10().item() for r in rows]
        panels.append(figure.Panel("reward model under its ceiling", [
            figure.Line(list(zip(xs, (r["accuracy"] for r in rows))), dots=True, label="accuracy"),
            figure.Line(list(zip(xs, (r["ceiling"] for r in rows))), colour="#8a8a8a", dashed=True, label="ceiling"),
            figure.Line([(xs[-1], r["accuracy"]) for r in found["ceiling"] if r["k"] == 4], colour="#c0392b",
                        dots=True, label="K = 4")], "log10 of pairs", "held-out labels", 0.7, 0.84, legend="bottom"))
    if "randomwalks" in found:
        lines = [figure.Line(list(enumerate(r["optimality"], 1)), colour=colour, label=label if not i else "")
                 for name, colour, label in (("trlx", "#c0392b", "trlx's loss"), ("randomwalks", "#2c6fbb", "ours"))
                 for i, r in enumerate(found.get(name, []))]
        panels.append(figure.Panel("randomwalks, three seeds", lines, "updates", "optimality", 0.0, 1.0,
                                   legend="bottom"))
    return figure.grid(panels, 4, "Against known answers") if panels else ""


def main(cfg: Config) -> bool:
    file = Path(cfg.out_dir) / "proof.json"
    fresh, recorded = record.run(file, parts(cfg), cfg.only, cfg.workers, record.stamp())
    common.atomic_write(file.with_suffix(".md"), table(recorded))
    common.atomic_write(file.with_suffix(".svg"), draw({name: part["rows"] for name, part in recorded.items()}))
    return common.gate("proof", judge(fresh))


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
