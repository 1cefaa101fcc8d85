"""Every certificate against every bug, and the curve that training makes with each of them.

The table says which certificate catches which bug; a bug that none catches would be a hole in the proof. The curves say
how much one would have seen without certificates: of PPO on the tree (course/tree.py) the exact regret, of the reward
model its accuracy, of fine-tuning the loss, with the range of the sound runs behind them. What the log shows of each is
said in course/bugs.py and measured here.

    python course/zoo.py               # -> docs/results/zoo.json, zoo.md, zoo.svg      (make zoo)
    python course/zoo.py --draw        # table and figure again from zoo.json
    python course/zoo.py --no_certificates --seeds 6,7,8 --name zoo_check      # only logs, to judge check.py with
    python course/check.py --zoo docs/results/zoo_check.json                   # -> docs/results/zoo_check.md
"""
import contextlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import common  # noqa: E402
import lora  # noqa: E402
import reward as reward_stage  # noqa: E402
import sft  # noqa: E402
from course import bugs, certificates, figure, tree  # noqa: E402
from data import batch as data_batch  # noqa: E402
from reward import RewardModel  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# Bugs that need a certain setting to show; the sound run beside them has it too.
SETTINGS = {"adaptive_kl_inverted": {"kl_target": 1.0, "kl_horizon": 100, "kl_coef": 0.1},
            "merge_by_subtraction": {"lora_r": 8, "merge": True, "lr": 3e-3, "value_lr": 3e-3},
            "norms_left_trainable": {"lora_r": 8, "lr": 3e-3, "value_lr": 3e-3},
            "mean_of_means": {"micro_batch": 16}}


@dataclass
class Config:
    # --- zoo ---
    seeds: tuple[int, ...] = (0, 1, 2)  # of the curves
    steps: int = 20                    # updates of a curve
    batch_size: int = 64               # answers per update
    out_dir: str = str(RESULTS)
    only: tuple[str, ...] = ()         # bugs; empty: all
    curves: bool = True                # false: only what catches which, in half of the time
    certificates: bool = True          # false: only the curves
    name: str = "zoo"                  # of the files in out_dir
    resume: bool = False               # keep the bugs that zoo.json holds already
    draw: bool = False                 # only draw again what zoo.json holds


# ---------------------------------------------------------------- curves

Curve = list[dict[str, list]]          # tables {"step": [...], metric: [...]}, one for each set of steps


def ppo_curve(cfg: Config, seed: int, settings: dict) -> Curve:
    """The log of ppo.py, every other update with the exact figures."""
    settings = {"micro_batch": cfg.batch_size, **settings}
    run = tree.config(seed=seed, steps=cfg.steps, batch_size=cfg.batch_size, **settings)
    return tables(tree.train(tree.build(run), run, every=2))


def tables(rows: list[dict]) -> Curve:
    """Rows of a log, in six digits; what depends on the machine is left out."""
    found: dict[tuple, dict[str, list]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in ("step", "lr", "tokens_per_sec") and not name.startswith("time/"):
            having = [row for row in rows if name in row]
            steps = tuple(row["step"] for row in having)
            found.setdefault(steps, {})[name] = [float(f"{round(row[name], 6):.6g}") for row in having]
    return [{"step": list(steps), **table} for steps, table in found.items()]


def points(curve: Curve, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric; a run that crashed has none."""
    return next((list(zip(table["step"], table[name])) for table in curve if name in table), [])


def reward_curve(cfg: Config, seed: int, settings: dict) -> Curve:
    """What reward.py logs, and the accuracy against the true reward of the model as it comes back from its file."""
    truth, rows = tree.Exact(tree.build(tree.config(seed=seed)), tree.config(seed=seed)).gold.flatten(), []
    r, run = tree.everything(), reward_stage.Config(micro_batch=16)
    held = next(tree.rankings(256, torch.Generator().manual_seed(seed + 1000)))
    better = (truth[:, None] > truth[None]).nonzero()
    for steps in (1, 5, 10, 20, 40, 80):
        body = tree.network(seed)
        torch.manual_seed(seed)
        lora.apply(body, 8, 16.0, name="reward")
        judge, log = RewardModel(body, "reward"), []
        tree.teach(judge, seed, steps, log)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            reward_stage.save(judge, None, Path(folder), base="base")
            scores = reward_stage.load(folder, base=tree.network(seed))(r.ids, r.mask)
            figures = reward_stage.check_saved(judge, Path(folder), held, tree.TOKENIZER, run, tree.WORLD)
        figures |= reward_stage.evaluate(judge, held, tree.TOKENIZER, run, tree.WORLD)
        figures["exact/accuracy"] = float((scores[better[:, 0]] > scores[better[:, 1]]).float().mean())
        rows.append({"step": steps, **figures})
    return tables(log) + tables(rows)


def sft_curve(cfg: Config, seed: int, settings: dict) -> Curve:
    """What sft.py logs of answers drawn from the optimal policy of beta 1, and their held-out loss per supervised token
    by plain log-softmax."""
    exact = tree.Exact(tree.build(tree.config(seed=seed)), tree.config(seed=seed))
    generator = torch.Generator().manual_seed(seed)
    weights = (exact.ref + exact.gold).flatten().exp()
    r, rows = tree.everything(), []
    for i in torch.multinomial(weights, 1024, replacement=True, generator=generator).tolist():
        ids, n = r.ids[i][r.mask[i] == 1].tolist(), int(r.response[i].sum())
        rows.append({"ids": ids, "mask": [0] * (len(ids) - n) + [1] * n})
    train, held, log = data_batch.pack(rows[:768], 24), rows[768:], []
    net, run = tree.network(seed + 1), sft.Config(micro_batch=4, lora_r=0, grad_clip=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    batches = data_batch.Batches(train, 16, seed)
    for step in range(61):
        if step % 10 == 0:
            with torch.no_grad():
                total = sum(float(-net(torch.tensor([row["ids"]])).log_softmax(-1)[0, t - 1, row["ids"][t]])
                            for row in held for t in range(len(row["ids"])) if row["mask"][t])
            answers = sft.answer(net, tree.PROMPTS, tree.TOKENIZER, 8)
            log.append({"step": step, "exact/loss": total / sum(sum(row["mask"]) for row in held),
                        **sft.evaluate(net, held, tree.TOKENIZER, run, tree.WORLD),
                        "eval/eos_rate": statistics.mean(ids[-1] == tree.END for ids in answers)})
        if step == 0:
            log[0]["eval/packing_gap"] = sft.packing_gap(net, train[:4], tree.TOKENIZER, run, tree.WORLD)
        log.append({"step": step + 1,
                    **sft.improve(net, batches.next(), optimizer, tree.TOKENIZER, run, tree.WORLD, step)})
    return tables(log)


CURVES = {"ppo": ppo_curve, "reward": reward_curve, "sft": sft_curve}
SHOWN = {"ppo": "exact/regret", "reward": "exact/accuracy", "sft": "exact/loss",       # how good it is in truth
         "adaptive_kl_inverted": "exact/kl"}                   # and whether beta holds KL at its target


def curves(cfg: Config, stage: str, settings: dict, name: str | None) -> list[Curve]:
    """One per seed; a run that crashes is a curve that ends."""
    found = []
    for seed in cfg.seeds:
        with bugs.inject(name) if name else contextlib.nullcontext():
            try:
                found.append(CURVES[stage](cfg, seed, settings))
            except Exception as error:                                       # a crash is an answer too, and told
                found.append([{"crash": [f"{type(error).__name__}: {error}"[:200]]}])
    return found


# ---------------------------------------------------------------- certificates

def judge(name: str | None) -> dict[str, str]:
    """{certificate: why it failed}, or {} if all pass."""
    failed = {}
    for title, certificate in certificates.FAST.items():
        with bugs.inject(name) if name else contextlib.nullcontext():
            try:
                certificate()
            except Exception as error:                                       # whatever stops it, stops the bug
                failed[title] = f"{type(error).__name__}: {error}".split("\n")[0][:160]
    return failed


def write(file: Path, result: dict) -> None:
    """A table of a curve is a line."""
    common.atomic_write(file, json.dumps(result, separators=(",", ":")).replace('{"step":', '\n{"step":') + "\n")


def measure(cfg: Config, file: Path) -> dict:
    assert not cfg.certificates or not (failed := judge(None)), f"without any bug these fail: {failed}"
    settings = {"seeds": list(cfg.seeds), "steps": cfg.steps, "batch_size": cfg.batch_size}
    result = {"command": "python " + " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "git": common.git_hash(),
              "torch": torch.__version__, **settings, "bugs": {}, "sound": {}}
    if cfg.resume and file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        result = old if all(old[key] == value for key, value in settings.items()) else result

    wanted = [item for item in bugs.BUGS.values() if not cfg.only or item.name in cfg.only]
    for item in wanted:                                                        # the table first: it is the proof
        if item.name not in result["bugs"]:
            key = f"{item.stage} {json.dumps(SETTINGS.get(item.name, {}))}"
            caught = judge(item.name) if cfg.certificates else None            # None: nobody has asked
            result["bugs"][item.name] = {"stage": item.stage, "shown": SHOWN.get(item.name, SHOWN[item.stage]),
                                         "sound": key, "caught": caught, "curves": []}
            write(file, result)
            print(f"{item.name:24} {', '.join(caught or {})}", flush=True)
    for item in wanted if cfg.curves else ():
        entry, changes = result["bugs"][item.name], SETTINGS.get(item.name, {})
        if not entry["curves"]:
            if entry["sound"] not in result["sound"]:
                result["sound"][entry["sound"]] = curves(cfg, item.stage, changes, None)
            entry["curves"] = curves(cfg, item.stage, changes, item.name)
            write(file, result)
            print(f"{item.name:24} {last(entry['curves'], entry['shown'])}", flush=True)
    return result


# ---------------------------------------------------------------- table and figure

def last(curves: list[Curve], shown: str) -> str:
    ends = [points(c, shown)[-1][1] if points(c, shown) else None for c in curves]
    return "not run" if not ends else " / ".join("crash" if x is None else f"{x:.3f}" for x in ends)


def seen(entry: dict, sound: list[Curve]) -> bool:
    """Whether every seed ends outside what the sound runs reached, widened on either side by half their range and
    0.002. A crash is seen."""
    ends = [points(c, entry["shown"])[-1][1] for c in sound]
    margin = 0.5 * (max(ends) - min(ends)) + 0.002
    return all(not (found := points(c, entry["shown"])) or not
               min(ends) - margin <= found[-1][1] <= max(ends) + margin for c in entry["curves"])


def figures(curves: list[Curve], sign: bugs.Sign) -> list[float]:
    """What the sign speaks of, in each run."""
    if sign.metric == "crash":
        return [float("crash" in c[0]) for c in curves]
    values = [[y for _, y in points(c, sign.metric)] for c in curves]
    return [{"first": v[0], "last": v[-1], "mean": statistics.mean(v)}[sign.when] for v in values]


def shows(sign: bugs.Sign, curves: list[Curve], sound: list[Curve]) -> bool:
    """Whether every run with the bug is beyond every sound one."""
    here, there = figures(curves, sign), figures(sound, sign)
    return min(here) > max(there) if sign.way == "higher" else max(here) < min(there)


def measured(sign: bugs.Sign, curves: list[Curve], sound: list[Curve]) -> str:
    here, there = (" / ".join(f"{x:.3g}" for x in figures(some, sign)) for some in (curves, sound))
    return f"`{sign.metric}` ({sign.when}) {sign.way}: {here}, sound {there}"


def table(result: dict) -> str:
    """zoo.md: what catches each bug, what its curve and its log show, how to recognise it, what is not here."""
    lines = ["# The bug zoo", "", f"Made by `{result['command']}`, {result['date']}, commit "
             f"{result['git'][:7]}{result['git'][40:]}, torch {result['torch']}. Regret is (J* - J) / "
             f"(J* - J of the reference) by enumeration, after {result['steps']} updates of {result['batch_size']} "
             "answers; accuracy and loss are against the true reward and by plain log-softmax. Seeds "
             f"{', '.join(map(str, result['seeds']))}.", "",
             '"Curve" looks at this one true figure at the end of these short runs: "shows it" where every seed ends '
             "outside the range of the sound runs of the same seeds, widened on either side by half of that range and "
             '0.002; else "looks sound". It says nothing of longer runs. The symptom is what the log shows, over the '
             "whole run (mean), in its first or in its last line: there every seed with the bug is beyond every sound "
             "one.", "", "| bug | caught by | figure | with the bug | sound | curve | symptom |",
             "|---|---|---|---|---|---|---|"]
    for name, entry in result["bugs"].items():
        sound, caught = result["sound"].get(entry["sound"], []), entry["caught"]
        said = "; ".join(measured(sign, entry["curves"], sound) for sign in bugs.BUGS[name].signs if entry["curves"])
        looks = "" if not entry["curves"] else "shows it" if seen(entry, sound) else "looks sound"
        lines.append(f"| `{name}` | {'not asked' if caught is None else ', '.join(caught) or '**nothing**'} | "
                     f"{entry['stage']} {entry['shown'].split('/')[-1]} | {last(entry['curves'], entry['shown'])} | "
                     f"{last(sound, entry['shown'])} | {looks} | {said or 'none'} |")
    lines += ["", "| bug | diagnosis | 诊断 |", "|---|---|---|"]
    lines += [f"| `{name}` | {item.en} | {item.zh} |" for name, item in bugs.BUGS.items()]
    lines += ["", "Not here, as no patch over our functions would have a curve on the tree:", ""]
    lines += [f"- {what}: {why} (`{test}`)" for what, why, test in bugs.ABSENT]
    return "\n".join(lines) + "\n"


def draw(result: dict) -> str:
    """Small multiples: each bug's seeds over the band of the sound runs."""
    panels = []
    for name, entry in result["bugs"].items():
        if not entry["curves"]:
            continue
        what = entry["shown"]
        sound = [points(c, what) for c in result["sound"][entry["sound"]]]
        band = [(x, min(ys), statistics.median(ys), max(ys))
                for x, ys in ((at[0][0], [y for _, y in at]) for at in zip(*sound))]
        lines = [figure.Line(points(c, what), colour="#c0392b") for c in entry["curves"] if points(c, what)]
        lines += [figure.Line([(x, m) for x, _, m, _ in band], [(x, low, high) for x, low, _, high in band], "#2c6fbb")]
        top = 1.25 if what == "exact/regret" else None
        title = name if len(lines) > 1 else f"{name} (crashes)"
        panels.append(figure.Panel(title, lines, y=what.split("/")[-1], top=top, bottom=0 if top else None))
    return figure.grid(panels, columns=5, title="What training shows of each bug (red: with the bug; blue: sound)")


def main(cfg: Config) -> bool:
    warnings.simplefilter("ignore")
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{cfg.name}.json"
    if not cfg.draw:
        measure(cfg, file)
    result = json.loads(file.read_text(encoding="utf-8"))
    if any(entry["caught"] is None for entry in result["bugs"].values()):      # logs alone: they are for check.py
        return True
    common.atomic_write(file.with_suffix(".md"), table(result))
    drawn = any(entry["curves"] for entry in result["bugs"].values())
    common.atomic_write(file.with_suffix(".svg"), draw(result) if drawn else "")
    free = [name for name, entry in result["bugs"].items() if not entry["caught"]]
    hidden = sum(not seen(e, result["sound"][e["sound"]]) for e in result["bugs"].values() if e["curves"])
    return common.gate("zoo", [("every bug is caught", not free, f"{len(result['bugs']) - len(free)} of "
                                f"{len(result['bugs'])}" + (f", free: {', '.join(free)}" if free else "")),
                               ("bugs whose curve looks sound", True, str(hidden))])


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
