"""The report of a run, or of a chain of runs: one HTML file that needs nothing else, no network and no script.

It is read from what a run folder holds (config.json, metrics.jsonl, samples.jsonl, gate.json) and shows, in the order
of the questions one asks: did it work (gates), what does it write now (the same prompts answered by several models),
how did it get there (curves, and behind them the band of earlier seeds), what did it cost (time, memory, versions), and
what do the figures mean (the glossary of docs/metrics.md).

The curves are SVG written by hand: a viewBox scales to a phone and to paper, and a <title> is shown by the pointer.
A value that is null in metrics.jsonl was no number: it leaves a gap in its line, and the legend says so.

    python report.py out/sft                                        # -> out/sft/report.html
    python report.py out/sft out/reward out/ppo --out report.html
    python report.py out/demo --bands course/expected/demo.json     # every run in that folder
"""
import argparse
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import common

GLOSSARY = Path(__file__).parent / "docs" / "metrics.md"
# Per stage: the title of a plot, its metrics, and values that its axis always reaches, so that noise looks like noise.
PLOTS: dict[str, list[tuple[str, tuple[str, ...], tuple[float, ...]]]] = {
    "sft": [
        ("Loss per supervised token, nats", ("loss", "eval/loss"), ()),
        ("Share of answers that end", ("eval/eos_rate",), (0, 1)),
        ("Gradient norm", ("grad_norm",), (0,)),
        ("Learning rate", ("lr",), (0,)),
        ("Speed, tokens a second", ("tokens_per_sec",), (0,))],
    "reward": [
        ("Ranking loss", ("loss",), (0.6931,)),
        ("Accuracy", ("accuracy", "eval/accuracy", "eval/longer_wins"), (0.4, 1)),
        ("Margin, better minus worse", ("margin", "eval/margin"), (0,)),
        ("Gradient norm", ("grad_norm",), (0,)),
        ("Learning rate", ("lr",), (0,)),
        ("Speed, tokens a second", ("tokens_per_sec",), (0,))],
    "ppo": [
        ("Reward: learned (proxy) and gold", ("objective/scores", "gold/score", "eval/scores"), (0,)),
        ("KL to the reference, nats per answer", ("objective/kl", "objective/kl_k3", "eval/kl"), (0,)),
        ("Share of answers that end", ("val/eos_rate", "eval/eos_rate"), (0, 1)),
        ("Answer length, tokens", ("val/response_length", "eval/response_length"), (0,)),
        ("Entropy, nats per answer", ("objective/entropy",), ()),
        ("Entropy, nats per token", ("policy/entropy_avg",), ()),
        ("What is maximised: score - beta KL", ("objective/rlhf_reward", "objective/non_score_reward"), (0,)),
        ("Probability ratio", ("val/ratio",), (0.95, 1.05)),
        ("Size of one update", ("policy/approxkl_avg", "val/ratio_var"), (0,)),
        ("Share of clipped tokens", ("policy/clipfrac_avg", "val/clipfrac_avg"), (0,)),
        ("Policy loss", ("loss/policy_avg",), (0,)),
        ("Value loss", ("loss/value_avg",), (0,)),
        ("Explained variance of the value", ("val/explained_variance",), (0, 1)),
        ("Gradient norms", ("policy/grad_norm", "value/grad_norm"), (0,)),
        ("Same distribution? Log-probability gaps", ("val/sampler_gap", "val/first_ratio_gap"), (0,)),
        ("Seconds per update", ("time/generate", "time/score", "time/train"), (0,)),
        ("Learning rate", ("lr",), (0,)),
        ("Speed, answer tokens a second", ("tokens_per_sec",), (0,))],
}
W, H, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 56, 12, 12, 40      # a plot in units of its viewBox
POINTS, HOVERS, SHOWN, LONGEST = 240, 60, 8, 1500     # what is drawn at most: the file stays far below a megabyte


# ---------------------------------------------------------------- what a run folder holds

@dataclass
class Stage:
    """One run folder: `name` is the heading, `kind` the script that wrote it (which plots, bands and meanings)."""
    name: str
    kind: str
    dir: Path
    gate: dict | None
    config: dict
    samples: list[dict]
    series: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise common.UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise common.UserError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def read_lines(path: Path) -> list[dict]:
    """A .jsonl file; [] when there is none. The last line may be cut off: the run is being written, or was killed."""
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")     # not splitlines(): a text may hold U+2028
    for i, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if i < len(lines):
                raise common.UserError(f"{path}:{i}: not JSON ({error}): mend or delete this line") from None
        if rows and not isinstance(rows[-1], dict):
            raise common.UserError(f"{path}:{i}: expected an object with named values, found {line[:60]}")
    return rows


def read_run(name: str, folder: str | Path) -> Stage:
    folder = Path(folder)
    if not folder.is_dir():
        raise common.UserError(f"the report of {name} needs the run folder {folder}, which does not exist: give the "
                               "--out_dir of a run")
    gate = read_json(folder / "gate.json") if (folder / "gate.json").exists() else None
    if gate and not {"passed", "checks"} <= set(gate):
        raise common.UserError(f"{folder / 'gate.json'} lacks 'passed' or 'checks', it has {', '.join(gate)}")
    if not gate and not (folder / "metrics.jsonl").exists():
        raise common.UserError(f"{folder} holds neither metrics.jsonl nor gate.json: it is no run folder, or its run "
                               "stopped before the first step")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    stage = Stage(name, config.get("stage", name), folder, gate, config, read_lines(folder / "samples.jsonl"))
    for file in ("metrics.jsonl", "gold.jsonl"):
        for row in read_lines(folder / file):
            for metric, value in row.items():
                if metric != "step" and "step" in row and (value is None or isinstance(value, (int, float))):
                    stage.series.setdefault(metric, []).append((row["step"], finite(value)))
    for points in stage.series.values():
        points.sort(key=lambda point: point[0])
    return stage


def finite(x) -> float | None:
    return float(x) if isinstance(x, (int, float)) and abs(x) < 1e300 else None          # False for nan as well


# ---------------------------------------------------------------- curves

def esc(text: object) -> str:
    """Text as HTML shows it. Models write anything: tags, control characters, halves of a surrogate pair."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", str(text).replace("\r\n", "\n"))
    return html.escape(clean.encode("utf-8", "replace").decode("utf-8"))


def number(x: float) -> str:
    return f"{x:.4g}"


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """At most six round numbers from low to high: 1, 2 or 5 times a power of ten apart.   0.1, 0.93 -> 0.2 .. 0.8"""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    gap = max(1.0, gap) if whole else gap
    digits = max(0, -math.floor(math.log10(gap)))
    return [round(k * gap, digits) for k in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


@dataclass
class Frame:
    """From steps and values to places in the viewBox."""
    x0: float
    x1: float
    y0: float
    y1: float

    def at(self, x: float, y: float) -> str:
        across = LEFT + (x - self.x0) / (self.x1 - self.x0) * (W - LEFT - RIGHT)
        return f"{across:.1f},{H - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (H - TOP - BOTTOM):.1f}"


def frame(lines: list[list], reach: Sequence[float]) -> Frame:
    """The smallest frame around all points and the values that the axis must reach, with a little air."""
    xs = [x for points in lines for x, _ in points] or [0]
    ys = [y for points in lines for _, y in points if y is not None] + list(reach) or [0]
    low, high = min(ys), max(ys)
    if high - low <= 1e-9 * max(abs(low), abs(high)):                                # one value: in the middle
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    air = 0.04 * (high - low)
    return Frame(min(xs), max(max(xs), min(xs) + 1), low - air * (low not in reach), high + air * (high not in reach))


def axes(f: Frame) -> str:
    parts = []
    for y in ticks(f.y0, f.y1):
        (x, place), end = f.at(f.x0, y).split(","), W - RIGHT
        parts.append(f'<line class="grid" x1="{x}" y1="{place}" x2="{end}" y2="{place}"/>'
                     f'<text x="{LEFT - 6}" y="{float(place) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(f.x0, f.x1, whole=True):
        place = f.at(x, f.y0).split(",")[0]
        parts.append(f'<line class="axis" x1="{place}" y1="{H - BOTTOM}" x2="{place}" y2="{H - BOTTOM + 4}"/>'
                     f'<text x="{place}" y="{H - BOTTOM + 18}" text-anchor="middle">{x:.10g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{H - BOTTOM}" x2="{W - RIGHT}" y2="{H - BOTTOM}"/>'
                 f'<text x="{(LEFT + W - RIGHT) / 2}" y="{H - 5}" text-anchor="middle">step</text>')
    return "".join(parts)


def thin(points: list, most: int = POINTS) -> list:
    """Long lines keep the lowest and highest point and the first gap of every stretch: no spike gets lost."""
    size, kept = max(1, math.ceil(3 * len(points) / most)), []
    for i in range(0, len(points) if size > 1 else 0, size):
        part = points[i:i + size]
        known = sorted((p for p in part if p[1] is not None), key=lambda p: p[1])
        kept += sorted({*known[:1], *known[-1:], *[p for p in part if p[1] is None][:1]}, key=lambda p: p[0])
    return kept or points


def line(f: Frame, name: str, points: list, k: int, whiskers: dict) -> str:
    """One metric: a path broken at gaps, dots where there are few or where a point stands alone, texts to hover."""
    points, pieces, parts = thin(points), [[]], []
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    pieces = [piece for piece in pieces if piece]
    path = " ".join("M" + " L".join(f.at(*p) for p in piece) for piece in pieces if len(piece) > 1)
    parts.append(f'<path class="line s{k}" d="{path}"/>' if path else "")
    known = [p for piece in pieces for p in piece]
    every = math.ceil(len(known) / HOVERS) or 1
    alone = [piece[0] for piece in pieces if len(piece) == 1]
    for i, (x, y) in enumerate(known):
        (px, py), text = f.at(x, y).split(","), f"{name}, step {x:.10g}: {number(y)}"
        if x in whiskers:
            low, high = (f.at(x, end).split(",")[1] for end in whiskers[x])
            parts.append(f'<line class="whisker s{k}" x1="{px}" y1="{low}" x2="{px}" y2="{high}"/>')
            text += f" (95 % interval {number(whiskers[x][0])} .. {number(whiskers[x][1])})"
        if len(known) <= 20 or (x, y) in alone:
            parts.append(f'<circle class="dot s{k}" cx="{px}" cy="{py}" r="3"/>')
        if i % every == 0 or i == len(known) - 1:
            parts.append(f'<circle class="hover" cx="{px}" cy="{py}" r="8"><title>{esc(text)}</title></circle>')
    return "".join(parts)


def band_points(band: dict | None) -> list[tuple[float, float, float, float]]:
    """(step, low, median, high) where all of them are numbers."""
    rows = zip(*(band[key] for key in ("step", "low", "median", "high")), strict=True) if band else []
    return [row for row in rows if all(finite(x) is not None for x in row)]


def draw_band(f: Frame, band: list, k: int) -> str:
    there, back = [f.at(x, high) for x, _, _, high in band], [f.at(x, low) for x, low, _, _ in reversed(band)]
    middle = " ".join(f.at(x, median) for x, _, median, _ in band)
    return (f'<polygon class="band s{k}" points="{" ".join(there + back)}"/>'
            f'<polyline class="median s{k}" points="{middle}"/>')


def plot(title: str, names: Sequence[str], reach: Sequence[float], stage: Stage, bands: dict, healthy: dict) -> str:
    """One figure with the metrics of `names` that were logged; empty when none was."""
    names = [name for name in names if any(y is not None for _, y in stage.series.get(name, []))]
    if not names:
        return ""
    whiskers = {name: {x: (low, high) for (x, low), (_, high) in zip(*(stage.series[name + end] for end in (
        "_low", "_high"))) if low is not None} for name in names if name + "_low" in stage.series}
    shades = {name: band_points(bands.get(name)) for name in names}
    edges = [[(x, y) for x, *ys in shade for y in ys] for shade in shades.values()]
    edges += [[(x, y) for x, ys in ends.items() for y in ys] for ends in whiskers.values()]
    f = frame([stage.series[name] for name in names] + edges, reach)
    lines, legend = [], []
    for k, name in enumerate(names, 1):
        values = [y for _, y in stage.series[name]]
        known = [y for y in values if y is not None]
        lost = f", {len(values) - len(known)} values were no numbers" if len(known) < len(values) else ""
        lines.append(line(f, name, stage.series[name], k, whiskers.get(name, {})))
        legend.append(f'<li class="s{k}"><i></i><a href="#{esc(stage.kind)}-{esc(name)}">{esc(name)}</a> '
                      f'{number(known[0])} &rarr; {number(known[-1])}{lost}</li>')
    shaded = "".join(draw_band(f, shades[name], k) for k, name in enumerate(names, 1) if shades[name])
    notes = [f"<b>{esc(name)}</b> {inline(healthy[key])}" for name in names
             if (key := (stage.kind, name)) in healthy or (key := ("", name)) in healthy]
    return (f'<figure><h4>{esc(title)}</h4><ul class="legend">{"".join(legend)}</ul>'
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(title)} over steps">{axes(f)}{shaded}'
            f'{"".join(lines)}</svg>{"<p>shaded: range of earlier seeds, dotted: their median</p>" if shaded else ""}'
            f'<figcaption>{"<br>".join(notes)}</figcaption></figure>')


def curves(stage: Stage, bands: dict, healthy: dict) -> str:
    """The plots that tell most, then, folded away, every other metric that was logged."""
    wanted = PLOTS.get(stage.kind, [])
    seen = {name for _, names, _ in wanted for name in names}
    rest = [name for name in stage.series if name not in seen and not name.endswith(("_low", "_high"))]
    main_plots = "".join(plot(*spec, stage, bands, healthy) for spec in wanted)
    others = "".join(plot(name, (name,), (), stage, bands, healthy) for name in rest)
    return (f'<div class="plots">{main_plots}</div>' if main_plots else "") + (
        f'<details><summary>{len(rest)} more metrics</summary><div class="plots">{others}</div></details>'
        if others else "")
