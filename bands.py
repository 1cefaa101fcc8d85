"""Expected curves: what several seeds of one run logged, and where another sound run may lie.

`low`, `median` and `high` are the seeds' range, step by step, and are drawn. Five or ten seeds do not reach the tails:
of new runs one in three leaves the range of five somewhere. What is judged is Student's prediction interval for one run
more (`from` .. `to`), with s the standard deviation of n seeds, on a scale where it makes sense: logit of a rate, log
of what is positive, else as it is:

    mean +- t(n - 1) s sqrt(1 + 1/n)

A metric is unusual where most of its last fifth lies outside, a run where k of its m metrics are: two, or a tenth of
them. Each step's interval leaves out LEVEL k / (2 m), so that at most LEVEL of sound runs are called unusual, however
much their metrics hang together (twice Markov's inequality: over steps and over metrics); of the demo's figures at the
end k = 1 is enough. How often it happens to runs that are known to be sound, each beside the other seeds, is counted
when a file is made (`left_out`) and told in docs/results/bands.md.

report.py draws these curves behind a live one, course/check.py judges by them, so do the gates of make demo. Files
stand in course/expected; a run whose config.json names one (`expected`) finds it by itself, and uses it where its
settings are those of the file.

    python demo.py --bands                     # hours       -> course/expected/demo.json
    python course/tree.py --bands              # minutes     -> course/expected/tree.json; randomwalks.py too
    python course/goodhart.py --bands          # after a run -> course/expected/lab.json
    python bands.py                            # how often they are wrong -> docs/results/bands.md
"""
import dataclasses
import functools
import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import common

ROOT = Path(__file__).parent
EDGE = 0.005                                                   # 0 and 1 have no logit: half a percent is near enough
LEVEL = 0.05                                                   # of sound runs that may be called unusual
CLOCK = ("seconds", "tokens_per_sec")                          # what depends on the machine: no band, nor time/
PLACES = ("init", "reward", "seed", "seeds", "out_dir", "overwrite", "resume", "bands", "expected", "device", "dtype",
          "save_every")                                        # and options that move no curve
RATE = re.compile(r"(_rate|accuracy(_low|_high)?|_wins|ceiling|clipfrac_avg)$")
POSITIVE = re.compile(r"(kl|kl_k3|entropy(_avg)?|_std|_rms|_var|_norm|_gap|approxkl_avg|error_avg|length|loss|"
                      r"value_avg|regret)$")


# ---------------------------------------------------------------- one run more

def inside(t: float, df: int) -> float:
    """P(|T| < t) of Student's t (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, df + 1, 2):
        total, term = total + term, term * math.cos(angle) ** 2 * (k - 1) / k
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@functools.cache
def quantile(outside: float, df: int) -> float:
    """The t that |T| exceeds with this probability: quantile(0.05, 4) = 2.776"""
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, df) < 1 - outside else (low, middle)
    return high


def logit(x: float) -> float:
    x = min(max(x, EDGE), 1 - EDGE)
    return math.log(x / (1 - x))


def rate(y: float) -> float:
    """What has this logit; where logit was cut off, 0 or 1."""
    return float(y > 0) if abs(y) >= logit(1) else 1 / (1 + math.exp(-y))


def spread(name: str, values: list[float], outside: float = LEVEL) -> list[float]:
    """Where this figure of one run more lies, but for a share `outside` of sound runs. Never less than 2 % around what
    was seen: a figure that was the same in every seed says nothing of its spread."""
    n, there, back = len(values), float, float
    if RATE.search(name):
        there, back = logit, rate
    elif POSITIVE.search(name) and min(values) > 0:
        there, back = math.log, lambda y: math.exp(min(y, 700))
    points, least = [there(x) for x in values], 0.02 * abs(statistics.mean(values)) + 1e-9
    middle, half = statistics.mean(points), quantile(outside, n - 1) * statistics.stdev(points) * math.sqrt(1 + 1 / n)
    return [min(back(middle - half), min(values) - least), max(back(middle + half), max(values) + least)]


def enough(m: int) -> int:
    """Of m metrics so many make a run unusual."""
    return min(m, max(2, math.ceil(m / 10)))


def machine() -> str:
    """The processor by its name, and how many cores of it there are."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.M) if info.exists() else []
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"


def rows_of(path: Path) -> list[dict]:
    """The rows of a .jsonl file. Not splitlines(): a text may hold U+2028, which JSON leaves as it is."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def log_of(folder: Path) -> list[dict]:
    """metrics.jsonl of a run, and gold.jsonl where a judge was asked afterwards."""
    return rows_of(folder / "metrics.jsonl") + (rows_of(folder / "gold.jsonl") if (folder / "gold.jsonl").exists()
                                                else [])


def columns(log: list[dict]) -> dict[str, list[float]]:
    """{metric: its values in order}, nan where there was no number."""
    found: dict[str, list[float]] = {}
    for row in log:
        for name, x in row.items():
            if isinstance(x, (int, float)) or x is None:
                found.setdefault(name, []).append(math.nan if x is None else float(x))
    return found


def curves(logs: list[list[dict]]) -> dict[str, dict[str, list]]:
    """{metric: {step, low, median, high, from, to}} over the logs of several seeds, for the steps that all of them
    have: every number that does not tell the time."""
    found = {}
    for name in dict.fromkeys(k for row in logs[0] for k in row):
        series = [{row["step"]: row[name] for row in log if isinstance(row.get(name), (int, float))} for log in logs]
        steps = sorted(set.intersection(*map(set, series)))
        if steps and name not in ("step", *CLOCK) and not name.startswith("time/"):
            found[name] = (steps, [[s[step] for s in series] for step in steps])
    outside = LEVEL * enough(len(found)) / (2 * max(1, len(found)))
    for name, (steps, values) in found.items():
        ends = [spread(name, v, outside) for v in values]
        found[name] = {"step": steps, "low": [min(v) for v in values], "median": [statistics.median(v) for v in values],
                       "high": [max(v) for v in values], "from": [a for a, _ in ends], "to": [b for _, b in ends]}
    return found


def unusual(log: dict[str, list[float]], bands: dict[str, dict]) -> list[str]:
    """Metrics of a log {metric: values in order} that lie outside in more than half of the last fifth."""
    found = []
    for name, band in bands.items():
        n = min(len(log.get(name, ())), len(band["step"]))
        tail = max(1, n // 5)
        if not n:
            continue
        rows = list(zip(*(band[key][n - tail:n] for key in ("from", "to")), log[name][n - tail:n]))
        if sum(not low <= x <= high for low, high, x in rows) > tail / 2:
            found.append(f"{name} ends at {rows[-1][2]:.3g}, expected {rows[-1][0]:.3g} .. {rows[-1][1]:.3g}: seeds "
                         f"before it at {band['low'][n - 1]:.3g} .. {band['high'][n - 1]:.3g}")
    return found


def too_many(far: list[str], bands: dict[str, dict]) -> bool:
    return bool(bands) and len(far) >= enough(len(bands))


# ---------------------------------------------------------------- files

def settings(config: dict) -> dict:
    """The options of a run that its curves depend on, as JSON holds them. Data made by an earlier stage of the same
    chain lie beside this stage's folder, wherever that is."""
    data = Path(config.get("data", ""))
    beside = "data" in config and data.parent == Path(config.get("out_dir", "")).parent
    config = {**config, "data": data.name} if beside else config
    return json.loads(json.dumps({name: x for name, x in config.items() if name not in PLACES}, default=str))


def differences(mine: dict, theirs: dict) -> list[str]:
    """Options of `theirs` that are others in `mine`, which may have more: options that came later."""
    return [f"{k} {mine.get(k)!r} (there {x!r})" for k, x in theirs.items() if mine.get(k) != x]


def finished(folder: Path, wanted: dict) -> bool:
    """Whether a run lies there that reached its gate, with these settings."""
    if not ((folder / "gate.json").exists() and (folder / "config.json").exists()):
        return False
    return not differences(wanted, settings(about(folder)["config"]))


def about(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def at_the_end(logs: list[list[dict]], names) -> dict[str, list[float]]:
    """{metric: its last value in each log}."""
    return {name: [next(row[name] for row in reversed(log) if row.get(name) is not None) for log in logs]
            for name in names}


def left_out(logs: list[list[dict]]) -> list[int]:
    """For every log how many of its metrics are unusual beside the others."""
    return [len(unusual(columns(log), curves(logs[:i] + logs[i + 1:]))) for i, log in enumerate(logs)]


def write(file: str | Path, runs: dict[str, list[Path]], seeds: tuple[int, ...],
          figures: dict[str, list[float]] | None = None, judged: tuple[str, ...] = (), **more) -> None:
    """course/expected/X.json from the run folders {kind: one per seed}: how they were made, their curves, their figures
    at the end (or `figures`), and bands of the `judged` ones, of which none may be left."""
    abouts, logs = ({kind: [read(f) for f in folders] for kind, folders in runs.items()} for read in (about, log_of))
    for kind, found in abouts.items():
        for folder, one in zip(runs[kind], found):
            if other := differences(settings(one["config"]), settings(found[0]["config"])):
                raise common.UserError(f"{folder} was made with other settings than {runs[kind][0]}: {other[0]}")
    drawn, every = {kind: curves(found) for kind, found in logs.items()}, [one for x in abouts.values() for one in x]
    figures = figures or {f"{kind}: {metric}": values for kind, found in logs.items()
                          for metric, values in at_the_end(found, drawn[kind]).items()}
    limits = {name: spread(name, figures[name], LEVEL / len(judged)) for name in judged}
    others = {kind: left_out(found) for kind, found in logs.items()} if len(seeds) > 2 else {}
    if others and judged:
        others["figures"] = [sum(not low <= x[i] <= high for name in judged for x in [figures[name]] for low, high in [
            spread(name, x[:i] + x[i + 1:], LEVEL / len(judged))]) for i in range(len(seeds))]
    result = {"command": "python " + " ".join(sys.argv), "date": max(one["date"] for one in every)[:10],
              "git": sorted({one["git"] for one in every}), "machine": machine(), "threads": 1,
              "torch": " ".join(sorted({one["versions"]["torch"] for one in every})),
              "dtype": " ".join(sorted({one["dtype"] for one in every})), "seeds": list(seeds),
              "minutes": {kind: [log[-1].get("seconds", 0) / 60 for log in found] for kind, found in logs.items()},
              **more, "left_out": others,
              "settings": {kind: settings(found[0]["config"]) for kind, found in abouts.items()},
              "bands": limits, "figures": figures, "curves": drawn}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**rounded(result), "curves": rounded(drawn, 4)}, indent=1)
    lists = re.sub(r"\[[^\[\]{}]+\]", lambda numbers: " ".join(numbers[0].split()), text)     # one line each
    common.atomic_write(file, lists + "\n")
    for name, values in figures.items():
        low, high = limits.get(name, (math.nan, math.nan))
        print(f"{name:40} median {statistics.median(values):9.4g}   {min(values):9.4g} .. {max(values):9.4g}" +
              f"   band {low:9.4g} .. {high:9.4g}" * (name in limits))


def rounded(x, digits: int = 6):
    """More digits would only be noise, and a file of bands is read by people."""
    if isinstance(x, dict):
        return {name: rounded(value, digits) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(y, digits) for y in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def make(file: str, kinds: dict[str, object], main: Callable[[object], bool], seeds: tuple[int, ...]) -> bool:
    """Runs every kind {name: Config} with every seed, main(Config) each, and writes the bands of all. A run that is
    there already, with these settings, is not run again."""
    runs = {name: [Path(cfg.out_dir) / f"{name.replace(' ', '_')}_seed_{seed}" for seed in seeds]
            for name, cfg in kinds.items()}
    for name, cfg in kinds.items():
        for seed, out in zip(seeds, runs[name]):
            if not finished(out, settings(dataclasses.asdict(cfg))):
                main(dataclasses.replace(cfg, seed=seed, out_dir=str(out), bands=False, overwrite=True))
    gates = {name: [json.loads((out / "gate.json").read_text(encoding="utf-8"))["passed"] for out in folders]
             for name, folders in runs.items()}
    write(ROOT / file, runs, seeds, gates=gates)
    return all(all(passed) for passed in gates.values())


# ---------------------------------------------------------------- beside a run

def named_by(folder: Path, about: dict) -> Path | None:
    """The file that a run names: `expected` in its config.json, or in the demo.json of the chain that it belongs to."""
    chain = folder.resolve().parent / "demo.json"
    record = json.loads(chain.read_text(encoding="utf-8")) if chain.exists() else {}
    name = about.get("config", {}).get("expected") or record.get("expected")
    return ROOT / name if name and (ROOT / name).exists() else None


def beside(about: dict, expected: dict) -> tuple[dict[str, dict], str]:
    """The curves of the file that a run may be compared with, and what they are called; {} and why there are none: a
    run is compared with runs of its settings only."""
    known = expected.get("settings") or {}
    if not known:
        return {}, "it does not say with which settings it was made"
    mine, told = settings(about["config"]), []
    for name in [about["stage"]] if about["stage"] in known else known:
        other = differences(mine, known[name])
        if not other:
            return expected["curves"][name], name
        told.append(f"{name}: {', '.join(other[:3])}")
    return {}, "its settings are others: " + "; ".join(told)


# ---------------------------------------------------------------- how often they are wrong

def alarms(files: list[Path]) -> list[dict]:
    """Of every kind of every file: its seeds, its metrics, how many of them make a run unusual, and how many are
    unusual in each seed beside the others."""
    rows = []
    for file in files:
        made = json.loads(file.read_text(encoding="utf-8"))
        for kind, found in made["left_out"].items():
            m = len(made["bands"] if kind == "figures" else made["curves"][kind])
            k = 1 if kind == "figures" else enough(m)
            rows.append({"file": file.name, "kind": kind, "metrics": m, "enough": k, "left_out": found,
                         "alarms": sum(n >= k for n in found)})
    return rows


def table(rows: list[dict]) -> str:
    lines = ["# How often a sound run is called unusual", "", "Made by `python bands.py` from course/expected: each "
             "seed beside the others of its file (leave one out), after the rule of bands.py.", "",
             "| file | runs of | metrics | unusual from | metrics outside, by seed | called unusual |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {r['file']} | {r['kind']} | {r['metrics']} | {r['enough']} | {' '.join(map(str, r['left_out']))} | "
              f"{r['alarms']} of {len(r['left_out'])} |" for r in rows]
    wrong, n = (sum(x) for x in zip(*((r["alarms"], len(r["left_out"])) for r in rows)))
    return "\n".join([*lines, f"| all | | | | | {wrong} of {n}, {wrong / n:.1%} |"]) + "\n"


def main() -> None:
    rows, out = alarms(sorted((ROOT / "course" / "expected").glob("*.json"))), ROOT / "docs" / "results"
    common.atomic_write(out / "bands.md", table(rows))
    common.atomic_write(out / "bands.json", json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    common.main(main)
