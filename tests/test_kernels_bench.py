"""The benchmark's rows at a small size on a CPU: whatever is timed computes the same, and floors are counted right.
Peers that need a GPU or a compiler are left to the benchmark itself, which compares before it times."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import bench, bench_rows
from kernels.e2e import Table, installed

ROOT = Path(__file__).resolve().parents[1]
HERE = {"ours", "eager", "sdpa", "sdpa+mask", "F.rms_norm", "addmm", "sort"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmark itself does this")
def test_every_row_times_the_same_function(monkeypatch):
    monkeypatch.setattr(bench_rows, "DIVIDE", 64)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    rows = bench.all_rows()
    assert len({row.name for row in rows}) == len(rows) == 41
    for row in rows:
        data = row.inputs()
        expected = row.exact(data) if row.exact else row.providers["sort"](data)()
        ran = [name for name in row.providers if name in HERE]
        assert "ours" in ran and row.flops + row.bytes > 0
        for name in ran:
            got = row.providers[name](bench_rows.own(data))()
            if row.exact is None:                                      # with equal logits a sort keeps any of them
                assert float((got[0] == expected[0]).float().mean()) > 0.8, (row.name, name)
                continue
            assert bench.distance(got, expected) < bench.WRONG, (row.name, name)
        got = row.providers["ours"](bench_rows.own(data))()
        changed = (got[0] * 1.1, *got[1:])
        assert not bench.distance(changed, expected) < bench.WRONG
        if row.name.startswith("attention"):
            H, D = data["q"].shape[1], data["q"].shape[3]
            per_pair = H * D * (14 if row.name.endswith("train") else 4)
            seen = float((data["spans"].hi - data["spans"].lo).sum()) * (len(data["q"]) // len(data["spans"].lo))
            assert abs(row.flops / per_pair - seen) <= 0.03 * seen, row.name


def test_every_part_of_the_end_to_end_program_runs(tmp_path):
    """All parts on a tiny model: ours, and what is installed of the peers."""
    out = tmp_path / "rows.json"
    done = subprocess.run([sys.executable, "-m", "kernels.e2e", "--size", "tiny", "--device", "cpu", "--length", "32",
                           "--out", str(out)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "CHATPIXIU_KERNELS": "auto"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    who: dict[str, list[str]] = {}
    for row in rows:
        assert row["s"] > 0
        who.setdefault(row["what"].split(",")[0], []).append(row["who"])
    assert set(who) == {"LoRA SFT step", "full SFT step", "QLoRA SFT step", "generation", "PPO step"}
    assert all(any(name.startswith("ours") for name in names) for names in who.values())
    assert "ours, graph" in who["PPO step"] and who["generation"].count("ours, graph") == 2
    if installed("peft"):
        assert "transformers + peft" in who["PPO step"] and "transformers + peft" in who["LoRA SFT step"]


def test_nothing_begins_after_the_budget(capsys):
    args = argparse.Namespace(device="cpu", size="tiny", part="ppo", budget=-1.0, out="")
    Table(args).run("a part", lambda: pytest.fail("ran"))
    assert json.loads(capsys.readouterr().out) == {"what": "a part", "skipped": "after -1 s"}


def test_a_side_that_fails_is_a_row_and_the_others_go_on(capsys):
    table = Table(argparse.Namespace(device="cpu", size="tiny", part="ppo", budget=60.0, out=""))
    table.run("theirs", lambda: {}["bitsandbytes"])
    table.run("nothing to say", lambda: iter(()).__next__())
    table.run("ours", lambda: table.put(what="ours", s=1.0))
    assert table.result["rows"] == [{"what": "theirs", "failed": "KeyError: 'bitsandbytes'"},
                                    {"what": "nothing to say", "failed": "StopIteration: "}, {"what": "ours", "s": 1.0}]
    assert "Traceback" in capsys.readouterr().err


def test_a_child_that_dies_costs_one_row(tmp_path, monkeypatch, capsys):
    """Rows "die" and "hang": each is noted, the others are measured."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys, time\nnames, path, _ = json.loads(sys.argv[-1])\n"
        "for n in names:\n    f = open(path, 'a', encoding='utf-8')\n"
        "    print(json.dumps({'begin': n}), file=f, flush=True)\n"
        "    os._exit(3) if n == 'die' else time.sleep(60) if n == 'hang' else None\n"
        "    print(json.dumps({'row': n, 'providers': {}, 'notes': {}}), file=f, flush=True)\n", encoding="utf-8")
    started = subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", lambda c, **k: started([sys.executable, str(child), c[-1]], **k))
    monkeypatch.setattr(bench, "ROW_SECONDS", 1.0)
    path = tmp_path / "lines"
    bench.run_rows(["a", "die", "b", "hang", "c"], path, {}, bench.time.time() + 60)
    done = {entry["row"]: entry.get("failed") for entry in bench.progress(path).done}
    assert list(done) == ["a", "die", "b", "hang", "c"]
    assert done["die"] == "child ended with 3" and "child ended with -9" == done["hang"]
    assert not done["a"] and not done["b"] and not done["c"]


def test_the_list_needs_no_card():
    done = subprocess.run([sys.executable, "-m", "kernels.bench", "--list"], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 0 and "head ce 8192x4096x128256 trained" in done.stdout, done.stderr
