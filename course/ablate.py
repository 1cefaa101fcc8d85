"""What does this detail of PPO do? Sweeps of one setting at a time where the answer is known, several seeds each.

    on tree          regret against the closed-form optimum (course/tree.py): 0 is perfect
    on randomwalks   optimality of the paths (course/randomwalks.py): 1 is perfect
    on language      the gold reward behind a learned one (course/goodhart.py), in std of the first model's answers

    python course/ablate.py --seeds 5 --switch whiten,value_clip,kl_kind        # -> out/ablate/tree.svg, .md, .json
    python course/ablate.py --on randomwalks --switch all --steps 60
    python course/ablate.py --switch greedy_rollouts,mean_of_means              # a bug of the zoo is a switch too
    python course/ablate.py --list                                              # what can be switched
"""
import contextlib
import json
import os
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

import checkpoints  # noqa: E402
import common  # noqa: E402
import reward as reward_stage  # noqa: E402
from course import bugs, figure, goodhart, randomwalks, tree  # noqa: E402

# name: (what it says, settings of ppo.py, bug of the zoo that is put in); the usual setting is drawn behind each.
SWITCHES: dict[str, tuple[str, dict, str | None]] = {
    "whiten": ("advantages as they are", {"whiten": False}, None),
    "whiten_rewards": ("rewards scaled to std 1", {"whiten_rewards": True}, None),
    "clip": ("no clip of the ratio", {"clip": 1e9}, None),
    "value_clip": ("no clip of the value", {"value_clip": 1e9}, None),
    "kl_kind": ("k3 in the reward", {}, "k3_in_reward"),
    "lam": ("lambda 1 instead of 0.95", {"lam": 1.0}, None),
    "gamma": ("gamma 0.9 instead of 1", {"gamma": 0.9}, None),
    "epochs": ("one pass over a rollout, not four", {"ppo_epochs": 1}, None),
    "minibatches": ("four minibatches a pass", {"minibatches": 4, "micro_batch": 64}, None),
    "grad_clip": ("no clip of the gradient", {"grad_clip": 0.0}, None),
    "schedule": ("constant learning rate", {"schedule": "constant"}, None),
    "value_warmup": ("five updates of the value first", {"value_warmup": 5}, None),
    "missing_eos": ("answers without an end as judged", {"missing_eos": None}, None),
    "reward_clip": ("scores cut to +- 1", {"reward_clip": 1.0}, None),
    "kl_target": ("beta adapts, to 2 nats", {"kl_target": 2.0, "kl_horizon": 1000}, None),
    "batch": ("a quarter of the answers", {"batch_size": 64, "micro_batch": 64}, None)}
BUGS = {name: ("a bug of the zoo", {}, name) for name, bug in bugs.BUGS.items() if bug.stage == "ppo"}


@dataclass
class Config:
    # --- sweep ---
    on: str = "tree"                   # tree | randomwalks | language
    switch: tuple[str, ...] = ("whiten", "value_clip", "kl_kind")      # names below, or all
    seeds: int = 5                     # of each setting
    steps: int = 40                    # updates
    list: bool = False                 # print what can be switched and stop
    workers: int = 0                   # runs at a time; 0: as many as there are cores
    out_dir: str = "out/ablate"


def on_tree(seed: int, steps: int, changes: dict) -> list[list[float]]:
    run = tree.config(**{"seed": seed, "steps": steps, **changes})
    return [[row["step"], row["exact/regret"]] for row in tree.train(tree.build(run), run, every=2)
            if "exact/regret" in row]


def on_randomwalks(seed: int, steps: int, changes: dict) -> list[list[float]]:
    return [[i + 1, x] for i, x in enumerate(randomwalks.train(seed, steps, **changes))]


def on_language(seed: int, steps: int, changes: dict) -> list[list[float]]:
    model = goodhart.fine_tune(seed)
    pairs, _ = goodhart.label(model, 2000, seed + 11)
    r = goodhart.sample(model, goodhart.PROMPTS * 100, torch.Generator().manual_seed(seed + 5))
    truth = goodhart.gold_rows(r.ids, r.mask, r.response)
    with tempfile.TemporaryDirectory() as name:
        checkpoints.save(model, None, Path(name) / "sft")
        reward_stage.save(goodhart.learn_reward(model, pairs, seed), None, Path(name) / "proxy", base=f"{name}/sft")
        history, _ = goodhart.climb(Path(name), "proxy", 0.05, goodhart.Config(steps=steps), seed, **changes)
    return [[row["step"] + 1, (row["gold"] - float(truth.mean())) / float(truth.std())] for row in history]


WORLDS = {"tree": (on_tree, "regret"), "randomwalks": (on_randomwalks, "optimality"), "language": (on_language, "gold")}


def one(world: str, seed: int, steps: int, changes: dict, bug: str | None) -> list[list[float]]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with bugs.inject(bug) if bug else contextlib.nullcontext():
        return WORLDS[world][0](seed, steps, changes)


def band(curves: list[list[list[float]]], colour: str, label: str) -> figure.Line:
    columns = [(points[0][0], [y for _, y in points]) for points in zip(*curves)]
    return figure.Line([(x, statistics.median(ys)) for x, ys in columns], [(x, min(ys), max(ys)) for x, ys in columns],
                       colour, label)


def end(curve: list[list[float]]) -> float:
    """Mean of the last tenth."""
    return statistics.mean(y for _, y in curve[-max(1, len(curve) // 10):])


def main(cfg: Config) -> bool:
    if cfg.list:
        print("\n".join(f"{name:24} {what}" for name, (what, _, _) in (SWITCHES | BUGS).items()))
        return True
    if cfg.on not in WORLDS:
        raise common.UserError(f"--on {cfg.on} is not known; known: {', '.join(WORLDS)}")
    known, names = SWITCHES | BUGS, list(SWITCHES) if "all" in cfg.switch else list(cfg.switch)
    if unknown := [name for name in names if name not in known]:
        raise common.UserError(f"--switch {unknown[0]} is not known; known: all, {', '.join(known)}")
    jobs = [("as it is", {}, None), *((name, *known[name][1:]) for name in names)]
    began, runs = time.perf_counter(), {}
    with ProcessPoolExecutor(cfg.workers or os.cpu_count() or 1, get_context("spawn")) as pool:
        waiting = {name: [pool.submit(one, cfg.on, seed, cfg.steps, changes, bug) for seed in range(cfg.seeds)]
                   for name, changes, bug in jobs}
        for name, futures in waiting.items():
            runs[name] = [future.result() for future in futures]
            ends = [end(curve) for curve in runs[name]]
            print(f"{name:16} {WORLDS[cfg.on][1]} {statistics.median(ends):.4f}   {min(ends):.4f} .. {max(ends):.4f}",
                  flush=True)
    lines = [f"# Ablations on {cfg.on}", "", f"Made by `python {' '.join(sys.argv)}`, {time.strftime('%Y-%m-%d')}, "
             f"torch {torch.__version__}, {time.perf_counter() - began:.0f} s: {WORLDS[cfg.on][1]} at the end of "
             f"{cfg.steps} updates, median and range of {cfg.seeds} seeds.", "", "| switch | what | median | range |",
             "|---|---|---|---|"]
    for name, curves in runs.items():
        ends = [end(curve) for curve in curves]
        lines.append(f"| {name} | {known.get(name, ('',))[0]} | {statistics.median(ends):.4f} | {min(ends):.4f} .. "
                     f"{max(ends):.4f} |")
    usual = runs["as it is"]
    panels = [figure.Panel(name, [band(usual, "#2c6fbb", "as it is"), band(runs[name], "#c0392b", "switched")],
                           "updates", known[name][0]) for name in names]
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rounded = {name: [[[x, round(y, 5)] for x, y in curve] for curve in curves] for name, curves in runs.items()}
    common.atomic_write(out / f"{cfg.on}.json", json.dumps({"on": cfg.on, "steps": cfg.steps, "runs": rounded}) + "\n")
    common.atomic_write(out / f"{cfg.on}.md", "\n".join(lines) + "\n")
    common.atomic_write(out / f"{cfg.on}.svg", figure.grid(panels, 4, f"{WORLDS[cfg.on][1]} on {cfg.on}, one detail "
                                                           f"at a time: median and range of {cfg.seeds} seeds"))
    print(f"figure: {out / f'{cfg.on}.svg'}   table: {out / f'{cfg.on}.md'}")
    return True


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
