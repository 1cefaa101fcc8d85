"""Is this run sound? PASS or FAIL per stage, and the likeliest cause of a failure from the shape of its curves.

A rule reads metrics.jsonl and returns what it saw. Rules are arithmetic where the log allows it: at the first update KL
is 0, the ratio 1, the sampler's log-probabilities those of training; k1 and k3 estimate one KL; the reward adds up.
What arithmetic cannot see, the shape may show: falling scores, a length that fills its room, an end that never comes.

Beside the curves of earlier seeds (bands.py), where a run names a file of them, a run may also be merely unusual; when
more than a tenth of its figures are, that is a failure too.

    python course/check.py out/ppo                     # or a folder of runs, as make demo leaves it: out/demo
    python course/check.py out/ppo --expected course/expected/demo.json
    python course/check.py --zoo docs/results/zoo_check.json --out docs/results/zoo_check.md    # how often it is right
    python course/check.py --zoo docs/results/zoo_check.json out/lab out/demo      # ... with false alarms in these runs
"""
import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bands  # noqa: E402
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


def most_sampler_gap(settings: dict) -> float:
    """Twice what docs/metrics.md calls healthy: bf16 rounds, and rounds W + BA once more where that is merged."""
    if settings.get("tolerance", 1e-3) <= 1e-3:
        return 2e-3
    return 0.1 if settings.get("merge") else 0.06


def sampler_is_stale(log: Log, settings: dict) -> str:
    first, last = log["val/sampler_gap"][0], part(log["val/sampler_gap"], False)
    grew = first <= most_sampler_gap(settings) < last and last > 5 * first
    return f"val/sampler_gap is {first:.1g} at first and then {last:.2g}" if grew else ""


def sampler_differs(log: Log, settings: dict) -> str:
    x = log["val/sampler_gap"][0]
    return f"val/sampler_gap is {x:.2g} at the first update" if x > most_sampler_gap(settings) else ""


def price_of_kl_not_paid(log: Log, settings: dict) -> str:
    """rlhf_reward = scores + non_score_reward, in every update. Here the price of KL is what is missing."""
    paid = [a - b for a, b in zip(log["objective/rlhf_reward"], log["objective/scores"])]
    owed = [-x for x in log["objective/non_score_reward"]]
    return f"{max(owed):.2g} of KL's price never reaches the reward" if max(map(abs, paid)) < 1e-4 < max(owed) else ""


def score_paid(log: Log) -> tuple[float, float]:
    """Of the same sum: the largest difference, and how much of the score reaches the answers' tokens (1: all of it)."""
    paid = [a - b for a, b in zip(log["objective/rlhf_reward"], log["objective/non_score_reward"])]
    scores = log["objective/scores"]
    return (max((a - b for a, b in zip(paid, scores)), key=abs), sum(map(abs, paid)) / max(1e-9, sum(map(abs, scores))))


def score_paid_often(log: Log, settings: dict) -> str:
    far, share = score_paid(log)
    return f"rewards hold {share:.1f} times the score" if abs(far) > 1e-2 and share > 1.25 else ""


def score_is_lost(log: Log, settings: dict) -> str:
    far, share = score_paid(log)
    return f"rlhf_reward - scores - non_score_reward is up to {far:+.2g}" if abs(far) > 1e-2 and share <= 1.25 else ""


def kl_is_negative(log: Log, settings: dict) -> str:
    x = min(log["objective/kl_k3"])
    return f"objective/kl_k3 is {x:.2g}, and it cannot be negative" if x < -1e-3 else ""


def one_estimator(log: Log, settings: dict) -> str:
    """k1 and k3 of one rollout are never equal; k1 has the greater noise."""
    gaps = [abs(a - b) for a, b in zip(log["objective/kl"], log["objective/kl_k3"])]
    same = max(gaps) < 1e-5 < max(log["objective/kl"])
    return "objective/kl and objective/kl_k3 are the same numbers" if same else ""


def means_hold_padding(log: Log, settings: dict) -> str:
    """Where no ratio left the clip the loss is exactly -surrogate, and where no value did it is half the error."""
    gaps = [abs(a + b) for a, b, c in zip(log["loss/policy_avg"], log["policy/surrogate_avg"],
                                          log["policy/clipfrac_avg"]) if c == 0]
    gaps += [a - b / 2 for a, b, c in zip(log["loss/value_avg"], log["val/error_avg"], log["val/clipfrac_avg"])
             if c == 0]
    x = max(gaps, default=0.0)
    return f"without a clipped token loss and logged figures differ by {x:.2g}" if x > 1e-4 else ""


def controller_runs_away(log: Log, settings: dict) -> str:
    """beta must rise where KL is above its target."""
    if not (target := settings.get("kl_target")):
        return ""
    moves = [(b / a - 1) * (kl - target) for a, b, kl in zip(log["kl_coef"], log["kl_coef"][1:], log["objective/kl"])]
    wrong = sum(m < 0 for m in moves)
    return f"beta moved against the error in {wrong} of {len(moves)} updates" if wrong > 0.9 * len(moves) else ""


def missing_end_is_free(log: Log, settings: dict) -> str:
    """Where answers do not end, their fixed score must show in the mean."""
    if settings.get("missing_eos") is None or settings.get("reward_clip"):
        return ""
    gaps = [abs(a - b) for a, b, ended in zip(log["objective/scores"], log["objective/raw_scores"], log["val/eos_rate"])
            if ended < 1]
    return f"{len(gaps)} updates with endless answers, none is charged for them" if gaps and max(gaps) < 1e-6 else ""


def whitening_is_off(log: Log, settings: dict) -> str:
    if not settings.get("whiten", True):
        return ""
    x = statistics.median(log["val/advantage_rms"])              # once all advantages are 0, a single one may be less
    return f"val/advantage_rms is {x:.3f} and not 1" if abs(x - 1) > 1e-2 else ""


def returns_are_off(log: Log, settings: dict) -> float:
    return 0.0 if settings.get("whiten_rewards") else max(log["val/last_return_gap"])


def returns_of_white_advantages(log: Log, settings: dict) -> str:
    """They are R = V + A with A of variance 1: V can never come closer to them than 1."""
    gap, error = returns_are_off(log, settings), statistics.median(log["val/error_avg"])
    return f"last returns are {gap:.2g} off, (V - R)^2 stays at {error:.2f}" if gap > 1e-3 and 0.8 < error < 1.1 else ""


def values_through_padding(log: Log, settings: dict) -> str:
    gap = returns_are_off(log, settings)
    return f"the return of a last token is {gap:.2g} away from its reward" if gap > 1e-3 else ""


def clip_is_the_optimists(log: Log, settings: dict) -> str:
    """max(-A ratio, -A clip(ratio)) is never below -A ratio."""
    x = min(a + b for a, b in zip(log["loss/policy_avg"], log["policy/surrogate_avg"]))
    return f"loss/policy_avg + policy/surrogate_avg is {x:.2g}: below 0" if x < -1e-4 else ""


def value_clip_is_the_optimists(log: Log, settings: dict) -> str:
    x = min(a - b / 2 for a, b in zip(log["loss/value_avg"], log["val/error_avg"]))
    return f"loss/value_avg is {-x:.2g} below half of val/error_avg" if x < -1e-4 else ""


def reference_moved(log: Log, settings: dict) -> str:
    return "the hash of the frozen weights has changed" if max(log["eval/reference_moved"]) else ""


def reference_moved_by_merging(log: Log, settings: dict) -> str:
    return reference_moved(log, settings) if settings.get("merge") else ""


def noise_repeats(log: Log, settings: dict) -> str:
    """Mean scores of independent answers scatter by std / sqrt(n); the second difference of three of them by what the
    three variances sum to, with weights 1, 4, 1. With the same noise in every rollout the curve is smooth."""
    s, var = log["objective/scores"], [x ** 2 / settings["batch_size"] for x in log["objective/scores_std"]]
    found = sum((a - 2 * b + c) ** 2 for a, b, c in zip(s, s[1:], s[2:]))
    wanted = sum(a + 4 * b + c for a, b, c in zip(var, var[1:], var[2:]))
    smooth = len(s) >= 15 and found < 0.25 * wanted
    return f"mean scores scatter {math.sqrt(found / wanted):.2f} times as much as independent answers" if smooth else ""


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
    """Where all answers are paid alike there is no variance to explain: then the error has fallen, and all is well."""
    values, x = log["val/explained_variance"], part(log["val/explained_variance"], False)
    if x >= -0.2 or len(values) < 20 or part(log["val/error_avg"], False) < 0.5 * part(log["val/error_avg"], True):
        return ""
    return f"explained variance is {x:.2f} after {len(values)} updates, and (V - R)^2 has not fallen"


# ---------------------------------------------------------------- SFT

def more_in_the_loss(log: Log, settings: dict) -> str:
    x = max(log["loss_weight"])
    return f"the loss is over {x:.2f} times the tokens that were counted" if x > 1 + 1e-6 else ""


def no_end_in_the_loss(log: Log, settings: dict) -> str:
    return f"0 end tokens in the loss of {len(log['num_end_tokens'])} steps" if not any(log["num_end_tokens"]) else ""


def less_in_the_loss(log: Log, settings: dict) -> str:
    x = min(log["loss_weight"])
    return f"the loss is over {x:.2f} of the tokens that were counted" if x < 1 - 1e-6 else ""


def packing_leaks(log: Log, settings: dict) -> str:
    x = log["eval/packing_gap"][0]
    return f"packing moves the loss by {x:.2g}" if x > (1e-2 if settings.get("tolerance", 0) > 1e-2 else 1e-4) else ""


def sft_loss_too_good(log: Log, settings: dict) -> str:
    values = log.get("eval/loss", log["loss"])
    return f"loss {values[-1]:.3f}: no text is that certain" if values[-1] < 0.05 else ""


def sft_never_ends(log: Log, settings: dict) -> str:
    x = log.get("eval/eos_rate", [1.0])[-1]
    return f"{x:.0%} of the answers end" if x < 0.5 else ""


def sft_loss_rises(log: Log, settings: dict) -> str:
    values = log.get("eval/loss", log["loss"])
    return f"held-out loss rose from {min(values):.3f} to {values[-1]:.3f}" if values[-1] > min(values) + 0.1 else ""


# ---------------------------------------------------------------- the reward model

def file_differs(log: Log, settings: dict) -> str:
    x = max(log["eval/saved_gap"])
    return f"scores of the saved model are up to {x:.2g} away from the live one's" if x > 1e-5 else ""


def padding_scores(log: Log, settings: dict) -> str:
    x = max(log["eval/padding_gap"])
    return f"three columns of padding move a score by {x:.2g}" if x > 5 * settings.get("tolerance", 1e-3) else ""


def swapped(log: Log, settings: dict) -> str:
    x = log.get("eval/accuracy", log["accuracy"])[-1]
    return f"accuracy {x:.2f}: worse than a coin" if x <= 0.4 else ""


def coin(log: Log, settings: dict) -> str:
    x = log.get("eval/accuracy", log["accuracy"])[-1]
    return f"accuracy {x:.2f} is a coin's" if 0.4 < x < 0.56 else ""


def only_length(log: Log, settings: dict) -> str:
    a, b = (log.get(name, [0.0])[-1] for name in ("eval/accuracy", "eval/longer_wins"))
    return f"accuracy {a:.2f}, of the longer answer {b:.2f}" if b and a < b + 0.02 else ""


def not_the_held_out_loss(log: Log, settings: dict) -> str:
    """By more than four standard errors of the later half."""
    values, held = [x for x in log["loss"] if math.isfinite(x)], log["eval/loss"][-1]
    tail = values[-max(2, len(values) // 2):]
    error, x = statistics.stdev(tail) / math.sqrt(len(tail)), statistics.mean(tail)
    return f"training loss {x:.2f}, held-out {held:.2f}" if x < held - max(0.05, 4 * error) else ""


RULES = [
    *(Rule(stage, "a number overflowed: lower --lr, look for log(0)", ("log_of_sigmoid",) * (stage == "reward"),
           not_finite) for stage in STAGES),
    # ---- exact: what the log itself contradicts
    Rule("ppo", "old and new log-probabilities take different ways (dropout, mode, padding)", ("dropout_in_scoring",),
         ratio_is_not_one),
    Rule("ppo", "the policy does not start as the reference: is that the SFT model?", ("reference_is_the_base",),
         start_is_not_the_reference),
    Rule("ppo", "the sampler has old weights", ("stale_sampler",), sampler_is_stale),
    Rule("ppo", "what is sampled is not what is scored: temperature, top-k, greedy, mask, positions, end token",
         ("temperature_forgotten", "mask_forgotten", "positions_count_padding", "greedy_rollouts", "top_k_rollouts",
          "end_token_ignored", "retokenised"), sampler_differs),
    Rule("ppo", "beta never reaches the reward", ("kl_missing",), price_of_kl_not_paid),
    Rule("ppo", "the score is added more than once", ("score_on_every_token",), score_paid_often),
    Rule("ppo", "part of the score lands behind the end, on padding",
         ("score_behind_the_end", "score_one_late", "score_on_padding"), score_is_lost),
    Rule("ppo", "KL has the wrong sign", ("kl_sign",), kl_is_negative),
    Rule("ppo", "k3 stands in the reward", ("k3_in_reward",), one_estimator),
    Rule("ppo", "padding is in the logged means", ("padding_in_the_log",), means_hold_padding),
    Rule("ppo", "the controller of beta has the wrong sign", ("adaptive_kl_inverted",), controller_runs_away),
    Rule("ppo", "an answer without an end costs nothing: does final_scores get `ended`?", ("missing_end_ignored",),
         missing_end_is_free),
    Rule("ppo", "returns were made from whitened advantages", ("returns_whitened",), returns_of_white_advantages),
    Rule("ppo", "values behind the end are read: V is 0 there, and GAE stops", ("value_through_padding",),
         values_through_padding),
    Rule("ppo", "advantages are whitened over padding too", ("whiten_over_padding",), whitening_is_off),
    Rule("ppo", "the policy's clip takes the smaller loss", ("clip_min_max",), clip_is_the_optimists),
    Rule("ppo", "the value's clip takes the smaller loss", ("value_clip_min_max",), value_clip_is_the_optimists),
    Rule("ppo", "merging for the rollout does not give the weights back", ("merge_by_subtraction",),
         reference_moved_by_merging),
    Rule("ppo", "something of the shared base is trained: norms, biases?", ("norms_left_trainable",), reference_moved),
    Rule("sft", "more is supervised than was counted: the prompts too", ("prompt_supervised",), more_in_the_loss),
    Rule("sft", "no end token is supervised: a mask from ids == pad, or answers cut by --max_len",
         ("end_not_supervised",), no_end_in_the_loss),
    Rule("sft", "a mask removes tokens that were counted", (), less_in_the_loss),
    Rule("sft", "documents of a packed row see each other", ("packing_leaks",), packing_leaks),
    Rule("reward", "the file holds another model: was the head saved?", ("head_lost_on_save",), file_differs),
    Rule("reward", "padding is read: the score belongs to the last real token", ("score_at_last_column",),
         padding_scores),
    # ---- statistics and shapes: what is likely
    Rule("ppo", "what was judged well becomes less likely: sign or ratio of the policy loss", ("ratio_inverted",),
         scores_fall),
    Rule("ppo", "every rollout draws the same noise: seed once", ("reseeded_rollouts",), noise_repeats),
    Rule("ppo", "ending is not worth it: --missing_eos, or a reward model that likes length", (), stops_ending),
    Rule("ppo", "length is paid: a reward model that likes it, or a room that is too small", (), fills_its_room),
    Rule("ppo", "the value learns nothing: returns, slice or --value_lr", (), value_knows_nothing),
    Rule("sft", "labels are not shifted: the model copies", ("no_shift",), sft_loss_too_good),
    Rule("sft", "answers do not end: no end token was learned, or --answer_len is short", ("end_not_supervised",),
         sft_never_ends),
    Rule("sft", "over-fitted: fewer epochs", (), sft_loss_rises),
    Rule("reward", "chosen and rejected are exchanged", (), swapped),
    Rule("reward", "the labels are noise, or nothing was learned", (), coin),
    Rule("reward", "it has learned the length", (), only_length),
    Rule("reward", "over-fitted (one epoch is enough), or training compares other pairs, say only those of the best",
         ("only_the_best",), not_the_held_out_loss),
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
    tolerance = 1e-3 if "float32" in about["dtype"] else 2e-2
    return about["stage"], bands.columns(bands.log_of(folder)), {**about["config"], "tolerance": tolerance}


def check(folder: Path, file: Path | None = None) -> bool:
    """Prints PASS or FAIL of one run, and why. file: expected curves; None: those that the run names, if any."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (stage, log, settings), gate, failed = read(folder), folder / "gate.json", []
    if gate.exists():
        failed = [f"{c['name']} {c['figure']}" for c in json.loads(gate.read_text(encoding="utf-8"))["checks"]
                  if not c["ok"]]
    found, far, ranges, note = diagnose(stage, log, settings), [], {}, ""
    if file := file or bands.named_by(folder, about):
        ranges, what = bands.beside(about, json.loads(file.read_text(encoding="utf-8")))
        far, note = bands.unusual(log, ranges), f", {'beside' if ranges else 'not beside'} {file.name}: {what}"
    sound = not (failed or found or bands.too_many(far, ranges))               # how often that is wrong: bands.py
    print(f"{'PASS' if sound else 'FAIL'} {stage} ({folder}{note})")
    for line in [f"gate: {x}" for x in failed] + [f"unusual: {x}" for x in far]:
        print(f"    {line}")
    for i, (rule, saw) in enumerate(found):
        print(f"    {'likeliest cause' if i == 0 else 'or'}: {rule.cause}   ({saw})")
    return sound


# ---------------------------------------------------------------- how often the rules are right

OUTCOMES = ("exact", "family", "wrong", "silent", "crash")


@dataclass
class Verdict:
    bug: str
    stage: str
    shows: bool                        # every seed ends outside what sound runs reach: a curve of the truth tells
    symptom: str                       # whether the signs of course/bugs.py hold in these runs: yes, no or none
    outcomes: list[str]                # per seed, of the first cause given
    said: str                          # by the first rule, of the first seed that is not silent


def first_causes(stage: str, curves: list, changes: dict) -> list[Rule | None]:
    """The likeliest rule for every run of the zoo, None where all are silent."""
    from course import tree
    base = {"ppo": asdict(tree.config(batch_size=64, micro_batch=64))}.get(stage, {})
    logs = [{name: values for table in curve for name, values in table.items() if name not in ("step", "crash")}
            for curve in curves]
    found = [diagnose(stage, log, {**base, **changes}) for log in logs]
    return [rules[0][0] if rules else None for rules in found]


def outcome(bug: str, curve: list, rule: Rule | None) -> str:
    if "crash" in curve[0]:
        return "crash"
    if rule is None:
        return "silent"
    return "wrong" if bug not in rule.bugs else "exact" if len(rule.bugs) == 1 else "family"


def judge_zoo(result: dict) -> list[Verdict]:
    """Every run of the zoo through the rules."""
    from course import bugs, zoo
    verdicts = []
    for name, entry in result["bugs"].items():
        rules = first_causes(entry["stage"], entry["curves"], json.loads(entry["sound"].split(" ", 1)[1]))
        sound, signs = result["sound"][entry["sound"]], bugs.BUGS[name].signs
        holds = all(zoo.shows(sign, entry["curves"], sound) for sign in signs)
        verdicts.append(Verdict(name, entry["stage"], zoo.seen(entry, sound),
                                "none" if not signs else "yes" if holds else "no",
                                [outcome(name, curve, rule) for curve, rule in zip(entry["curves"], rules)],
                                next((rule.cause for rule in rules if rule), "")))
    return verdicts


def sound_runs(result: dict) -> list[tuple[str, str]]:
    """(stage, cause that is wrongly given or "") of each sound run. Runs whose logs are equal but for rounding are one
    run, however their settings are called: --micro_batch and --merge change nothing but memory and time."""
    found, kept = [], []
    for key, curves in result["sound"].items():
        stage, text = key.split(" ", 1)
        for curve, rule in zip(curves, first_causes(stage, curves, json.loads(text))):
            flat = {(name, x): y for table in curve for name in table for x, y in zip(table["step"], table[name])}
            if not any(flat.keys() == other.keys() and all(abs(y - other[at]) < 1e-3 for at, y in flat.items())
                       for other in kept):
                kept.append(flat)
                found.append((stage, rule.cause if rule else ""))
    return found


def elsewhere(runs: list[Path]) -> dict[str, list[list[str]]]:
    """Of sound runs in these folders: [run, stage, cause that is wrongly given or ""]."""
    found = {}
    for top in runs:
        for file in sorted(top.glob("**/metrics.jsonl")):
            stage, log, settings = read(file.parent)
            rules = diagnose(stage, log, settings)
            found.setdefault(top.resolve().name, []).append([file.parent.relative_to(top).as_posix(), stage,
                                                             rules[0][0].cause if rules else ""])
    return found


def zoo_table(result: dict) -> str:
    """How often the first rule names the bug, for bugs that a curve shows and for those that none does."""
    verdicts = judge_zoo(result)
    lines = ["# check.py on runs whose bug is known", "",
             f"Made by `python course/check.py --zoo` from the logs of `{result['command']}`, {result['date']}, commit "
             f"{result['git'][:7]}{result['git'][40:]}, torch {result['torch']}, seeds "
             f"{', '.join(map(str, result['seeds']))}; rules and symptoms were written with other "
             "seeds (docs/results/zoo.md). Exact: the first cause given is for this bug alone. Family: it stands for "
             'several bugs whose logs look alike, and this is one of them. "Curve" as in zoo.md; "symptom": whether '
             "that of zoo.md holds here too. Sound runs of other tasks are the folders that were named behind "
             "--zoo FILE.", "",
             f"| bugs | runs | {' | '.join(OUTCOMES)} |", f"|---|---|{'---|' * len(OUTCOMES)}"]
    for title, some in (("whose curve shows it", [v for v in verdicts if v.shows]),
                        ("whose curve looks sound", [v for v in verdicts if not v.shows]), ("all", verdicts)):
        n = [sum(v.outcomes.count(x) for v in some) for x in OUTCOMES]
        lines.append(f"| {title} ({len(some)}) | {sum(n)} | {' | '.join(map(str, n))} |")
    signs = [v.symptom for v in verdicts]
    lines += ["", f"Of the {len(signs) - signs.count('none')} bugs with a symptom, {signs.count('yes')} show it in all "
              "of these runs too.", "", "| sound runs | stage | runs | false alarms | what was said |",
              "|---|---|---|---|---|"]
    sound = [("the zoo", stage, said) for stage, said in sound_runs(result)]
    sound += [(name, stage, said) for name, runs in result.get("elsewhere", {}).items() for _, stage, said in runs]
    for name, stage in dict.fromkeys((name, stage) for name, stage, _ in sound):
        said = [x for a, b, x in sound if (a, b) == (name, stage)]
        alarms = [x for x in said if x]
        lines.append(f"| {name} | {stage} | {len(said)} | {len(alarms)} | {'; '.join(dict.fromkeys(alarms))} |")
    lines += ["", "| bug | stage | curve | symptom | by seed | what is said |", "|---|---|---|---|---|---|"]
    lines += [f"| `{v.bug}` | {v.stage} | {'shows it' if v.shows else 'looks sound'} | {v.symptom} | "
              f"{', '.join(v.outcomes)} | {v.said or 'nothing'} |" for v in verdicts]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="a run folder, or a folder of them")
    parser.add_argument("--expected", type=Path, help="a file of course/expected; else the one that the run names")
    parser.add_argument("--zoo", type=Path, metavar="FILE", help="a file of zoo.py: how often the rules are right; "
                        "RUN_DIRs are then sound runs, whose false alarms are counted")
    parser.add_argument("--out", type=Path, help="where that is written; else it is printed")
    args = parser.parse_args(argv)
    if not args.runs and not args.zoo:
        parser.error("nothing to check: name a RUN_DIR")
    for file in (args.expected, args.zoo):
        if file and not file.exists():
            raise common.UserError(f"{file} does not exist; expected curves are in course/expected, the zoo's in "
                                   "docs/results")
    if args.zoo:
        result = json.loads(args.zoo.read_text(encoding="utf-8"))
        if args.runs:
            from course import zoo
            result["elsewhere"] = elsewhere(args.runs)
            zoo.write(args.zoo, result)
        text = zoo_table(result)
        common.atomic_write(args.out, text) if args.out else print(text)
        return True
    folders = [file.parent for run in args.runs for file in sorted(run.glob("**/metrics.jsonl"))]
    if not folders:
        raise common.UserError(f"{args.runs[0]} holds no run: no metrics.jsonl in it, nor in a folder below")
    stages = {folder: json.loads((folder / "config.json").read_text(encoding="utf-8"))["stage"] for folder in folders}
    ordered = sorted(folders, key=lambda f: (f.parent, STAGES.index(stages[f])))
    return all([check(folder, args.expected) for folder in ordered])


if __name__ == "__main__":
    common.main(lambda: main(sys.argv[1:]))
