"""The benchmarks at a small size: both sides do the same work, theory counts right, one command writes the figure.
Nothing here depends on how fast anything is."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model

import bench
import bench_growth
import bench_recipe
import checkpoints
import memory
from common import UserError
from course import figure
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- axes in powers of ten

def test_log_ticks_examples():
    values = lambda low, high: [round(10**x, 6) for x in figure.log_ticks(math.log10(low), math.log10(high))]  # noqa: E731
    assert values(64, 2048) == [100, 200, 500, 1000, 2000]
    assert values(1, 1000) == [1, 10, 100, 1000]
    assert values(0.3, 4) == [0.5, 1, 2]
    assert [figure.short(v) for v in (0.5, 2000, 20000, 1e6, 1e8)] == ["0.5", "2000", "20k", "1M", "100M"]


def test_a_power_law_is_a_straight_line_on_log_axes():
    line = figure.Line([(x, 3 * x**2) for x in (1, 10, 100)], dots=True)
    svg = figure.grid([figure.Panel("p", [line], log=True)])
    points = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)
    assert points[0][1] > points[1][1] > points[2][1]
    plain = figure.grid([figure.Panel("p", [line])])
    assert svg != plain


@pytest.mark.parametrize("what", ["recipe", "growth", "load"])
@pytest.mark.parametrize("flag", [{"device": "cuda"}, {"dtype": "fp32"}])
def test_a_flag_that_would_be_ignored_is_refused(what, flag):
    with pytest.raises(UserError, match=f"--what {what} measures a CPU.*--what train"):
        bench.main(bench.Config(what=what, **flag))


# ---------------------------------------------------------------- growth

def test_fit_examples():
    assert bench_growth.fit([2, 4, 8], [1, 2, 4]) == pytest.approx((2, 1))
    constant, miss = bench_growth.fit([1, 4], [1, 1])
    assert (constant, miss) == pytest.approx((2, 2))


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """FLOPs of all products that run, forward and backward, also those inside blocks.Blocks."""
    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm"):
            a = args[1] if name.startswith("addmm") else args[0]
            self.flops += 2 * out.numel() * a.shape[-1]
        return out


@pytest.mark.parametrize("length", [64, 300])
@pytest.mark.parametrize("r", [0, 8])
def test_flops_of_a_step_are_those_that_run(length, r):
    """With bytes for nothing theory is FLOPs: within 1 % of the products that a step really makes (with an adapter
    3 %: the first layer hands no gradient down), above and below the border where attention goes in blocks."""
    point = {"shape": bench_growth.SIZES["1M"], "batch": 2, "length": length, "r": r}
    model = checkpoints.build(bench_growth.config_of(point), torch.float32 if r == 0 else torch.bfloat16)
    for p in model.parameters():
        p.data.normal_(0, 0.02)
    call = bench_growth.training(model, torch.randint(0, 4096, (2, length)), r)
    with Counted() as counted:
        call()
    expected, _ = bench_growth.theory(point, {"product": 1.0, "copy": math.inf})
    assert expected == pytest.approx(counted.flops, rel=0.03 if r else 0.01)


def test_flops_and_bytes_of_decoding(monkeypatch):
    point = {"shape": bench_growth.SIZES["1M"], "batch": 3, "length": 40, "r": 8, "decode": True}
    config = bench_growth.config_of(point)
    weights = memory.count(config) - (2 * config.num_layers + 1) * config.hidden_size          # all but the norms
    monkeypatch.setattr(memory, "can_pack", lambda: True)
    flops, space = bench_growth.theory(point, {"product": 1.0, "copy": math.inf})
    assert flops == 2 * 3 * weights + 4 * config.num_layers * config.hidden_size * 3 * (40 + bench_growth.DECODED / 2)
    cache = 2 * 2 * config.num_layers * 2 * config.head_dim * 3 * (40 + bench_growth.DECODED + 1)
    assert space == 2 * 2 * weights + cache                # as they are, and packed
    monkeypatch.setattr(memory, "can_pack", lambda: False)
    assert bench_growth.theory(point, {"product": 1.0, "copy": math.inf})[1] == 2 * weights + cache
    assert bench_growth.theory(point, {"product": math.inf, "copy": 1.0})[0] == 2 * weights + cache


def test_one_command_writes_figures_and_a_picture(tmp_path):
    """Two points a curve, each a process of its own."""
    out = tmp_path / "results" / "growth.json"
    code = ("import sys, bench, bench_growth as g; from pathlib import Path\n"
            "whole = g.curves\n"
            "g.curves = lambda cfg: {k: whole(cfg)[k] for k in ('vocabulary', 'size')}\n"
            "g.rates_of_this_machine = lambda: {'product': 1e11, 'copy': 1e10}\n"
            f"bench.main(bench.Config(what='growth', repeats=1, largest=32, out={str(out)!r}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [p["x"] for p in found["vocabulary"]["points"]] == [1024, 2048] and len(found["size"]["points"]) == 2
    for name in ("vocabulary", "size"):
        for p in found[name]["points"]:
            assert len(p["seconds"]) == 1 and 0 < p["bytes"] < 2**30 and p["theory_seconds"] > 0
        assert found[name]["points"][1]["theory_bytes"] > found[name]["points"][0]["theory_bytes"]
    svg = out.with_suffix(".svg").read_text(encoding="utf-8")
    assert svg.count('class="t"') == 4 and "measured" in svg and "theory x" in svg


# ---------------------------------------------------------------- the recipe beside transformers

def test_both_sides_read_the_same_conversations(tmp_path):
    """Every real token and every supervised one of the padded batches is in the packed rows, once."""
    byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    work = bench_recipe.make_work(bench.Config(rows=3, train_rows=4, data_batches=2), tokenizer, 97)
    real = [ids[seen.bool()] for ids, seen, _ in work.padded]
    packed = [ids[docs > 0] for ids, docs, _ in work.packed]
    assert sorted(torch.cat(real).tolist()) == sorted(torch.cat(packed).tolist())
    theirs = bench_recipe.count_supervised([(labels != -100).long() for _, _, labels in work.padded])
    assert 0 < theirs == bench_recipe.count_supervised([mask for _, _, mask in work.packed])


def test_the_recipe_on_a_tiny_model(tmp_path):
    """All three tables; the run itself stops if the first losses of the two sides differ."""
    byte_tokenizer(tmp_path / "model")
    model = tiny_model(vocab_size=260, max_positions=512, tie_embeddings=True)
    checkpoints.save(model, load_tokenizer(tmp_path / "model"), tmp_path / "tiny")
    out = tmp_path / "recipe.json"
    small = {"rows": 2, "new_tokens": 3, "train_rows": 2, "data_batches": 2, "full_rows": 1, "full_len": 300,
             "repeats": 1, "lora_r": 4}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "bench.py", "--what", "recipe", "--init", str(tmp_path / "tiny"), "--out",
                           str(out), *flags], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("first loss: ours") == 3
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {key: len(found[key]) for key in ("generate", "full", "data")} == {"generate": 2, "full": 2, "data": 2}
    for table in (t for key in ("generate", "full", "data") for t in found[key].values()):
        mine, other = table.values()
        assert len(mine["seconds"]) == len(other["seconds"]) == 1 and other["ratio_to_peer"] == 1
        assert mine["ratio_to_peer"] == pytest.approx(other["seconds"][0] / mine["seconds"][0])
