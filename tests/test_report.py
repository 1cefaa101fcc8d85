"""The report: one HTML file that is well-formed, fetches nothing, runs nothing a model wrote, shows every figure."""
import ast
import json
import math
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import common
import report

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "br"}                  # elements without an end tag
HOSTILE = "</td><script>alert(1)</script><img src=http://x.org/y onerror=alert(1)> &amp; \"' \x00\x1b[1m \ud83d 你好"


class Page(HTMLParser):
    """Reads a report as a browser does and keeps what the tests ask for."""
    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.text, self.titles, self.ids = [], [], [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert all(not name.startswith("on") for name, _ in attrs), (tag, attrs)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes something else"

    def handle_data(self, data):
        if "style" not in self.open:
            (self.titles if self.open[-2:] == ["circle", "title"] else self.text).append(data)

    def attributes(self, tag: str, **having) -> list[dict]:
        return [a for t, a in self.tags if t == tag and having.items() <= a.items()]

    def figure(self, title: str) -> str:
        return next(f for f in re.findall(r"<figure>.*?</figure>", self.source, re.S) if f"<h4>{title}</h4>" in f)


def dump(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, stage: str, rows: list[dict], passed: bool | None = True, samples: list[dict] = ()) -> Path:
    dump(folder / "metrics.jsonl", rows)
    dump(folder / "samples.jsonl", list(samples))
    config = {"stage": stage, "command": f"{stage}.py --lr 1 <b>", "config": {"lr": 1.0}, "versions": {"torch": "9.9"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if passed is not None:
        checks = [{"name": "loss fell", "ok": passed, "figure": "3.4 -> 2.2"}]
        gate = {"stage": stage, "passed": passed, "advice": "lower --lr", "checks": checks}
        (folder / "gate.json").write_text(json.dumps(gate), encoding="utf-8")
    return folder


def logged(script: str) -> set[str]:
    """The metric names in a script's source: keys of the dicts it logs or `improve` returns to be logged (of ppo.py:
    the rollout, {...}), and every string of the form group/name."""
    tree, found = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "log":
            keys = [key for arg in node.args if isinstance(arg, ast.Dict) for key in arg.keys if key]
            found |= {key.value for key in keys}
        if isinstance(node, ast.FunctionDef) and node.name == "improve":
            returned = node.body[-1].value
            parts = returned.elts if isinstance(returned, ast.Tuple) else [returned]
            found |= {key.value for part in parts if isinstance(part, ast.Dict) for key in part.keys if key}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & set(re.findall(r"^(?:objective|policy|value|val|loss|eval|time)/\w+$", node.value))
    return found


def tables(name: str) -> dict[str, list[str]]:
    """{script: metric names} of a glossary, read in another way than report.py does."""
    found, script = {}, ""
    for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            script = (re.findall(r"`(\w+)\.py`", line) or [""])[0]
        elif m := re.match(r"\| `([\w/]+)` \|", line):
            found.setdefault(script, []).append(m[1])
    return found


STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Page, Path]:
    """A report of three runs that log every metric of the glossary, with panels, bands, and a failed gate."""
    folder = tmp_path_factory.mktemp("chain")
    names = tables("metrics.md")
    for stage in STAGES:
        all_names = [n for n in names[stage] + names[""] if n not in ("step", "gold/score")]
        rows = [{"step": i, **{n: (k + 1) * i / 10 for k, n in enumerate(all_names)}} for i in range(8)]
        answers = [{"step": s, "split": "eval", "prompt": "P?", "answer": f"at {s} " + HOSTILE} for s in (0, 7)]
        verdicts = [{"step": 7, "where": "f:1", "margin": -1.5, "chosen": HOSTILE, "rejected": "no"}]
        make_run(folder / stage, stage, rows, stage != "reward", verdicts if stage == "reward" else answers)
    dump(folder / "ppo" / "gold.jsonl", [{"step": i, "gold/score": i / 9} for i in range(1, 8)])
    (folder / "demo").mkdir()
    (folder / "demo" / "gate.json").write_text((folder / "sft" / "gate.json").read_text("utf-8"), encoding="utf-8")
    panels = [{"prompt": HOSTILE, "answers": {"base": "b" * 5000, "sft": HOSTILE, "ppo": "Hello"},
               "gold": {"ppo": 0.5}}, {"prompt": "two", "answers": {"base": "", "ppo": "yes"}}]
    band = {"step": [0, 3, 7], "low": [0.0, 0.1, 0.2], "median": [0.1, 0.2, 0.3], "high": [0.2, 0.4, 1.6]}
    runs = {**{stage: folder / stage for stage in STAGES}, "<demo>": folder / "demo"}
    report.write(folder / "new" / "report.html", "A & <B>", runs, panels=panels, memory_gb=5.25, notes=["a <note>"],
                 timing={"sft": 60.0, "ppo: train": 180.0, "odd": math.nan}, bands={"ppo": {"gold/score": band}})
    return Page(folder / "new" / "report.html"), folder


# ---------------------------------------------------------------- the glossary

@pytest.mark.parametrize("script", STAGES)
def test_the_glossary_names_exactly_what_a_script_logs(script):
    names = tables("metrics.md")
    extra = {"gold/score"} if script == "ppo" else set()           # demo.py asks the gold judge afterwards
    everywhere = {"step", "seconds"}                               # common.Run.log adds them
    assert set(names[script]) | set(names[""]) == logged(script) | everywhere | extra
    assert len(names[script]) == len(set(names[script]))


def test_the_glossary_is_the_same_in_both_languages():
    assert tables("metrics.md") == tables("metrics_zh.md")
    for name in ("metrics.md", "metrics_zh.md"):
        for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines():
            cells = re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else ["x"] * 4
            assert len(cells) == 4 and all(cell.strip() for cell in cells), f"{name}: {line[:60]}"


@pytest.mark.parametrize("name", ["metrics.md", "metrics_zh.md"])
def test_flags_in_the_glossary_exist(name):
    code = "".join((ROOT / f"{script}.py").read_text(encoding="utf-8") for script in STAGES)
    for flag in re.findall(r"`--(\w+)`", (ROOT / "docs" / name).read_text(encoding="utf-8")):
        assert re.search(rf"^    {flag}: ", code, flags=re.M), f"no script has --{flag}"


def test_plots_name_metrics_that_exist():
    for script, plots in report.PLOTS.items():
        names = [name for _, group, _ in plots for name in group]
        assert set(names) <= logged(script) | {"gold/score"} and len(names) == len(set(names))


# ---------------------------------------------------------------- the page

def test_page_is_well_formed_and_fetches_nothing(chain):
    page, folder = chain
    assert not page.attributes("script") and not page.attributes("img") and not page.attributes("link")
    targets = [v for _, a in page.tags for name, v in a.items() if name in ("src", "href", "xlink:href", "action")]
    assert targets and all(t.startswith("#") for t in targets)
    assert set(t[1:] for t in targets) <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\(|@import", page.source)
    assert "default-src 'none'" in page.attributes("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page.source)


def test_what_models_wrote_is_text(chain):
    page, _ = chain
    shown = "".join(page.text)
    # panel prompt, panel answer, first and last sample of sft and ppo, one verdict of the reward model
    assert shown.count("<script>alert(1)</script>") == 7
    assert shown.count("你好") == 7 and "A & <B>" in shown and "a <note>" in shown and "sft.py --lr 1 <b>" in shown
    assert "b" * report.LETTERS + " [...]" in shown and "b" * (report.LETTERS + 1) not in shown


def test_gates_stand_first_with_advice_on_failure(chain):
    page, _ = chain
    shown = "".join(page.text)
    assert [a["class"] for a in page.attributes("div") if a.get("class", "").startswith("gate ")] == [
        "gate PASS", "gate FAIL", "gate PASS", "gate PASS"]
    assert shown.count("What to do: lower --lr") == 1 and shown.count("✗ FAILED: loss fell: 3.4 → 2.2") == 1
    assert shown.index("GATE <demo> PASS") < shown.rindex("Side by side") < shown.rindex("Curves: sft")


def test_every_metric_of_the_logs_is_drawn_and_explained(chain):
    page, _ = chain
    for stage, names in tables("metrics.md").items():
        for name in names:
            if name == "step":
                continue
            assert f"{stage}-{name}" in page.ids
            drawn = any(title.startswith(f"{name} at step 7: ") for title in page.titles)
            assert not drawn or {"href": f"#{stage}-{name}"} in [a for t, a in page.tags if t == "a"]
            assert drawn or name.endswith(("_low", "_high")), f"{name} is in no plot"     # those are an interval
    shown = "".join(page.text)
    assert "[gold 0.5]" in shown and "[gold -]" in shown and "5.2 GB" in shown and "torch: 9.9" in shown
    assert "1:00" in shown and "25%" in shown and "3:00" in shown and "75%" in shown and "odd" not in shown


def test_proxy_and_gold_share_a_plot_and_the_band_lies_behind_its_line(chain):
    figure = chain[0].figure("Reward: learned (proxy) and gold")
    polygon = re.search(r'<g class="s2"><polygon class="band" points="([^"]+)"/>', figure)
    line = re.search(r'<g class="s2"><path class="line" d="M([^"]+)"/>', figure)
    assert polygon and line and polygon.start() < line.start() and figure.count("<polygon") == 1
    corners = [tuple(map(float, p.split(","))) for p in polygon[1].split()]
    assert len(corners) == 6 and len(line[1].split(" L")) == 7
    # At the last step the band is 0.2 .. 1.6 and the line at 7/9: one scale, so heights are proportional.
    (x, high), (_, low) = corners[2], corners[3]
    end_x, end_y = map(float, line[1].split(" L")[-1].split(","))
    middle = [tuple(map(float, p.split(","))) for p in re.search(r'"median" points="([^"]+)"', figure)[1].split()]
    unit = (low - high) / 1.4
    assert all(report.TOP <= y <= report.H - report.BOTTOM for _, y in corners)
    assert x == end_x and (low - end_y) / unit == pytest.approx(7 / 9 - 0.2, abs=0.01)
    assert (low - middle[-1][1]) / unit == pytest.approx(0.1, abs=0.01)
    assert chain[0].source.count("<polygon") == 1                  # no other metric has a band


def test_held_out_accuracy_has_its_interval(tmp_path):
    rows = [{"step": s, "eval/accuracy": a, "eval/accuracy_low": a - 0.2, "eval/accuracy_high": a + 0.05,
             "eval/longer_wins": 0.5} for s, a in ((0, 0.5), (9, 0.8))]
    report.write(tmp_path / "r.html", "t", {"reward": make_run(tmp_path / "reward", "reward", rows)})
    figure = Page(tmp_path / "r.html").figure("Accuracy")
    assert "eval/accuracy at step 9: 0.8 (95 % interval 0.6 .. 0.85)" in figure
    (lowest, _), (low, high) = (map(float, ends) for ends in re.findall(r'd="M[\d.]+,([\d.]+) V([\d.]+)"', figure))
    dot = float(re.findall(r'class="dot" cx="[\d.]+" cy="([\d.]+)"', figure)[1])
    assert (low - dot) / (dot - high) == pytest.approx(4, abs=0.05)            # 0.2 below, 0.05 above
    assert low < lowest <= report.H - report.BOTTOM                # 0.3 lies below what the axis shows anyway
    assert "accuracy_low</li>" not in figure and "eval/longer_wins" in figure


def test_a_value_that_is_no_number_leaves_a_gap(tmp_path):
    values = [1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0, math.inf]
    run = make_run(tmp_path / "sft", "sft", [{"step": i, "loss": v} for i, v in enumerate(values)])
    report.write(tmp_path / "r.html", "t", {"sft": run})
    figure = Page(tmp_path / "r.html").figure("Loss per supervised token, nats")
    assert [d.count("L") for d in re.findall(r'class="line" d="([^"]+)"', figure)] == [1, 1]      # 1-2, 4-5; 3 is alone
    assert figure.count('class="dot"') == 5 and "3 without a number" in figure and "nan" not in figure
    assert "loss at step 3: 3" in figure and "loss at step 2" not in figure


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-9, 1e-9], [-3.0, -3.0], [1e12, -1e12], [5e-7, 6e-7],
                                    [None], [0.6931, 0.6931], [1.0, 1.0 + 1e-15]])
def test_any_range_of_values_can_be_drawn(tmp_path, values):
    rows = [{"step": i, "loss": v, "margin": v, "other": v} for i, v in enumerate(values)]
    report.write(tmp_path / "r.html", "t", {"reward": make_run(tmp_path / "reward", "reward", rows)})
    found = re.findall(r'cx="([^"]+)" cy="([^"]+)"', Page(tmp_path / "r.html").source)
    assert bool(found) == (values != [None])
    for x, y in found:
        assert report.LEFT <= float(x) <= report.W - report.RIGHT
        assert report.TOP <= float(y) <= report.H - report.BOTTOM


def test_ticks_are_round_numbers_inside_the_axis():
    assert report.ticks(0.1, 0.93) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert report.ticks(0, 12, smallest=1) == [0, 5, 10] and report.ticks(0, 1, smallest=1) == [0, 1]
    for low, high in ((0, 1), (-1.8, 1), (1e-6, 7e-6), (99.5, 20000), (-1e12, 1e12)):
        found = report.ticks(low, high)
        assert 3 <= len(found) <= 6 and low <= found[0] and found[-1] <= high, (low, high, found)


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path):
    names = tables("metrics.md")["ppo"]
    rows = [{"step": i, **{n: 99.0 if i == 7777 else None if i == 4444 else (i * 7919 % 1000) / 1000 for n in names}}
            for i in range(1, 8001)]
    report.write(tmp_path / "r.html", "t", {"ppo": make_run(tmp_path / "ppo", "ppo", rows)})
    assert (tmp_path / "r.html").stat().st_size < 1_000_000
    kept = report.thin([(row["step"], row["val/ratio"]) for row in rows])
    assert (7777, 99.0) in kept and (4444, None) in kept and len(kept) <= report.POINTS
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert report.thin(kept[:50]) == kept[:50]


# ---------------------------------------------------------------- what may be missing

def test_missing_and_damaged_files_are_named(tmp_path):
    def fails(match: str, **runs):
        with pytest.raises(common.UserError, match=match):
            report.write(tmp_path / "r.html", "t", runs)
        assert not (tmp_path / "r.html").exists()

    (tmp_path / "empty").mkdir()
    fails("nowhere .*--out_dir", sft=tmp_path / "nowhere")
    fails("empty .*neither metrics.jsonl nor gate.json", sft=tmp_path / "empty")
    run = make_run(tmp_path / "run", "sft", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    (run / "metrics.jsonl").write_text("{oops\n" + text, encoding="utf-8")
    fails(r"metrics.jsonl:1: .*mend or delete", sft=run)
    (run / "metrics.jsonl").write_text(text + "[]\n", encoding="utf-8")
    fails(r"metrics.jsonl:3", sft=run)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    (run / "gate.json").write_text("{", encoding="utf-8")
    fails(r"gate.json:1", sft=run)


def test_a_run_that_goes_on_can_be_reported(tmp_path):
    """No gate yet, and the last line is cut off in the middle of a number: everything before it is shown."""
    run = make_run(tmp_path / "sft", "sft", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], passed=None)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    for name in ("samples.jsonl", "config.json"):
        (run / name).unlink()
    report.write(tmp_path / "r.html", "t", {"sft": run})
    page = Page(tmp_path / "r.html")
    assert "GATE sft not reached" in "".join(page.text) and "loss at step 2: 1.5" in page.titles


def test_without_a_glossary_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GLOSSARY", tmp_path / "metrics.md")
    with pytest.raises(common.UserError, match="metrics.md"):
        report.write(tmp_path / "r.html", "t", {"sft": make_run(tmp_path / "sft", "sft", [{"step": 1, "loss": 2.0}])})


def test_command_line(tmp_path, monkeypatch):
    """Stages come from config.json, equal ones get their folder's name; times come from the logs."""
    rows = [{"step": i, "loss": 2.0, "time/train": 15.0, "seconds": 40.0 * i} for i in (1, 2)]
    runs = [make_run(tmp_path / name, "sft", rows) for name in ("a", "b")]
    band = {"step": [1, 2], "low": [1, 1], "median": [2, 2], "high": [9, 9]}
    bands = {"settings": {"sft": {}}, "curves": {"sft": {"loss": band}}}
    (tmp_path / "bands.json").write_text(json.dumps(bands), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, runs), "--bands", str(tmp_path / "bands.json")])
    report.main()
    page = Page(tmp_path / "a" / "report.html")
    shown = "".join(page.text)
    assert all(f"GATE sft {run} PASS" in shown for run in runs) and page.source.count("<polygon") == 2
    corners = re.findall(r'class="band" points="([^"]+)"', page.source)[0].split()
    assert all(report.TOP <= float(p.split(",")[1]) <= report.H - report.BOTTOM for p in corners)
    assert f"sft {runs[0]}: train0:30" in shown and f"sft {runs[0]}: rest0:50" in shown and "total2:40" in shown
    monkeypatch.setattr(sys, "argv", ["report.py", str(runs[0]), "--bands", str(tmp_path / "none.json")])
    with pytest.raises(common.UserError, match="none.json"):
        report.main()


def test_command_line_prints_no_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "report.py"), run_name="__main__")
    assert exit.value.code == 1 and capsys.readouterr().err.startswith(f"error: {tmp_path / 'x'}")
