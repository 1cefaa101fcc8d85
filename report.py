"""The report of a run, or of a chain of runs: one HTML file that needs nothing else, no network and no script.

It answers, in this order: did it work (gates), what does it write now (the same prompts answered by several models),
how did it get there (curves, the range of earlier seeds behind them), what did it cost (time, memory, versions), what
do the figures mean (docs/metrics.md). Curves are SVG by hand: they scale to a phone and to paper, and tell their values
to the pointer. A null in metrics.jsonl was no number and leaves a gap.

    python report.py out/sft                                        # -> out/sft/report.html
    python report.py out/tree                                       # with the curves that its config.json names
    python report.py out/sft out/reward out/ppo --out report.html --bands course/expected/demo.json
"""
import argparse
import html
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import common
from bands import beside, named_by

GLOSSARY = Path(__file__).parent / "docs" / "metrics.md"
# Per script: title of a plot, its metrics, values that its axis always reaches. What else was logged is folded away.
PLOTS: dict[str, list[tuple[str, tuple[str, ...], tuple[float, ...]]]] = {
    "sft": [("Loss per supervised token, nats", ("loss", "eval/loss"), ()),
            ("Share of answers that end", ("eval/eos_rate",), (0, 1))],
    "reward": [("Ranking loss", ("loss",), (0.6931,)),
               ("Accuracy", ("eval/accuracy", "eval/longer_wins", "accuracy"), (0.4, 1)),
               ("Margin, better minus worse", ("eval/margin", "margin"), (0,))],
    "ppo": [("Reward: learned (proxy) and gold", ("objective/scores", "gold/score", "eval/scores"), (0,)),
            ("KL to the reference, nats per answer", ("objective/kl", "objective/kl_k3", "eval/kl"), (0,)),
            ("Share of answers that end", ("val/eos_rate", "eval/eos_rate"), (0, 1)),
            ("Answer length, tokens", ("val/response_length", "eval/response_length"), (0,)),
            ("Entropy, nats per answer", ("objective/entropy",), (0,)),
            ("Probability ratio new / old", ("val/ratio",), (0.95, 1.05)),
            ("Size of an update", ("policy/approxkl_avg", "val/ratio_var"), (0,)),
            ("Share of clipped tokens", ("policy/clipfrac_avg", "val/clipfrac_avg"), (0,)),
            ("Explained variance of the value", ("val/explained_variance",), (0, 1))],
}
W, H, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 56, 22, 12, 40      # a plot, in units of its viewBox
POINTS, HOVERS, TEXTS, LETTERS = 600, 60, 10, 1500              # drawn at most: the file stays far below a megabyte


@dataclass
class Stage:
    """One run folder. `name` is its heading, `kind` the script that wrote it: which plots and which meanings."""
    name: str
    kind: str
    config: dict
    gate: dict
    samples: list[dict]
    series: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)            # metric: (step, value)
    intervals: dict[tuple[str, float], tuple[float, float]] = field(default_factory=dict)        # of (metric, step)


def finite(x) -> float | None:
    return float(x) if isinstance(x, (int, float)) and abs(x) < 1e300 else None          # nan < 1e300 is false


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, or the one of a .json file; [] when there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows, lines = [], [text] if path.suffix == ".json" else text.split("\n")     # a text may hold U+2028: no splitlines
    for i, line in enumerate(lines, 1):
        try:
            rows += [{**json.loads(line)}] if line.strip() else []
        except (ValueError, TypeError) as error:
            if path.suffix == ".json" or i < len(lines):               # a last line without its end is being written
                raise common.UserError(f"{path}:{i}: no JSON object ({error}): mend or delete it") from None
    return rows


def read_run(name: str, folder: Path) -> Stage:
    config, gate = ((read_lines(folder / file) or [{}])[0] for file in ("config.json", "gate.json"))
    if not gate and not (folder / "metrics.jsonl").exists():
        raise common.UserError(f"{folder} ({name}) does not exist or holds neither metrics.jsonl nor gate.json: "
                               "give the --out_dir of a run that has begun")
    stage = Stage(name, config.get("stage", name), config, gate, read_lines(folder / "samples.jsonl"))
    for row in [*read_lines(folder / "metrics.jsonl"), *read_lines(folder / "gold.jsonl")]:
        step = row.pop("step", 0)
        for metric, value in row.items():
            if value is None or isinstance(value, (int, float)):
                stage.series.setdefault(metric, []).append((step, finite(value)))
            if None not in (ends := [finite(row.get(metric + end)) for end in ("_low", "_high")]):
                stage.intervals[metric, step] = tuple(ends)
    return stage


def esc(text: object) -> str:
    """Text as HTML shows it. Models write anything: tags, control characters, half a pair of surrogates."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", str(text).replace("\r\n", "\n"))
    return html.escape(clean.encode("utf-8", "replace").decode("utf-8"))


def number(x: object) -> str:
    return "-" if finite(x) is None else f"{x:.4g}"


def glossary() -> tuple[str, dict[tuple[str, str], str]]:
    """docs/metrics.md (headings, paragraphs, tables) as HTML, and {(script, metric): healthy range} for the plots. The
    script is the `name.py` of the heading above a table, "" for all of them. A | in a cell is written \\|."""
    if not GLOSSARY.exists():
        raise common.UserError(f"{GLOSSARY} is missing: the report takes the meaning of the metrics from it")
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", esc(GLOSSARY.read_text(encoding="utf-8").strip()))
    parts, healthy, script = [], {}, ""
    for block in re.split(r"\n\s*\n", text)[1:]:                       # without its title: the section has one
        if block.startswith("#"):
            script = "".join(re.findall(r"(\w+)\.py</code>", block))
            parts.append(f"<h3>{block.lstrip('# ')}</h3>")
        elif not block.startswith("|"):
            parts.append(f"<p>{block}</p>")
        else:
            head, _, *body = ([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
                              for row in block.split("\n"))
            parts.append("<table><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr>")
            for row in body:
                name = re.sub("<.*?>", "", row[0])
                healthy[script, name] = row[2]
                cells = "".join(f'<td data-label="{h}">{cell}</td>' for h, cell in zip(head, row, strict=True))
                parts.append(f'<tr id="{script}-{name}">{cells}</tr>')
            parts.append("</table>")
    return "".join(parts), healthy


# ---------------------------------------------------------------- curves

class Frame:
    """What the axes of a plot span, with a little air, and where a point lies in its viewBox."""
    def __init__(self, points: list[tuple], reach: tuple[float, ...]):
        xs, ys = [x for x, _ in points], [*reach, *(y for _, y in points if y is not None)]
        self.x0, self.x1, low, high = min(xs), max(*xs, min(xs) + 1), min(ys), max(ys)
        air = 0.04 * (high - low) if high - low > 1e-9 * max(abs(low), abs(high)) else abs(low) / 2 or 1
        self.y0, self.y1 = low - air * (low not in reach), high + air * (high not in reach or high == low)

    def at(self, x: float, y: float) -> str:
        across = LEFT + (x - self.x0) / (self.x1 - self.x0) * (W - LEFT - RIGHT)
        return f"{across:.1f},{H - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (H - TOP - BOTTOM):.1f}"


def ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """At most six round numbers, 1, 2 or 5 times a power of ten apart: 0.1 .. 0.93 -> 0.2, 0.4, 0.6, 0.8"""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    gap = max(smallest, next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9)))
    return [k * gap for k in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def axes(f: Frame) -> str:
    floor, right, parts = H - BOTTOM, W - RIGHT, []
    for y in ticks(f.y0, f.y1):
        up = float(f.at(f.x0, y).split(",")[1])
        parts.append(f'<path class="grid" d="M{LEFT},{up} H{right}"/>'
                     f'<text x="{LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in ticks(f.x0, f.x1, smallest=1):                            # no half steps
        across = f.at(x, f.y0).split(",")[0]
        parts.append(f'<path class="axis" d="M{across},{floor} v4"/>'
                     f'<text x="{across}" y="{floor + 18}" text-anchor="middle">{x:.10g}</text>')
    return (f'{"".join(parts)}<path class="axis" d="M{LEFT},{floor} H{right}"/>'
            f'<text x="{(LEFT + right) / 2}" y="{H - 5}" text-anchor="middle">step</text>')


def thin(points: list) -> list:
    """Of a long line the lowest and the highest point and the first gap of every stretch: no spike gets lost."""
    size, kept = math.ceil(3 * len(points) / POINTS), []
    for part in (points[i:i + size] for i in range(0, len(points), size)):
        known, gaps = sorted((y, x) for x, y in part if y is not None), [p for p in part if p[1] is None]
        kept += sorted({*gaps[:1], *((x, y) for y, x in known[:1] + known[-1:])}, key=lambda p: p[0])
    return kept if len(points) > POINTS else points


def curve(f: Frame, name: str, stage: Stage) -> str:
    """One metric: a path broken at its gaps, dots where points are few or stand alone, and texts to hover over."""
    pieces = [list(ps) for ok, ps in itertools.groupby(thin(stage.series[name]), lambda p: p[1] is not None) if ok]
    parts = ['<path class="line" d="M' + " L".join(f.at(*p) for p in piece) + '"/>' for piece in pieces if piece[1:]]
    known = [(x, y, len(piece) == 1) for piece in pieces for x, y in piece]
    for i, (x, y, alone) in enumerate(known):
        (across, up), text = f.at(x, y).split(","), f"{name} at step {x:.10g}: {number(y)}"
        if ends := stage.intervals.get((name, x)):
            low, high = (f.at(x, end).split(",")[1] for end in ends)
            parts.append(f'<path class="interval" d="M{across},{low} V{high}"/>')
            text += f" (95 % interval {number(ends[0])} .. {number(ends[1])})"
        if alone or len(known) <= 20:
            parts.append(f'<circle class="dot" cx="{across}" cy="{up}" r="3"/>')
        if i % math.ceil(len(known) / HOVERS) == 0 or i == len(known) - 1:
            parts.append(f'<circle class="hover" cx="{across}" cy="{up}" r="8"><title>{esc(text)}</title></circle>')
    return "".join(parts)


def plot(title: str, names: tuple, reach: tuple, stage: Stage, bands: dict, healthy: dict) -> str:
    """One figure with those metrics of `names` that were logged; empty when none was."""
    names = [name for name in names if any(y is not None for _, y in stage.series.get(name, []))]
    if not names:
        return ""
    ranges = {n: [row for row in zip(*(bands[n][key] for key in ("step", "low", "median", "high")))
                  if None not in map(finite, row)] for n in names if n in bands}
    points = [p for n in names for p in stage.series[n]]
    points += [(x, y) for (n, x), ends in stage.intervals.items() if n in names for y in ends]
    f = Frame(points + [(x, y) for band in ranges.values() for x, *ys in band for y in ys], reach)
    behind, front, legend, notes = [], [], [], []
    for k, n in enumerate(names, 1):
        if band := ranges.get(n):
            around = [f.at(x, high) for x, _, _, high in band] + [f.at(x, low) for x, low, _, _ in reversed(band)]
            median = " ".join(f.at(x, y) for x, _, y, _ in band)
            behind.append(f'<g class="s{k}"><polygon class="band" points="{" ".join(around)}"/>'
                          f'<polyline class="median" points="{median}"/></g>')
        front.append(f'<g class="s{k}">{curve(f, n, stage)}</g>')
        known = [y for _, y in stage.series[n] if y is not None]
        lost = f", {len(stage.series[n]) - len(known)} without a number" if len(known) < len(stage.series[n]) else ""
        legend.append(f'<li><i class="s{k}"></i>{esc(n)}: {number(known[0])} &rarr; {number(known[-1])}{lost}</li>')
        notes += [f'<a href="#{esc(script)}-{esc(n)}">{esc(n)}</a>: {healthy[script, n]}'
                  for script in (stage.kind, "") if (script, n) in healthy]
    return (f'<figure><h4>{esc(title)}</h4><ul class="legend">{"".join(legend)}</ul>'
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(title)}">{axes(f)}{"".join(behind + front)}</svg>'
            f'<figcaption>{"<br>".join(notes)}</figcaption></figure>')


def curves(stage: Stage, bands: dict, healthy: dict) -> str:
    wanted = PLOTS.get(stage.kind, [])
    drawn = {name for _, names, _ in wanted for name in names}
    rest = [(name, (name,), ()) for name in stage.series if name not in drawn and not name.endswith(("_low", "_high"))]
    first, more = ("".join(plot(*spec, stage, bands, healthy) for spec in specs) for specs in (wanted, rest))
    return (f'<div class="plots">{first}</div><details><summary>More figures</summary><div class="plots">{more}</div>'
            '</details>' if stage.series else "")


# ---------------------------------------------------------------- the other sections

def gate(stage: Stage) -> str:
    word = {True: "PASS", False: "FAIL", None: "not reached"}[stage.gate.get("passed")]
    told = "".join(f'<li>{"&#10003;" if check["ok"] else "&#10007; FAILED:"} {esc(check["name"])}: '
                   f'{esc(check["figure"]).replace("-&gt;", "&rarr;")}</li>' for check in stage.gate.get("checks", []))
    told += f'<li><b>What to do:</b> {esc(stage.gate.get("advice") or "read the curves")}</li>' * (word == "FAIL")
    return f'<div class="gate {word}"><h3>GATE {esc(stage.name)} {word}</h3><ul>{told}</ul></div>'


def side_by_side(rows: list[tuple[str, dict[str, str]]]) -> str:
    """Rows of (prompt, {column: text}); on a phone every prompt becomes a card."""
    columns, parts = dict.fromkeys(name for _, texts in rows for name in texts), []
    for prompt, texts in rows:
        cells = {"prompt": prompt, **{name: texts.get(name, "") for name in columns}}.items()
        parts.append("<tr>" + "".join(f'<td data-label="{esc(name)}" dir="auto">{esc(text[:LETTERS])}'
                                      f'{" [...]" * (len(text) > LETTERS)}</td>' for name, text in cells) + "</tr>")
    head = "".join(f"<th>{esc(name)}</th>" for name in ("prompt", *columns))
    return f'<table class="texts"><tr>{head}</tr>{"".join(parts)}</table>' if rows else ""


def samples(stage: Stage) -> str:
    """What the run wrote down itself: held-out answers before and after, or a reward model's surest verdicts."""
    rows = [row for row in stage.samples if row.get("split") != "train"]
    first, last = ([row for row in rows if row["step"] == rows[end]["step"]] for end in (0, -1))
    told = [(new["prompt"], {f"step {row['step']}": row["answer"] for row in (old, new)})
            for old, new in zip(first, last) if "answer" in new]
    told += [(row["where"], {"labelled better": row["chosen"], "labelled worse": row["rejected"],
                             "difference in score": number(row["margin"])}) for row in last if "margin" in row]
    return "<h3>Held-out samples</h3>" + side_by_side(told[:TEXTS]) if told else ""


def costs(stages: list[Stage], timing: dict[str, float], memory_gb: float | None) -> str:
    """Where the time went; when nobody measured it, by the logs of the runs, PPO's in parts."""
    for stage in () if timing else stages:
        parts = {f"{stage.name}: {name[5:]}": sum(y or 0 for _, y in points)
                 for name, points in stage.series.items() if name.startswith("time/")}
        rest = max((y or 0 for _, y in stage.series.get("seconds", [])), default=0) - sum(parts.values())
        timing = {**timing, **parts, f"{stage.name}: rest" if parts else stage.name: rest}
    timing = {name: seconds for name, seconds in timing.items() if (finite(seconds) or 0) > 0}
    total = sum(timing.values())
    rows = "".join(f"<tr><td>{esc(name)}</td><td>{common.duration(seconds)}</td><td>{seconds / total:.0%}</td>"
                   f'<td class="bar"><i style="width:{100 * seconds / total:.1f}%"></i></td></tr>'
                   for name, seconds in timing.items())
    memory = f"<p>Peak memory of the largest process: {memory_gb:.1f} GB</p>" if finite(memory_gb) else ""
    return f'<table class="times">{rows}<tr><th>total</th><th>{common.duration(total)}</th></tr></table>{memory}'


def versions(stage: Stage) -> str:
    """What somebody needs to do it again: config.json, whose command stands alone."""
    facts = {name: x for name, x in stage.config.items() if name not in ("command", "sessions")}
    told = re.sub('[{}"]', "", json.dumps(facts, ensure_ascii=False))
    return (f"<h3>{esc(stage.name)}</h3><pre>python {esc(stage.config.get('command', '?'))}</pre><p>{esc(told)}</p>"
            if facts else "")


CSS = """:root{color-scheme:light dark;--bg:#fafaf8;--fg:#1c1e22;--soft:#5b616b;--rule:#d8dade;--card:#fff;
--1:#1f5fbf;--2:#b94a06;--3:#12783f}@media screen and (prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e6e7ea;
--soft:#a5abb5;--rule:#383c44;--card:#1c1f24;--1:#74adff;--2:#ffa066;--3:#62d293}}*{box-sizing:border-box}
body{margin:auto;padding:1rem;max-width:1240px;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}h2{margin:2em 0 .6em;border-bottom:2px solid var(--rule)}
h4{margin:0}a{color:inherit}nav a{margin-right:1em}p,figcaption{color:var(--soft)}.gates,.plots{display:grid;
gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}ul{margin:.3em 0;padding:0;
list-style:none}.gate{padding:.8rem 1rem;border-radius:8px;color:#fff;background:#62676f}.gate h3{margin:0;
font-size:1.4rem}.PASS{background:#14733a}.FAIL{background:#b3261e}.gate,.bar i{print-color-adjust:exact;
-webkit-print-color-adjust:exact}figure{margin:0;padding:.8rem;max-width:620px;background:var(--card);
border:1px solid var(--rule);border-radius:8px}figcaption,.legend{font-size:.85rem}.legend i{display:inline-block;
width:1.8em;margin-right:.5em;border-top:3px solid;vertical-align:middle}svg{display:block;width:100%}
svg text{fill:var(--soft);font:13px system-ui,sans-serif}path,.median{fill:none;stroke:var(--rule)}
.axis{stroke:var(--soft)}.s1{color:var(--1)}.s2{color:var(--2)}.s3{color:var(--3)}g path{stroke:currentColor;
stroke-width:2}.s2 .line{stroke-dasharray:7 3}.s3 .line{stroke-dasharray:2 3}.legend .s2{border-top-style:dashed}
.legend .s3{border-top-style:dotted}.dot,.band{fill:currentColor}.hover{fill:transparent}.band{fill-opacity:.16;
stroke:currentColor;stroke-opacity:.3}.median{stroke:currentColor;stroke-dasharray:2 4}
table{border-collapse:collapse;width:100%;font-size:.9rem;background:var(--card)}th,td{padding:.4rem .6rem;
border:1px solid var(--rule);text-align:left;vertical-align:top}.texts{table-layout:fixed}
.texts td,pre{white-space:pre-wrap}.bar{width:45%}.bar i{display:block;height:1.1em;background:var(--1)}
@media (max-width:680px){table:not(.times) :is(tr,td){display:block}table:not(.times) th{display:none}
table:not(.times) tr{margin-bottom:1rem}table:not(.times) td::before{display:block;content:attr(data-label);
font-weight:bold;color:var(--soft)}}@media print{:root{font-size:11px}body{max-width:none}
figure,tr,.gate{break-inside:avoid}}"""


def write(path: str | Path, title: str, runs: dict[str, str | Path], panels: list[dict] | None = None,
          timing: dict[str, float] | None = None, memory_gb: float | None = None, bands: dict | None = None,
          notes: list[str] | None = None) -> None:
    """One report of `runs` {stage: run folder}; panels: [{"prompt", "answers": {model: text}, "gold": {model: score}}];
    timing: {part: seconds}, without it from the logs; bands: {name or script: {metric: {"step", "low", "median",
    "high"}}}."""
    stages, (meanings, healthy) = [read_run(name, Path(folder)) for name, folder in runs.items()], glossary()
    told = [(p["prompt"], {name: text + (f"\n[gold {number(p['gold'].get(name))}]" if "gold" in p else "")
                           for name, text in p["answers"].items()}) for p in panels or []]
    sections = {"Gates": f'<div class="gates">{"".join(map(gate, stages))}</div>', "Side by side": side_by_side(told)}
    for stage in stages:
        ranges = next((bands[key] for key in (stage.name, stage.kind) if key in (bands or {})), {})
        sections[f"Curves: {stage.name}"] = curves(stage, ranges, healthy) + samples(stage)
    sections |= {"Where the time goes": costs(stages, timing or {}, memory_gb),
                 "Versions and commands": "".join(map(versions, stages)), "What the figures mean": meanings}
    sections = {name: text for name, text in sections.items() if text}
    shaded = any((bands or {}).values())
    notes = [*(notes or []), *["Shaded behind a curve: the range of earlier seeds, which a sound run may leave "
                               "(course/check.py says when it is too far); dotted: their median"] * shaded]
    nav = [*map(esc, notes), " ".join(f'<a href="#p{i}">{esc(name)}</a>' for i, name in enumerate(sections))]
    body = "".join(f'<h2 id="p{i}">{esc(name)}</h2>{text}' for i, (name, text) in enumerate(sections.items()))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # The policy below is a second lock behind esc(): no script runs and nothing is fetched, whatever a model wrote.
    common.atomic_write(path, f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{esc(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{CSS}</style><body><h1>{esc(title)}</h1><nav>{'<br>'.join(nav)}</nav>{body}</body></html>\n""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="the file to write (default: report.html in the first folder)")
    parser.add_argument("--bands", type=Path, help="a file of course/expected: draws the range of its seeds; else "
                        "the one that a run's config.json names")
    args = parser.parse_args()
    if args.bands and not (args.bands.exists() and read_lines(args.bands)[0].get("curves")):
        raise common.UserError(f"--bands {args.bands} does not exist or holds no curves: make bands writes such a file")
    abouts = [(read_lines(run / "config.json") or [{}])[0] for run in args.runs]
    kinds = [about.get("stage", run.name) for about, run in zip(abouts, args.runs)]
    runs = {kind if kinds.count(kind) == 1 else f"{kind} {run}": run for kind, run in zip(kinds, args.runs)}
    bands, notes = {}, []
    for (name, run), about, kind in zip(runs.items(), abouts, kinds):
        if file := args.bands or named_by(run, about):
            bands[name], what = beside({"stage": kind, "config": {}, **about}, read_lines(file)[0])
            notes.append(f"{name}: {'curves' if bands[name] else 'no curves'} of {file.name} ({what})")
    write(out := args.out or args.runs[0] / "report.html", ", ".join(runs), runs, bands=bands, notes=notes)
    print(f"wrote {out}", *notes, sep="\n")


if __name__ == "__main__":
    common.main(main)
