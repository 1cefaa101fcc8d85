"""Is this run sound? PASS or FAIL per stage, and the likeliest cause of a failure from the shape of its curves.

A rule reads metrics.jsonl and returns what it saw. Rules are arithmetic where the log allows it: at the first update KL
is 0, the ratio 1, the sampler's log-probabilities those of training; k1 and k3 estimate one KL; the reward adds up.
What arithmetic cannot see, the shape may show: falling scores, a length that fills its room, an end that never comes.

    python course/check.py out/ppo                     # or a folder of runs, as make demo leaves it: out/demo
    python course/check.py out/demo --expected course/expected/demo.json
    python course/check.py --zoo docs/results/zoo.json  # how often the rules are right, on runs with a known bug
"""
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402

Log = dict[str, list[float]]                                   # metric -> its values, in order of steps
STAGES = ("sft", "reward", "ppo")


@dataclass
class Rule:
    stage: str
    cause: str
    bugs: tuple[str, ...]              # of the zoo, that it stands for
    look: Callable[[Log, dict], str]   # (log, settings of the run) -> what it saw, or ""


def part(values: list[float], first: bool) -> float:
    """Mean of the first or last fifth: one update says little."""
    n = max(1, len(values) // 5)
    return statistics.mean(values[:n] if first else values[-n:])


# ---------------------------------------------------------------- PPO: what must hold exactly

def not_finite(log: Log, settings: dict) -> str:
    bad = [name for name, values in log.items() if not all(math.isfinite(x) for x in values)]
    return f"{', '.join(bad)} not finite" if bad else ""


def start_is_not_the_reference(log: Log, settings: dict) -> str:
    x = log["val/largest_kl"][0]
    return f"KL of a token is {x:.2g} before the first update" if x > settings.get("tolerance", 1e-3) else ""


def ratio_is_not_one(log: Log, settings: dict) -> str:
    x = max(log["val/first_ratio_gap"])
    return f"|log ratio| is {x:.2g} before anything moved" if x > settings.get("tolerance", 1e-3) else ""


def sampler_is_stale(log: Log, settings: dict) -> str:
    first, last = log["val/sampler_gap"][0], part(log["val/sampler_gap"], False)
    return f"val/sampler_gap is {first:.1g} at first and then {last:.2g}" if first < 1e-3 < 0.03 < last else ""


def sampler_differs(log: Log, settings: dict) -> str:
    x = log["val/sampler_gap"][0]
    return f"val/sampler_gap is {x:.2g} at the first update" if x > 0.02 else ""


def reward_does_not_add_up(log: Log, settings: dict) -> str:
    """rlhf_reward = scores + non_score_reward, in every update."""
    total = [a - b - c for a, b, c in zip(log["objective/rlhf_reward"], log["objective/scores"],
                                          log["objective/non_score_reward"])]
    far = max(total, key=abs)
    return f"rlhf_reward - scores - non_score_reward is {far:+.2g}" if abs(far) > 1e-2 else ""


def price_of_kl_not_paid(log: Log, settings: dict) -> str:
    """The same sum, where exactly the price of KL is what is missing."""
    paid = [a - b for a, b in zip(log["objective/rlhf_reward"], log["objective/scores"])]
    owed = [-x for x in log["objective/non_score_reward"]]
    return f"{max(owed):.2g} of KL's price never reaches the reward" if max(map(abs, paid)) < 1e-4 < max(owed) else ""


def kl_is_negative(log: Log, settings: dict) -> str:
    k1, k3 = part(log["objective/kl"], False), abs(part(log["objective/kl_k3"], False))
    return f"objective/kl is {k1:.2f}, its other estimate {k3:.2f}" if k1 < -0.05 and k3 > 0.05 else ""


def one_estimator(log: Log, settings: dict) -> str:
    """k1 and k3 of one rollout are never equal; k1 has the greater noise."""
    gaps = [abs(a - b) for a, b in zip(log["objective/kl"], log["objective/kl_k3"])]
    same = max(gaps) < 1e-5 < max(log["objective/kl"])
    return "objective/kl and objective/kl_k3 are the same numbers" if same else ""


def mean_ratio_is_a_count(log: Log, settings: dict) -> str:
    x = statistics.median(log["val/ratio"])
    return f"the mean ratio is {x:.2f}: parts were not divided by the whole" if x > 1.5 else ""


def controller_runs_away(log: Log, settings: dict) -> str:
    """beta must rise where KL is above its target."""
    if not (target := settings.get("kl_target")):
        return ""
    moves = [(b / a - 1) * (kl - target) for a, b, kl in zip(log["kl_coef"], log["kl_coef"][1:], log["objective/kl"])]
    wrong = sum(m < 0 for m in moves)
    return f"beta moved against the error in {wrong} of {len(moves)} updates" if wrong > 0.9 * len(moves) else ""


# ---------------------------------------------------------------- PPO: what the shape shows

def scores_fall(log: Log, settings: dict) -> str:
    """By much more than the updates differ from each other at the start."""
    first, last = part(log["objective/scores"], True), part(log["objective/scores"], False)
    return f"scores fell from {first:.2f} to {last:.2f}" if last < first - 0.15 * (abs(first) + 1) else ""


def fills_its_room(log: Log, settings: dict) -> str:
    length, room = part(log["val/response_length"], False), settings.get("response_len")
    grew = length > part(log["val/response_length"], True) * 1.05
    ends = part(log["val/eos_rate"], False)
    return f"answers of {length:.1f} tokens in a room of {room}, {ends:.0%} end" if (
        room and length > 0.9 * room and grew and ends < 0.5) else ""


def stops_ending(log: Log, settings: dict) -> str:
    first, last = part(log["val/eos_rate"], True), part(log["val/eos_rate"], False)
    return f"the share that ends fell from {first:.0%} to {last:.0%}" if last < first - 0.1 else ""


def value_knows_nothing(log: Log, settings: dict) -> str:
    values = log["val/explained_variance"]
    x = part(values, False)
    return f"explained variance is {x:.2f} after {len(values)} updates" if x < -0.2 and len(values) >= 20 else ""


def sft_loss_too_good(log: Log, settings: dict) -> str:
    values = log.get("eval/loss", log["loss"])
    return f"loss {values[-1]:.3f}: no text is that certain" if values[-1] < 0.05 else ""


def sft_never_ends(log: Log, settings: dict) -> str:
    x = log.get("eval/eos_rate", [1.0])[-1]
    return f"{x:.0%} of the answers end" if x < 0.5 else ""


def sft_loss_rises(log: Log, settings: dict) -> str:
    values = log.get("eval/loss", log["loss"])
    return f"held-out loss rose from {min(values):.3f} to {values[-1]:.3f}" if values[-1] > min(values) + 0.1 else ""


def coin(log: Log, settings: dict) -> str:
    x = log.get("eval/accuracy", log["accuracy"])[-1]
    return f"accuracy {x:.2f} is a coin's" if 0.4 < x < 0.56 else ""


def swapped(log: Log, settings: dict) -> str:
    x = log.get("eval/accuracy", log["accuracy"])[-1]
    return f"accuracy {x:.2f}: worse than a coin" if x <= 0.4 else ""


def only_length(log: Log, settings: dict) -> str:
    a, b = (log.get(name, [0.0])[-1] for name in ("eval/accuracy", "eval/longer_wins"))
    return f"accuracy {a:.2f}, of the longer answer {b:.2f}" if b and a < b + 0.02 else ""


RULES = [
    Rule("ppo", "a number overflowed: lower --lr, look for log(0)", (), not_finite),
    Rule("ppo", "old and new log-probabilities take different ways (dropout, mode, padding)", ("dropout_in_scoring",),
         ratio_is_not_one),
    Rule("ppo", "the policy does not start as the reference: is that the SFT model?", ("reference_is_the_base",),
         start_is_not_the_reference),
    Rule("ppo", "the sampler has old weights", ("stale_sampler",), sampler_is_stale),
    Rule("ppo", "what is sampled is not what is scored: temperature, top-k, greedy, mask, positions, end token",
         ("temperature_forgotten", "mask_forgotten", "positions_count_padding", "greedy_rollouts", "end_token_ignored",
          "retokenised"), sampler_differs),
    Rule("ppo", "beta never reaches the reward", ("kl_missing",), price_of_kl_not_paid),
    Rule("ppo", "the score is not added once", ("score_on_every_token",), reward_does_not_add_up),
    Rule("ppo", "KL has the wrong sign", ("kl_sign",), kl_is_negative),
    Rule("ppo", "k3 stands in the reward", ("k3_in_reward",), one_estimator),
    Rule("ppo", "means of means: count the tokens of the minibatch first", ("mean_of_means",), mean_ratio_is_a_count),
    Rule("ppo", "the controller of beta has the wrong sign", ("adaptive_kl_inverted",), controller_runs_away),
    Rule("ppo", "an answer without an end is not punished", ("missing_end_ignored",), stops_ending),
    Rule("ppo", "length is paid: score per token, or a reward model that likes it", ("score_behind_the_end",),
         fills_its_room),
    Rule("ppo", "what was judged well becomes less likely: sign or ratio of the policy loss", ("ratio_inverted",),
         scores_fall),
    Rule("ppo", "the value learns nothing: returns, slice or --value_lr", ("returns_whitened",), value_knows_nothing),
    Rule("sft", "labels are not shifted: the model copies", ("no_shift",), sft_loss_too_good),
    Rule("sft", "the end token is not supervised", ("end_not_supervised",), sft_never_ends),
    Rule("sft", "over-fitted: fewer epochs", (), sft_loss_rises),
    Rule("reward", "chosen and rejected are exchanged", (), swapped),
    Rule("reward", "the head was lost, or the labels are noise", ("head_lost_on_save",), coin),
    Rule("reward", "it has learned the length", (), only_length),
]


def diagnose(stage: str, log: Log, settings: dict) -> list[tuple[Rule, str]]:
    """Rules that see something, the likeliest first: exact ones stand before those of shape."""
    found = []
    for rule in RULES:
        if rule.stage == stage:
            try:
                saw = rule.look(log, settings)
            except (KeyError, IndexError, statistics.StatisticsError):         # the log has no such figure
                continue
            if saw:
                found.append((rule, saw))
    return found


# ---------------------------------------------------------------- run folders

def read(folder: Path) -> tuple[str, Log, dict]:
    """Stage, metrics and settings of one run."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    log: Log = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for name, value in json.loads(line).items():
            if isinstance(value, (int, float)) or value is None:
                log.setdefault(name, []).append(math.nan if value is None else float(value))
    tolerance = 1e-3 if "float32" in about["dtype"] else 2e-2
    return about["stage"], log, {**about["config"], "tolerance": tolerance}


def outside(stage: str, log: Log, expected: dict) -> list[str]:
    """Metrics whose last value lies outside the recorded range, widened by half of it on either side."""
    found = []
    for name, band in expected.get("curves", {}).get(stage, {}).items():
        if name in log and band["step"]:
            low, high, x = band["low"][-1], band["high"][-1], log[name][-1]
            margin = 0.5 * (high - low) + 0.02 * abs(band["median"][-1])
            if not low - margin <= x <= high + margin:
                found.append(f"{name} ends at {x:.3g}, seeds before it at {low:.3g} .. {high:.3g}")
    return found


def check(folder: Path, expected: dict) -> bool:
    stage, log, settings = read(folder)
    gate = folder / "gate.json"
    failed = []
    if gate.exists():
        failed = [f"{c['name']} {c['figure']}" for c in json.loads(gate.read_text(encoding="utf-8"))["checks"]
                  if not c["ok"]]
    found, far = diagnose(stage, log, settings), outside(stage, log, expected)
    sound = not (failed or found or far)
    print(f"{'PASS' if sound else 'FAIL'} {stage} ({folder})")
    for line in [f"gate: {x}" for x in failed] + [f"band: {x}" for x in far]:
        print(f"    {line}")
    for i, (rule, saw) in enumerate(found):
        print(f"    {'likeliest cause' if i == 0 else 'or'}: {rule.cause}   ({saw})")
    return sound


# ---------------------------------------------------------------- how often the rules are right

def zoo(file: Path) -> str:
    """Every run of the zoo through the rules: the first rule names the bug, another one, or none does."""
    result, counts, lines = json.loads(file.read_text(encoding="utf-8")), {"right": 0, "wrong": 0, "silent": 0}, []
    for name, entry in result["bugs"].items():
        settings = {"response_len": 4, **json.loads(entry["sound"].split(" ", 1)[1])}
        outcome = []
        for curve in entry["curves"]:
            log = {metric: [y for _, y in points] for metric, points in curve.items() if isinstance(points, list)}
            found = diagnose(entry["stage"], log, settings) if log else []
            outcome.append("silent" if not found else "right" if name in found[0][0].bugs else "wrong")
            counts[outcome[-1]] += 1
        lines.append(f"{name:26} {' '.join(outcome)}")
    alarms = runs = 0
    for key, curves in result["sound"].items():
        stage, text = key.split(" ", 1)
        for curve in curves:
            log = {metric: [y for _, y in points] for metric, points in curve.items()}
            runs, alarms = runs + 1, alarms + bool(diagnose(stage, log, {"response_len": 4, **json.loads(text)}))
    spoke = counts["right"] + counts["wrong"]
    return "\n".join([*lines, "", f"{counts['right']} of {spoke} diagnoses name the bug; {counts['silent']} of "
                      f"{sum(counts.values())} runs look sound to every rule; {alarms} false alarms in {runs} sound "
                      "runs"])


def main(argv: list[str]) -> bool:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return False
    if argv[0] == "--zoo":
        print(zoo(Path(argv[1])))
        return True
    folder, expected = Path(argv[0]), {}
    if len(argv) == 3 and argv[1] == "--expected":
        expected = json.loads(Path(argv[2]).read_text(encoding="utf-8"))
    elif len(argv) > 1:
        raise common.UserError(f"unknown arguments {argv[1:]}; known: RUN_DIR --expected FILE, or --zoo FILE")
    runs = [p for p in (folder, *(folder / stage for stage in STAGES)) if (p / "metrics.jsonl").exists()]
    if not runs:
        raise common.UserError(f"{folder} holds no run: no metrics.jsonl in it, nor in its sft, reward or ppo folder")
    return all([check(run, expected) for run in runs])


if __name__ == "__main__":
    common.main(lambda: main(sys.argv[1:]))
