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


# ---------------------------------------------------------------- the glossary

def inline(text: str) -> str:
    """`code`, **bold** and [text](link) of Markdown; the links lead out of the file, so only their text stays."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", esc(text))
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text))


def blocks(text: str) -> list[tuple[str, str, list[list[str]]]]:
    """The headings, paragraphs and tables of Markdown: (kind, text, rows); a table's text is the script of its heading.
    A | inside a cell is written \\|, as Markdown asks."""
    found, script = [], ""
    for part in re.split(r"\n\s*\n|(?<=\n)(?=#)", text.replace("\r\n", "\n")):
        part = part.strip()
        if part.startswith("#"):
            script = (re.findall(r"`(\w+)\.py`", part) or [""])[0]
            found.append((f"h{min(4, len(part) - len(part.lstrip('#')) + 1)}", part.lstrip("# "), []))
        elif part.startswith("|"):
            rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]
                    for row in part.split("\n")]
            found.append(("table", script, [rows[0], *rows[2:]]))
        elif part:
            found.append(("p", part, []))
    return found


def glossary() -> tuple[str, dict[tuple[str, str], str]]:
    """docs/metrics.md as HTML, and the healthy range of (script, metric), which stands under the plots."""
    if not GLOSSARY.exists():
        raise common.UserError(f"{GLOSSARY} is missing: the report takes the meaning of the metrics from it")
    parts, healthy = [], {}
    for kind, text, rows in blocks(GLOSSARY.read_text(encoding="utf-8")):
        if kind != "table":
            parts.append(f"<{kind}>{inline(text)}</{kind}>")
            continue
        head, *body = rows
        parts.append("<table><tr>" + "".join(f"<th>{inline(cell)}</th>" for cell in head) + "</tr>")
        for row in body:
            name = row[0].strip("`")
            healthy[text, name] = row[2]
            cells = "".join(f'<td data-label="{esc(h)}">{inline(c)}</td>' for h, c in zip(head, row, strict=True))
            parts.append(f'<tr id="{esc(text)}-{esc(name)}">{cells}</tr>')
        parts.append("</table>")
    return "".join(parts), healthy


# ---------------------------------------------------------------- the other sections

def gates(stages: list[Stage]) -> str:
    parts = []
    for stage in stages:
        if not stage.gate:
            parts.append(f'<div class="gate none"><h3>{esc(stage.name)}: no gate yet</h3><p>It is passed or failed at '
                         "the end of the run; this one has not come there.</p></div>")
            continue
        ok = bool(stage.gate["passed"])
        checks = "".join(f'<li>{"&#10003;" if c["ok"] else "&#10007; <b>FAILED</b>"} {esc(c["name"])}: '
                         f'{esc(c["figure"])}</li>' for c in stage.gate["checks"])
        advice = "" if ok or not stage.gate.get("advice") else f'<p><b>What to do:</b> {esc(stage.gate["advice"])}</p>'
        parts.append(f'<div class="gate {"pass" if ok else "fail"}"><h3>GATE {esc(stage.name)} '
                     f'{"PASS" if ok else "FAIL"}</h3><ul>{checks}</ul>{advice}</div>')
    return "".join(parts)


def side_by_side(rows: list[tuple[str, dict[str, str], dict[str, str]]]) -> str:
    """Rows of (prompt, {column: text}, {column: a note below it}): a table, on a phone one card per prompt."""
    columns = list(dict.fromkeys(name for _, answers, _ in rows for name in answers))
    parts = ['<table class="texts"><tr><th>prompt</th>' + "".join(f"<th>{esc(c)}</th>" for c in columns) + "</tr>"]
    for prompt, answers, notes in rows:
        cells = f'<td data-label="prompt" dir="auto">{esc(prompt[:LONGEST])}</td>'
        for c in columns:
            text = answers.get(c, "")
            text = text if len(text) <= LONGEST else f"{text[:LONGEST]} [... {len(text) - LONGEST} characters more]"
            note = f"<small>{esc(notes[c])}</small>" if c in notes else ""
            cells += f'<td data-label="{esc(c)}" dir="auto">{esc(text)}{note}</td>'
        parts.append(f"<tr>{cells}</tr>")
    return "".join(parts) + "</table>"


def samples(stage: Stage) -> str:
    """What the run itself wrote down: answers at its first and last measurement, or the surest verdicts of a judge."""
    rows = [row for row in stage.samples if row.get("split") != "train" and ("answer" in row or "margin" in row)]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    if rows and "margin" in rows[0]:
        pairs = [(f"margin {number(row['margin'])}", {"preferred by the label": row["chosen"], "the other one":
                 row["rejected"]}, {}) for row in last[:SHOWN // 2] + last[SHOWN // 2:][-(SHOWN // 2):]]
        return "<h3>Held-out pairs it got most wrong, and most right</h3>" + side_by_side(pairs)
    first = [row for row in rows if row["step"] == rows[0]["step"]]
    table = []
    for pair in list(zip(first, last))[:SHOWN]:
        told = {f"step {row['step']}": row for row in pair}
        notes = {step: ", ".join(f"{key} {number(row[key])}" for key in ("score", "kl", "tokens") if key in row)
                 + ("" if row.get("ended", True) else " did not end") for step, row in told.items()}
        table.append((pair[0].get("prompt", ""), {step: row["answer"] for step, row in told.items()}, notes))
    return "<h3>Held-out prompts before and after</h3>" + side_by_side(table) if table else ""


def times(stages: list[Stage]) -> dict[str, float]:
    """Seconds of each run from its own log, PPO's split into sampling, scoring and training."""
    found = {}
    for stage in stages:
        total = max((y for _, y in stage.series.get("seconds", []) if y is not None), default=0.0)
        for name in ("generate", "score", "train"):
            if points := stage.series.get(f"time/{name}"):
                found[f"{stage.name}: {name}"] = sum(y or 0.0 for _, y in points)
                total -= found[f"{stage.name}: {name}"]
        if total > 0:
            found[f"{stage.name}: rest" if "time/train" in stage.series else stage.name] = total
    return found


def time_table(timing: dict[str, float], memory_gb: float | None) -> str:
    timing = {name: max(0.0, seconds) for name, seconds in timing.items() if finite(seconds) is not None}
    total = sum(timing.values()) or 1.0
    rows = "".join(f'<tr><td>{esc(name)}</td><td>{common.duration(s)}</td><td>{s / total:.0%}</td>'
                   f'<td class="bar"><i style="width:{100 * s / max(timing.values(), default=1) or 0:.1f}%"></i></td></tr>'
                   for name, s in timing.items())
    rows += f"<tr><th>total</th><th>{common.duration(sum(timing.values()))}</th><th></th><th></th></tr>"
    memory = f"<p>Peak memory of the largest process: {memory_gb:.1f} GB</p>" if finite(memory_gb) else ""
    return f'<table class="times">{rows}</table>{memory}'


def machine(stages: list[Stage]) -> str:
    """The command, versions and options of each run: what somebody needs to do it again."""
    parts = []
    for stage in (s for s in stages if s.config):
        c = stage.config
        facts = [c.get("date"), c.get("device"), c.get("dtype"), f"ranks {c.get('ranks', 1)}", *(
            f"{name} {version}" for name, version in c.get("versions", {}).items()), c.get("git") and f"git {c['git']}"]
        facts += [f"resumed {len(c['sessions'])} times"] if c.get("sessions") else []
        parts.append(f"<h3>{esc(stage.name)}</h3><pre>python {esc(c.get('command', '?'))}</pre>"
                     f"<p>{esc(', '.join(str(fact) for fact in facts if fact))}</p><details><summary>all options"
                     f"</summary><pre>{esc(json.dumps(c.get('config', {}), indent=1))}</pre></details>")
    return "".join(parts)


CSS = """
:root{color-scheme:light dark;--bg:#fafaf8;--fg:#1c1e22;--soft:#5b616b;--line:#d8dade;--card:#fff;--pass:#14733a;
--fail:#b3261e;--s1:#1f5fbf;--s2:#b94a06;--s3:#12783f;--s4:#7b3fb5}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e6e7ea;--soft:#a5abb5;--line:#383c44;
--card:#1c1f24;--pass:#187a40;--fail:#b8372e;--s1:#74adff;--s2:#ffa066;--s3:#62d293;--s4:#caa0ff}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1240px;padding:1rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}h1{margin:.2em 0}h2{margin:2em 0 .6em;border-bottom:2px solid
var(--line)}h4{margin:0 0 .3em}a{color:inherit}nav a{margin-right:1em}p,small,figcaption{color:var(--soft)}
.gates,.plots{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.gate{padding:.8rem 1rem;border-radius:8px;color:#fff;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.gate h3{margin:0;font-size:1.4rem}.gate ul{margin:.4em 0 0;padding:0;list-style:none}.gate p{color:#fff}
.pass{background:var(--pass)}.fail{background:var(--fail)}.none{background:#6a6f78}
figure{margin:0;padding:.8rem;background:var(--card);border:1px solid var(--line);border-radius:8px;max-width:620px}
figure p,figcaption{margin:.3em 0 0;font-size:.8rem}.legend{margin:0;padding:0;list-style:none;font-size:.85rem}
.legend i{display:inline-block;width:1.8em;margin-right:.5em;border-top:3px solid;vertical-align:middle}
svg{width:100%;height:auto;display:block}svg text{font:13px system-ui,sans-serif;fill:var(--soft)}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}.line.s2{stroke-dasharray:7 3}
.line.s3{stroke-dasharray:2 3}.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}.hover{fill:transparent}
.legend .s1 i{border-color:var(--s1)}.legend .s2 i{border-color:var(--s2);border-top-style:dashed}
.legend .s3 i{border-color:var(--s3);border-top-style:dotted}.whisker{stroke-width:1.5}.band{stroke-opacity:.35;
fill-opacity:.16}.band.s1{fill:var(--s1)}.band.s2{fill:var(--s2)}.band.s3{fill:var(--s3)}
.median{fill:none;stroke-dasharray:2 4;opacity:.8}
table{border-collapse:collapse;width:100%;font-size:.9rem;background:var(--card)}th,td{border:1px solid var(--line);
padding:.4rem .6rem;text-align:left;vertical-align:top}.texts td{white-space:pre-wrap}td small{display:block;margin-top:.4em}
.bar{width:45%}.bar i{display:block;height:1.1em;background:var(--s1);print-color-adjust:exact}
pre{white-space:pre-wrap;background:var(--card);border:1px solid var(--line);padding:.6rem;font-size:.85rem}
details{margin:1em 0}summary{cursor:pointer}tr:target{outline:3px solid var(--s2)}
@media (max-width:680px){table:not(.times) tr,table:not(.times) td{display:block;border-bottom:0}table:not(.times) th
{display:none}table:not(.times) tr{margin-bottom:1rem;border:1px solid var(--line)}table:not(.times) td::before
{content:attr(data-label);display:block;font-size:.75rem;font-weight:bold;color:var(--soft)}}
@media print{body{max-width:none;font-size:11px}figure,tr,.gate{break-inside:avoid}nav{display:none}}
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{css}</style></head><body><h1>{title}</h1><p>{summary}</p><nav>{nav}</nav>{body}</body></html>
"""


def write(path: str | Path, title: str, runs: dict[str, str | Path], panels: Sequence[dict] = (),
          timing: dict[str, float] | None = None, memory_gb: float | None = None, bands: dict | None = None,
          notes: Sequence[str] = ()) -> None:
    """Writes the report of `runs` {stage: run folder}. panels: [{"prompt", "answers": {model: text}, "gold": {model:
    score}}]; timing: {part: seconds}, from the logs when left out; bands: {stage: {metric: step, low, median, high}}.
    """
    if not runs:
        raise common.UserError("a report needs at least one run folder")
    stages, (meanings, healthy) = [read_run(name, folder) for name, folder in runs.items()], glossary()
    rows = [(p["prompt"], p["answers"], {name: f"gold {g:+.2f}" for name, g in p.get("gold", {}).items()})
            for p in panels]
    sections = {"Gates": f'<div class="gates">{gates(stages)}</div>',
                "Side by side": side_by_side(rows) if rows else ""}
    for stage in stages:
        shades = (bands or {}).get(stage.name) or (bands or {}).get(stage.kind) or {}
        sections[f"Curves: {stage.name}"] = curves(stage, shades, healthy) + samples(stage)
    timing = timing or times(stages)
    sections |= {"Where the time goes": time_table(timing, memory_gb), "Versions and commands": machine(stages),
                 "What the figures mean": meanings}
    sections = {name: text for name, text in sections.items() if text}
    body = "".join(f'<section id="part{i}"><h2>{esc(name)}</h2>{text}</section>'
                   for i, (name, text) in enumerate(sections.items()))
    nav = " ".join(f'<a href="#part{i}">{esc(name)}</a>' for i, name in enumerate(sections))
    gated = [bool(stage.gate["passed"]) for stage in stages if stage.gate]
    summary = " ".join([f"{sum(gated)} of {len(gated)} gates passed.", *notes])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    common.atomic_write(path, PAGE.format(title=esc(title), css=CSS, summary=esc(summary), nav=nav, body=body))


def find_runs(folders: Sequence[str]) -> dict[str, Path]:
    """{name: run folder}; a folder that is no run stands for the runs inside it. Equal stages get their path added."""
    found: list[tuple[str, Path]] = []
    for folder in map(Path, folders):
        inside = sorted(folder.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
        runs = [folder] if (folder / "metrics.jsonl").exists() or not inside else [file.parent for file in inside]
        for run in runs:
            config = read_json(run / "config.json") if (run / "config.json").exists() else {}
            found.append((config.get("stage", run.name), run))
    kinds = [kind for kind, _ in found]
    return {kind if kinds.count(kind) == 1 else f"{kind} ({run.as_posix()})": run for kind, run in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or a folder that holds some")
    parser.add_argument("--out", default="", help="the file to write (default: report.html in the first folder)")
    parser.add_argument("--bands", default="", help="a file of make bands: draws the range of its seeds")
    parser.add_argument("--title", default="ChatPiXiu report")
    args = parser.parse_args()
    out = Path(args.out or Path(args.runs[0]) / "report.html")
    write(out, args.title, find_runs(args.runs), bands=read_json(Path(args.bands)).get("curves") if args.bands else None)
    print(f"wrote {out}")


if __name__ == "__main__":
    common.main(main)
