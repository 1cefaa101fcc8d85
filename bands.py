"""Expected curves: what several seeds of one run logged, as median and range of every metric, step by step.

A run is unusual where most of its last fifth lies outside the range of earlier seeds, widened by half of it on either
side: five seeds do not know the tails, and the last update alone says little. report.py draws the range behind a live
curve, course/check.py judges by it, the gates of make demo use the figures at the end. Files stand in course/expected;
a run whose config.json names one (`expected`) finds it by itself, and uses it where its settings are those of the file.

    python demo.py --bands                     # an hour     -> course/expected/demo.json
    python course/tree.py --bands              # minutes     -> course/expected/tree.json; randomwalks.py too
    python course/goodhart.py --bands --out_dir docs/results                          # -> course/expected/lab.json
"""
import dataclasses
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import common

ROOT = Path(__file__).parent
CLOCK = ("seconds", "tokens_per_sec")                          # what depends on the machine: no band, nor time/
PLACES = ("init", "reward", "seed", "seeds", "out_dir", "overwrite", "resume", "bands", "expected", "device", "dtype",
          "save_every")                                        # and options that move no curve


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


def spread(values: list[float]) -> list[float]:
    """The band of one figure: the seeds' range, widened by half of it on either side."""
    low, high = min(values), max(values)
    margin = max(0.5 * (high - low), 0.02 * abs(statistics.mean(values)))
    return [low - margin, high + margin]


def curves(logs: list[list[dict]], metrics: tuple[str, ...] | None = None) -> dict[str, dict[str, list]]:
    """{metric: {step, low, median, high}} over the logs of several seeds, for the steps that all of them have; without
    `metrics` every number that does not tell the time."""
    names = metrics or [name for name in dict.fromkeys(k for row in logs[0] for k in row)
                        if name not in ("step", *CLOCK) and not name.startswith("time/")]
    found = {}
    for name in names:
        series = [{row["step"]: row[name] for row in log if isinstance(row.get(name), (int, float))} for log in logs]
        steps = sorted(set.intersection(*map(set, series)))
        values = [[s[step] for s in series] for step in steps]
        if steps or metrics:
            found[name] = {"step": steps, "low": [min(v) for v in values], "high": [max(v) for v in values],
                           "median": [statistics.median(v) for v in values]}
    return found


def at_the_end(logs: list[list[dict]], names) -> dict[str, list[float]]:
    """{metric: its last value in each log}."""
    return {name: [next(row[name] for row in reversed(log) if row.get(name) is not None) for log in logs]
            for name in names}


def settings(config: dict) -> dict:
    """The options of a run that its curves depend on, as JSON holds them."""
    return json.loads(json.dumps({name: x for name, x in config.items() if name not in PLACES}, default=str))


def write(file: str | Path, result: dict, figures: dict[str, list[float]]) -> None:
    """course/expected/X.json: how it was made, each figure of each seed with its band, and the curves in `result`."""
    about = {"command": "python " + " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"),
             "machine": machine()}
    told = {"bands": {name: spread(values) for name, values in figures.items()}, "figures": figures}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded({**about, **told, **result}), indent=1)
    lists = re.sub(r"\[[^\[\]{}]+\]", lambda numbers: " ".join(numbers[0].split()), text)     # one line each
    common.atomic_write(file, lists + "\n")
    for name, values in figures.items():
        low, high = told["bands"][name]
        print(f"{name:40} median {statistics.median(values):9.4g}   {min(values):9.4g} .. {max(values):9.4g}   band "
              f"{low:9.4g} .. {high:9.4g}")


def rounded(x):
    """Six digits of every number: more would only be noise, and a file of bands is read by people."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.6g}") if isinstance(x, float) else x


def make(file: str, kinds: dict[str, object], main: Callable[[object], bool], seeds: tuple[int, ...]) -> bool:
    """Runs every kind {name: Config} with every seed, main(Config) each, and writes the bands of all. A run that is
    there already is not run again."""
    logs: dict[str, list[list[dict]]] = {}
    seconds, gates = {}, {}
    for name, cfg in kinds.items():
        for seed in seeds:
            out = Path(cfg.out_dir) / f"{name.replace(' ', '_')}_seed_{seed}"
            if not (out / "gate.json").exists():
                main(dataclasses.replace(cfg, seed=seed, out_dir=str(out), bands=False, overwrite=True))
            logs.setdefault(name, []).append(log_of(out))
            seconds.setdefault(name, []).append(logs[name][-1][-1]["seconds"])
            gates.setdefault(name, []).append(json.loads((out / "gate.json").read_text(encoding="utf-8"))["passed"])
    drawn = {name: curves(found) for name, found in logs.items()}
    figures = {f"{name}: {metric}": values for name, found in logs.items()
               for metric, values in at_the_end(found, drawn[name]).items()}
    write(ROOT / file, {"threads": 1, "torch": torch.__version__, "seeds": list(seeds), "gates": gates,
                        "seconds": seconds, "settings": {name: settings(dataclasses.asdict(cfg))
                                                         for name, cfg in kinds.items()}, "curves": drawn}, figures)
    return all(all(passed) for passed in gates.values())


# ---------------------------------------------------------------- beside a run

def named_by(folder: Path, about: dict) -> Path | None:
    """The file that a run names: `expected` in its config.json, or in the demo.json of the chain that it belongs to."""
    chain = folder.resolve().parent / "demo.json"
    record = json.loads(chain.read_text(encoding="utf-8")) if chain.exists() else {}
    name = about.get("config", {}).get("expected") or record.get("expected")
    return ROOT / name if name and (ROOT / name).exists() else None


def beside(about: dict, expected: dict) -> tuple[dict[str, dict], str]:
    """The curves of the file that a run may be compared with, and what they are called; {} and why there are none. A
    file with settings wants a run with these; one without (demo.json) has one entry per stage."""
    found = expected.get("curves") or {}
    if "settings" not in expected:
        return found.get(about["stage"], {}), about["stage"]
    mine, differences = settings(about["config"]), []
    for name, theirs in expected["settings"].items():
        other = [f"{k} {mine.get(k)!r} (there {x!r})" for k, x in theirs.items() if mine.get(k) != x]
        if not other:
            return found[name], name
        differences.append(f"{name}: {', '.join(other[:3])}")
    return {}, "its settings are others: " + "; ".join(differences)


def unusual(log: dict[str, list[float]], bands: dict[str, dict]) -> list[str]:
    """Metrics of a log {metric: values in order} that leave the range in more than half of the last fifth."""
    found = []
    for name, band in bands.items():
        n = min(len(log.get(name, ())), len(band["step"]))
        tail = max(1, n // 5)
        if not n:
            continue
        rows = list(zip(*(band[key][n - tail:n] for key in ("low", "median", "high")), log[name][n - tail:n]))
        margins = [0.5 * (high - low) + 0.02 * abs(median) + 1e-9 for low, median, high, _ in rows]
        if sum(not low - m <= x <= high + m for (low, _, high, x), m in zip(rows, margins)) > tail / 2:
            low, _, high, x = rows[-1]
            found.append(f"{name} ends at {x:.3g}, seeds before it at {low:.3g} .. {high:.3g}")
    return found
