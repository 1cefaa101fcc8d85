"""What does this detail do? Sweeps of one setting at a time where the answer is known, several seeds each.

    on tree          PPO: regret against the closed-form optimum (course/tree.py): 0 is perfect
    on randomwalks   PPO: optimality of the paths (course/randomwalks.py): 1 is perfect
    on language      PPO: the gold reward behind a learned one (course/goodhart.py), in std of the first model's answers
    on sft           fine-tuning on that language: held-out loss per supervised token, by plain log-softmax
    on reward        the reward model of 2,000 labels there: accuracy on 4,000 held-out labels

A switch is relative to what is usual in its world: a quarter of the answers is 64 on the tree, 32 elsewhere. Where it
leaves every number as it was (a KL estimator where KL costs nothing) the table says so: such a curve shows nothing.

    python course/ablate.py --seeds 5 --switch whiten,value_clip,kl_kind        # -> out/ablate/tree.svg, .md, .json
    python course/ablate.py --on reward --switch all
    python course/ablate.py --switch greedy_rollouts,mean_of_means              # a bug of the zoo is a switch too
    python course/ablate.py --list                                              # what can be switched
"""
import contextlib
import functools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import bands  # noqa: E402
import checkpoints  # noqa: E402
import common  # noqa: E402
import ppo  # noqa: E402
import reward as reward_stage  # noqa: E402
from course import bugs, figure, goodhart, randomwalks, tree  # noqa: E402
from data import batch as data_batch  # noqa: E402
from reward import RewardModel  # noqa: E402


@dataclass(frozen=True)
class Switch:
    what: str                          # what is another than usual
    change: Callable = lambda usual: {}        # the usual Config of a world -> the fields that are others
    patches: Callable = dict           # -> what stands in for our functions, as in course/bugs.py


def other_eps() -> bugs.Patches:
    real = common.optimizer
    return {(common, "optimizer"): lambda *args, **options: real(*args, **{**options, "eps": 1e-8})}


def value_from_nothing() -> bugs.Patches:
    real = ppo.start_value
    return {(ppo, "start_value"): lambda value, reward: real(value, None)}


def small_head() -> bugs.Patches:
    """The misprint 1/(d + 1) of the standard deviation 1/sqrt(d + 1)."""
    def init(self, model, adapter=None):
        real(self, model, adapter)
        with torch.no_grad():
            self.head.weight /= math.sqrt(model.config.hidden_size + 1)
    real = RewardModel.__init__
    return {(RewardModel, "__init__"): init}


def rates(c) -> dict:
    """Fields that hold a learning rate."""
    return {name: getattr(c, name) for name in ("lr", "value_lr") if hasattr(c, name)}


SHARED = {                                                     # by all stages
    "lr": Switch("three times the learning rate", lambda c: {name: 3 * x for name, x in rates(c).items()}),
    "schedule": Switch("constant learning rate, or linear where it is constant", lambda c: {
        "schedule": "linear" if c.schedule == "constant" else "constant"}),
    "warmup": Switch("no warm-up, or ten steps of it where there is none", lambda c: {"warmup": 0 if c.warmup else 10}),
    "grad_clip": Switch("gradient cut to norm 1, or not where it is", lambda c: {
        "grad_clip": 0.0 if c.grad_clip else 1.0}),
    "batch": Switch("a quarter of the batch", lambda c: {"batch_size": c.batch_size // 4,
                                                         "micro_batch": c.batch_size // 4})}
FITTED = {                                                     # by the two stages that learn from data
    "micro_batch": Switch("gradients summed over four parts: must do nothing", lambda c: {
        "micro_batch": c.batch_size // 4}),
    "epochs": Switch("twice as many epochs", lambda c: {"epochs": 2 * c.epochs}),
    "weight_decay": Switch("weight decay 0.1", lambda c: {"weight_decay": 0.1})}
SWITCHES: dict[str, dict[str, Switch]] = {                     # of each stage
    "sft": {**SHARED, **FITTED, "packing": Switch("one conversation a row", lambda c: {"packing": False})},
    "reward": {**SHARED, **FITTED, "center": Switch("scores kept near 0, weight 0.01", lambda c: {"center": 0.01}),
               "head": Switch("head with std 1/(d + 1)", patches=small_head)},
    "ppo": {
        **SHARED, "whiten": Switch("advantages as they are", lambda c: {"whiten": False}),
        "whiten_rewards": Switch("rewards scaled to std 1", lambda c: {"whiten_rewards": True}),
        "clip": Switch("no clip of the ratio", lambda c: {"clip": 1e9}),
        "value_clip": Switch("no clip of the value", lambda c: {"value_clip": 1e9}),
        "kl_coef": Switch("no price of KL, or 0.1 where there is none", lambda c: {
            "kl_coef": 0.0 if c.kl_coef else 0.1}),
        "kl_kind": Switch("k3 in the reward", patches=bugs.BUGS["k3_in_reward"].patches),
        "kl_target": Switch("beta adapts, to 2 nats", lambda c: {"kl_target": 2.0, "kl_horizon": 1000,
                                                                 "kl_coef": c.kl_coef or 0.05}),
        "lam": Switch("lambda 1 instead of 0.95", lambda c: {"lam": 1.0}),
        "gamma": Switch("gamma 0.9 instead of 1", lambda c: {"gamma": 0.9}),
        "ppo_epochs": Switch("one pass over a rollout, not four", lambda c: {"ppo_epochs": 1}),
        "minibatches": Switch("four minibatches a pass", lambda c: {
            "minibatches": 4, "micro_batch": c.batch_size // 4}),
        "temperature": Switch("temperature 1, or 0.7 where it is 1", lambda c: {
            "temperature": 0.7 if c.temperature == 1 else 1.0}),
        "missing_eos": Switch("answers without an end as judged, or -1 where they are", lambda c: {
            "missing_eos": -1.0 if c.missing_eos is None else None}),
        "reward_clip": Switch("scores cut to +- 0.5", lambda c: {"reward_clip": 0.5}),
        "value_lr": Switch("the value learns a tenth as fast", lambda c: {"value_lr": c.value_lr / 10}),
        "value_warmup": Switch("five updates of the value first", lambda c: {"value_warmup": 5}),
        "value_init": Switch("the value starts from nothing", patches=value_from_nothing),
        "adam_eps": Switch("Adam with eps 1e-8 instead of 1e-5", patches=other_eps)}}


@dataclass
class Config:
    # --- sweep ---
    on: str = "tree"                   # tree | randomwalks | language | sft | reward
    switch: tuple[str, ...] = ("all",)         # names below, or all
    seeds: int = 5                     # of each setting
    steps: int = 40                    # updates of PPO; the other stages take the epochs of the laboratory
    list: bool = False                 # print what can be switched and stop
    draw: bool = False                 # table and figure again from the .json file
    workers: int = 0                   # runs at a time; 0: as many as there are cores
    out_dir: str = "out/ablate"


# ---------------------------------------------------------------- worlds: (seed, usual settings, changes) -> curve

Curve = list[list[float]]                                      # [step, figure]


def on_tree(seed: int, steps: int, change: Callable) -> Curve:
    usual = tree.config(seed=seed, steps=steps)
    run = tree.config(**{"seed": seed, "steps": steps, **change(usual)})
    return [[row["step"], row["exact/regret"]] for row in tree.train(tree.build(run), run, every=2)
            if "exact/regret" in row]


def on_randomwalks(seed: int, steps: int, change: Callable) -> Curve:
    return [[i + 1, x] for i, x in enumerate(randomwalks.train(seed, steps, **change(randomwalks.Config())))]


@functools.cache
def language(seed: int) -> tuple:
    """The fine-tuned model of a seed, 2,000 labelled pairs of its answers, 4,000 held-out ones."""
    model = goodhart.fine_tune(seed)
    return model, goodhart.label(model, 2000, seed + 11)[0], goodhart.label(model, 4000, seed + 12)[0]


@functools.cache
def proxy(seed: int) -> RewardModel:
    return goodhart.learn_reward(*language(seed)[:2], seed)


def on_language(seed: int, steps: int, change: Callable) -> Curve:
    model, cfg = language(seed)[0], goodhart.Config(steps=steps)
    r = goodhart.sample(model, goodhart.PROMPTS * 100, torch.Generator().manual_seed(seed + 5))
    truth = goodhart.gold_rows(r.ids, r.mask, r.response)
    with tempfile.TemporaryDirectory() as name:
        checkpoints.save(model, None, Path(name) / "sft")
        reward_stage.save(proxy(seed), None, Path(name) / "proxy", base=f"{name}/sft")
        history, _ = goodhart.climb(Path(name), "proxy", 0.05, cfg, seed,
                                    **change(goodhart.climb_settings(cfg, 2000, 0.05, seed)))
    return [[row["step"] + 1, (row["gold"] - float(truth.mean())) / float(truth.std())] for row in history]


def on_sft(seed: int, steps: int, change: Callable) -> Curve:
    """Held-out rows are read by plain log-softmax: a bug of the loss must not measure itself."""
    held, curve = goodhart.corpus(random.Random(seed + 1000), 500), []
    ids, mask = (data_batch.pad([row[key] for row in held], 0)[0] for key in ("ids", "mask"))
    keep = mask[:, 1:] == 1

    def watch(step: int, model) -> None:
        if step % 20 == 0:
            with torch.no_grad():
                log_p = model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            curve.append([step, -float(log_p[keep].mean())])

    goodhart.fine_tune(seed, watch=watch, **change(goodhart.sft_settings()))
    return curve


def on_reward(seed: int, steps: int, change: Callable) -> Curve:
    model, pairs, held = language(seed)
    curve: Curve = []

    def watch(step: int, judge: RewardModel) -> None:
        if step % 5 == 0:
            curve.append([step, goodhart.accuracy(judge, held)])

    goodhart.learn_reward(model, pairs, seed, watch=watch, **change(goodhart.reward_settings()))
    return curve


WORLDS = {"tree": ("ppo", on_tree, "regret"), "randomwalks": ("ppo", on_randomwalks, "optimality"),
          "language": ("ppo", on_language, "gold"), "sft": ("sft", on_sft, "held-out loss"),
          "reward": ("reward", on_reward, "accuracy")}
USUAL = {"tree": tree.config, "randomwalks": randomwalks.Config, "sft": goodhart.sft_settings,
         "reward": goodhart.reward_settings,
         "language": lambda: goodhart.climb_settings(goodhart.Config(), 2000, 0.05, 0)}


def difference(world: str, name: str) -> str:
    """What the switch sets, in few words: schedule constant, not cosine"""
    usual, switch = USUAL[world](), known(world)[name]
    return ", ".join(f"{k} {x:g}, not {getattr(usual, k):g}" if isinstance(x, (int, float)) and
                     isinstance(getattr(usual, k), (int, float)) else f"{k} {x}, not {getattr(usual, k)}"
                     for k, x in switch.change(usual).items()
                     if x != getattr(usual, k) and (k != "micro_batch" or name == k)) or switch.what


def known(world: str) -> dict[str, Switch]:
    """What can be switched there: the details of its stage, and the zoo's bugs of it."""
    stage = WORLDS[world][0]
    return SWITCHES[stage] | {name: Switch("a bug of the zoo", patches=bug.patches) for name, bug in bugs.BUGS.items()
                              if bug.stage == stage}


def one(world: str, seed: int, steps: int, name: str | None) -> Curve:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    switch = known(world)[name] if name else Switch("")
    if world in ("language", "reward"):
        language(seed), world == "language" and proxy(seed)            # made without the switch, once a seed
    with contextlib.ExitStack() as stack:
        for (where, attribute), value in switch.patches().items():
            stack.enter_context(mock.patch.object(where, attribute, value))
        return WORLDS[world][1](seed, steps, switch.change)


# ---------------------------------------------------------------- table and figure

def band(curves: list[Curve], colour: str) -> figure.Line:
    columns = [(points[0][0], [y for _, y in points]) for points in zip(*curves)]
    return figure.Line([(x, statistics.median(ys)) for x, ys in columns], [(x, min(ys), max(ys)) for x, ys in columns],
                       colour)


def end(curve: Curve) -> float:
    """Mean of the last tenth."""
    return statistics.mean(y for _, y in curve[-max(1, len(curve) // 10):])


def moved(usual: list[Curve], curves: list[Curve]) -> str:
    """What the switch did to the figure at the end, seed by seed: mean and 95 % interval."""
    if curves == usual:
        return "nothing: no effect is possible here, the same numbers"
    mean, low, high = goodhart.moved(*([{"end": end(c)} for c in part] for part in (usual, curves)), "end")
    return f"{mean:+.4f} ({low:+.4f} .. {high:+.4f})"


def table(cfg: Config, runs: dict[str, list[Curve]], about: str) -> str:
    lines = [f"# Ablations on {cfg.on}", "", f"{about}: {WORLDS[cfg.on][2]} at the end, median and range of "
             f"{len(runs['as it is'])} seeds; what the switch moves, seed by seed: mean and 95 % interval (Student's "
             "t). A smaller batch, shorter rows and more epochs are also more steps.", "",
             "| switch | what | median | range | moves it by |", "|---|---|---|---|---|"]
    for name, curves in runs.items():
        ends, usual = [end(curve) for curve in curves], name == "as it is"
        lines.append(f"| {name} | {'' if usual else difference(cfg.on, name)} | {statistics.median(ends):.4f} | "
                     f"{min(ends):.4f} .. {max(ends):.4f} | {'' if usual else moved(runs['as it is'], curves)} |")
    return "\n".join(lines) + "\n"


def draw(cfg: Config, runs: dict[str, list[Curve]]) -> str:
    usual, x = runs["as it is"], "updates" if WORLDS[cfg.on][0] == "ppo" else "steps"
    panels = [figure.Panel(name + " (no effect possible)" * (curves == usual),
                           [band(usual, "#2c6fbb"), band(curves, "#c0392b")], x,
                           textwrap.shorten(difference(cfg.on, name), 46, placeholder=" ..."))
              for name, curves in runs.items() if name != "as it is"]
    return figure.grid(panels, 4, f"{WORLDS[cfg.on][2]} on {cfg.on}, one detail at a time (blue: as it is, red: "
                       f"switched): median and range of {len(usual)} seeds")


def main(cfg: Config) -> bool:
    if cfg.list:
        for world, (stage, _, what) in WORLDS.items():
            print(f"on {world} ({stage}: {what})")
            print("\n".join(f"    {name:24} {switch.what}" for name, switch in known(world).items()))
        return True
    if cfg.on not in WORLDS:
        raise common.UserError(f"--on {cfg.on} is not known; known: {', '.join(WORLDS)}")
    file = Path(cfg.out_dir) / f"{cfg.on}.json"
    if not cfg.draw:
        measure(cfg, file)
    result = json.loads(file.read_text(encoding="utf-8"))
    told = (f"Made by `{result['command']}`, {result['date']}, commit {result['git'][:7]}, torch {result['torch']}" +
            f", {result['steps']} updates" * (WORLDS[cfg.on][0] == "ppo"))
    common.atomic_write(file.with_suffix(".md"), table(cfg, result["runs"], told))
    common.atomic_write(file.with_suffix(".svg"), draw(cfg, result["runs"]))
    print(f"figure: {file.with_suffix('.svg')}   table: {file.with_suffix('.md')}")
    return True


def measure(cfg: Config, file: Path) -> None:
    stage = WORLDS[cfg.on][0]
    names = list(SWITCHES[stage]) if "all" in cfg.switch else list(cfg.switch)
    if unknown := [name for name in names if name not in known(cfg.on)]:
        raise common.UserError(f"--switch {unknown[0]} is not known on {cfg.on} ({stage}); known: all, "
                               f"{', '.join(known(cfg.on))}")
    runs, git = {}, common.git_hash()
    with ProcessPoolExecutor(cfg.workers or os.cpu_count() or 1, get_context("spawn")) as pool:
        waiting = {name or "as it is": [pool.submit(one, cfg.on, seed, cfg.steps, name) for seed in range(cfg.seeds)]
                   for name in (None, *names)}
        for name, futures in waiting.items():
            runs[name] = [future.result() for future in futures]
            ends = [end(curve) for curve in runs[name]]
            change = moved(runs["as it is"], runs[name]) if name in names else ""
            print(f"{name:16} {WORLDS[cfg.on][2]} {statistics.median(ends):.4f}   {min(ends):.4f} .. {max(ends):.4f}   "
                  f"{change}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    common.atomic_write(file, json.dumps({
        "command": f"python {' '.join(sys.argv)}", "date": time.strftime("%Y-%m-%d"), "git": git,
        "torch": torch.__version__, "machine": bands.machine(), "on": cfg.on, "steps": cfg.steps, "runs": runs}) + "\n")


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
