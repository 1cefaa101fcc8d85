"""The laboratory, the benchmarks with a known answer, and the tools around them (course/), in small."""
import contextlib
import dataclasses
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

import ppo
from course import ablate, bugs, ceiling, check, figure, goodhart, mutants, proof, randomwalks, tree

# ---------------------------------------------------------------- the Goodhart laboratory


@pytest.mark.parametrize("answer, worth", [
    ("the tea is warm", 1 + 1.0), ("yes the tea is warm and sweet thanks", 1 + 1.7 + 0.3 + 0.6),
    ("the soup is warm", 1.0 - 0.5), ("the tea is old", 1 - 0.8), ("the tea is warm and warm", 1 + 1.0 - 0.6),
    ("tea warm", 1 + 1.0 - 0.4), ("", 0.0), ("thanks thanks thanks", 0.6 - 2 * 0.6 - 2 * 0.4),
    ("the tea is warm and sweet and good and soft", 1 + 2.1)])
def test_the_gold_reward_by_hand(answer, worth):
    assert goodhart.gold(["tea", "?"], answer.split()) == pytest.approx(worth)


def test_the_corpus_is_a_language_that_the_gold_reward_knows():
    """Every neighbour in it is allowed, nothing is longer than an answer may be, and its worth varies."""
    rng = random.Random(0)
    texts = [goodhart.write(rng, ["hello", "tea", "?"]) for _ in range(2000)]
    assert all(goodhart.follows(a, b) for text in texts for a, b in itertools.pairwise(text))
    assert max(map(len, texts)) < goodhart.ROOM
    worth = torch.tensor([goodhart.gold(["tea", "?"], text) for text in texts])
    assert 0.5 < worth.mean() < 2 and worth.std() > 1


def test_gold_rows_reads_through_padding_and_charges_a_missing_end():
    e, end = goodhart.encode, goodhart.END
    ids = torch.tensor([[*e(["hello", "tea", "?"]), *e("the tea is warm".split()), end],
                        [end, *e(["tea", "?"]), *e("the tea is warm sweet".split())]])
    mask = torch.tensor([[1] * 8, [0] + [1] * 7])
    response = torch.tensor([[1] * 5, [1] * 5])
    assert goodhart.gold_rows(ids, mask, response).tolist() == pytest.approx([2.0, 2.7 - 0.4 - 1])


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores, values = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12.0).view(2, 6) ** 2
    subsets = list(itertools.combinations(range(6), n))
    by_hand = sum(float(values[p, max(s, key=lambda i: scores[p, i])]) for p in range(2) for s in subsets)
    assert goodhart.best_of(scores, values, n) == pytest.approx(by_hand / 2 / len(subsets), rel=1e-9)


def test_the_laboratory_in_small(tmp_path):
    """All three stages and the figure, end to end: KL 0 at first, the proxy better than a coin, every panel drawn."""
    cfg = goodhart.Config(seeds=(0,), labels=(64, 256), betas=(0.0, 0.2), steps=3, batch_size=32, samples=16,
                          runs=str(tmp_path))
    result = goodhart.laboratory(cfg, 0)
    assert set(result["runs"]) == {"256 labels, beta 0", "256 labels, beta 0.2", "64 labels, beta 0"}
    for run in result["runs"].values():
        assert run[0]["kl"] == 0 and run[-1]["kl"] > 0
    assert 0.55 < result["accuracy"]["256"] < result["ceiling"]
    stage, log, settings = check.read(tmp_path / "seed_0" / "256_labels_beta_0.2")       # a run folder like any other
    assert stage == "ppo" and settings["labels"] == 256 and settings["kl_coef"] == 0.2
    assert log["gold/score"] == pytest.approx([row["gold"] for row in result["runs"]["256 labels, beta 0.2"]])
    first, *_, last = result["best_of_n"]["256"]
    assert first[:2] == [1, 0.0] and last[1] == pytest.approx(math.log(8) - 7 / 8)
    assert last[2] > first[2] and last[3] > first[3]                           # some optimisation does good
    assert result["ended"] > 0.95
    whole = {"runs": [result], "labels": [64, 256], "betas": [0.0, 0.2], "command": "c", "date": "d", "torch": "t",
             "minutes": 1, "machine": "m"}
    text = goodhart.draw(whole)
    assert text.count("class=\"t\"") == 4 and "nan" not in text
    assert "| 64 labels, beta 0 |" in goodhart.table(whole)


def test_peaks_finds_the_top_of_a_parabola():
    rows = [{"step": i, "kl": (i / 10) ** 2, "proxy": i / 10, "gold": 1 - (i / 10 - 2) ** 2} for i in range(60)]
    found, = goodhart.peaks([{"gold_mean": 0.0, "gold_std": 1.0, "runs": {"x": rows}}], "x")
    assert found["d"] == pytest.approx(2, abs=0.06) and found["peak"] == pytest.approx(1, abs=0.08)
    assert found["gold"] == pytest.approx(sum(r["gold"] for r in rows[-6:]) / 6)


# ---------------------------------------------------------------- benchmarks

def test_the_course_trains_with_the_steps_of_the_stages():
    """No second implementation: whoever calls optimizer.step() here would have one. The peer's loop is the peer's."""
    for path in Path(tree.__file__).parent.glob("*.py"):
        assert path.name == "peer_trlx.py" or "optimizer.step()" not in path.read_text(encoding="utf-8"), path.name


def test_randomwalks_shortest_paths_against_all_paths():
    graph = randomwalks.Graph()
    assert len(graph.walks) == 1000 and all(w[-1] == 0 or len(w) == 10 for w in graph.walks)
    reach = torch.eye(21, dtype=torch.bool)[0]                                 # nodes that are k steps from the goal
    for k in range(2, 11):
        reach = reach | (torch.from_numpy(graph.edges) & reach).any(1)
        assert [n for n in range(21) if reach[n]] == [n for n in range(21) if graph.shortest[n] <= k or n == 0]


def test_randomwalks_optimality():
    graph = randomwalks.Graph()
    walk = next(w for w in graph.walks if w[-1] == 0 and len(w) - 1 == graph.shortest[w[0]])
    assert graph.optimality(walk) == pytest.approx((10 - len(walk)) / (9 - (len(walk) - 2)))
    assert graph.optimality([*walk, 5, 5]) == graph.optimality(walk)          # behind the goal nothing counts
    assert graph.optimality(walk[:-1]) == 0                                    # it does not arrive
    best = min(graph.starts, key=lambda n: graph.shortest[n])
    stranger = next(n for n in range(1, 21) if not graph.edges[best, n])
    assert graph.optimality([best, stranger, 0]) == 0                          # no such edge
    direct = next(w for w in graph.walks if len(w) == graph.shortest[w[0]])
    assert graph.optimality(direct) == 1


def test_labels_of_the_ceiling_are_bradley_and_terrys():
    """Over 20,000 pairs the better string comes first as often as sigmoid of the difference says."""
    data = ceiling.groups(20000, 2, seed=5)
    truth = ceiling.truth([row[:-1] for g in data for row in g["sequences"]]).view(-1, 2)
    gap = truth[:, 0] - truth[:, 1]
    for low, high in ((0.5, 1.0), (1.0, 2.0), (2.0, 3.0)):
        near = (gap.abs() > low) & (gap.abs() < high)
        share, wanted = float((gap[near] > 0).float().mean()), float(torch.sigmoid(gap[near].abs()).mean())
        assert abs(share - wanted) < 4 * math.sqrt(0.25 / int(near.sum())), (low, share, wanted)


def test_a_reward_model_learns_towards_its_ceiling():
    found = ceiling.run(3000, held_out=4000)
    assert 0.68 < found["accuracy"] < found["ceiling"] and found["pearson"] > 0.6
    assert found["ceiling"] == pytest.approx(0.829, abs=0.015)


def test_two_processes_have_the_gradient_of_one():
    assert proof.processes()["two against one"] < 1e-9


# ---------------------------------------------------------------- check.py

def log_of(name: str | None, steps: int = 2) -> tuple[dict, dict]:
    """The log of a few PPO updates on the tree, with a bug, and the settings of that run."""
    changes = {"lora_r": 8, "lr": 3e-3} if name in ("norms_left_trainable", "merge_by_subtraction") else {}
    cfg = tree.config(steps=steps, batch_size=32, micro_batch=16, merge=name == "merge_by_subtraction", **changes)
    with bugs.inject(name) if name else contextlib.nullcontext():
        rows = tree.train(tree.build(cfg), cfg, every=steps)
    return {key: [row[key] for row in rows if key in row] for key in rows[-1]}, dataclasses.asdict(cfg)


@pytest.mark.parametrize("name", ["temperature_forgotten", "mask_forgotten", "dropout_in_scoring", "greedy_rollouts",
                                  "reference_is_the_base", "score_on_every_token", "kl_missing", "k3_in_reward",
                                  "stale_sampler", "score_behind_the_end", "score_one_late", "score_on_padding",
                                  "missing_end_ignored", "padding_in_the_log", "top_k_rollouts",
                                  "value_through_padding", "whiten_over_padding", "returns_whitened", "clip_min_max",
                                  "value_clip_min_max", "norms_left_trainable", "merge_by_subtraction"])
def test_the_exact_rules_name_the_bug_after_few_updates(name):
    steps = {"stale_sampler": 4, "returns_whitened": 6, "padding_in_the_log": 8}.get(name, 2)
    found = check.diagnose("ppo", *log_of(name, steps))
    assert found and name in found[0][0].bugs, [(rule.cause, saw) for rule, saw in found]


def test_a_sound_run_raises_no_alarm():
    assert check.diagnose("ppo", *log_of(None, 4)) == []
    log, settings = log_of(None, 2)
    assert check.diagnose("ppo", log, settings | {"whiten": False, "kl_target": 1.0}) == []


SFT = {"loss": [1.4, 1.3, 1.2], "eval/loss": [1.4, 1.2], "eval/eos_rate": [0.5, 1.0], "eval/packing_gap": [1e-7],
       "loss_weight": [1.0, 1.0, 1.0], "num_end_tokens": [9.0, 8.0, 9.0]}
REWARD = {"loss": [0.69, 0.5, 0.48, 0.5], "eval/loss": [0.7, 0.5], "eval/accuracy": [0.5, 0.7], "accuracy": [0.6] * 4,
          "eval/longer_wins": [0.5, 0.5], "eval/saved_gap": [0.0], "eval/padding_gap": [1e-6]}


@pytest.mark.parametrize("stage, change, bug", [
    ("sft", {}, None), ("reward", {}, None),
    ("sft", {"loss_weight": [1.0, 1.9, 1.0]}, "prompt_supervised"),
    ("sft", {"loss_weight": [0.7] * 3, "num_end_tokens": [0.0] * 3}, "end_not_supervised"),
    ("sft", {"eval/packing_gap": [4e-3]}, "packing_leaks"),
    ("sft", {"eval/loss": [1.3, 0.01]}, "no_shift"), ("sft", {"eval/eos_rate": [0.5, 0.1]}, "end_not_supervised"),
    ("reward", {"eval/saved_gap": [0.3]}, "head_lost_on_save"),
    ("reward", {"eval/padding_gap": [0.4]}, "score_at_last_column"),
    ("reward", {"loss": [0.69, 0.5, 0.3, 0.31]}, "only_the_best"),
    ("reward", {"loss": [0.69, math.inf, math.nan, 0.5]}, "log_of_sigmoid")])
def test_rules_of_sft_and_reward_read_the_figures_of_their_scripts(stage, change, bug):
    found = check.diagnose(stage, {**(SFT if stage == "sft" else REWARD), **change}, {})
    assert [rule.bugs[:1] for rule, _ in found[:1]] == ([(bug,)] if bug else [])


@pytest.mark.parametrize("settings, healthy", [({"tolerance": 1e-3}, 1e-3), ({"tolerance": 1e-3, "merge": True}, 1e-3),
                                               ({"tolerance": 2e-2}, 0.03), ({"tolerance": 2e-2, "merge": True}, 0.05)])
def test_a_sampler_may_be_as_far_off_as_its_arithmetic_makes_it(settings, healthy):
    """What docs/metrics.md calls healthy is, and three times as much is not; at first a difference, later a stale
    sampler."""
    def causes(gaps):
        return [rule.bugs[0] for rule, _ in check.diagnose("ppo", {"val/sampler_gap": gaps}, settings)]

    assert causes([healthy] * 10) == [] and causes([1e-7] * 5 + [healthy] * 5) == []
    assert causes([3 * healthy] * 10) == ["temperature_forgotten"]
    assert causes([1e-7] * 5 + [3 * healthy] * 5) == ["stale_sampler"]


@pytest.mark.parametrize("change, said", [({}, False), ({"policy/surrogate_avg": [0.08, 0.3]}, True),
                                          ({"val/error_avg": [0.9, 1.0]}, True),
                                          ({"val/error_avg": [1.1, 1.0]}, False)])
def test_without_a_clipped_token_the_loss_is_the_logged_mean(change, said):
    """The second update clips and may differ; an error above twice the loss is a mistake of the clip."""
    log = {"loss/policy_avg": [-0.1, -0.1], "policy/surrogate_avg": [0.1, 0.3], "policy/clipfrac_avg": [0.0, 0.2],
           "loss/value_avg": [0.5, 0.9], "val/error_avg": [1.0, 1.0], "val/clipfrac_avg": [0.0, 0.3]}
    assert bool(check.means_hold_padding(log | change, {})) == said


def test_a_value_without_variance_to_explain_is_no_failure():
    """Once all answers are paid alike the explained variance is any number; then the error has fallen."""
    log = {"val/explained_variance": [-5.0] * 20, "val/error_avg": [1.0] * 20}
    assert "explained variance is -5.00" in check.value_knows_nothing(log, {})
    assert not check.value_knows_nothing(log | {"val/error_avg": [1.0] * 10 + [0.01] * 10}, {})


def test_every_rule_stands_for_bugs_of_its_stage():
    assert all(bugs.BUGS[name].stage == rule.stage for rule in check.RULES for name in rule.bugs)


def test_check_reads_a_run_folder(tmp_path, capsys):
    run = tmp_path / "ppo"
    run.mkdir()
    about = {"stage": "ppo", "config": {"response_len": 4}, "dtype": "torch.float32"}
    (run / "config.json").write_text(json.dumps(about), encoding="utf-8")
    rows, _ = log_of(None, 3)
    write = "\n".join(json.dumps({k: v[i] for k, v in rows.items() if i < len(v)}) for i in range(3))
    (run / "metrics.jsonl").write_text(write, encoding="utf-8")
    assert check.main([str(tmp_path)])
    assert "PASS ppo" in capsys.readouterr().out
    (run / "gate.json").write_text(json.dumps({"checks": [{"name": "n", "ok": False, "figure": "f"}]}),
                                   encoding="utf-8")
    assert not check.main([str(run)])
    (run / "gate.json").unlink()
    bands = {"curves": {"ppo": {"objective/scores": {"step": [3], "low": [90.0], "median": [91.0], "high": [92.0]}}}}
    (tmp_path / "bands.json").write_text(json.dumps(bands), encoding="utf-8")
    assert not check.main([str(run), "--expected", str(tmp_path / "bands.json")])
    assert "seeds before it at 90" in capsys.readouterr().out


# ---------------------------------------------------------------- figures, ablations, mutants

def test_a_figure_holds_every_line_inside_its_panel():
    lines = [figure.Line([(0, 1.0), (1, None), (2, 3.0), (3, 9.0)], [(0, 0.5, 2.0), (3, 1.0, 12.0)], label="a & b")]
    text = figure.grid([figure.Panel("t", lines, "x", "y", 0.0, 4.0)] * 4, 3, "head")
    assert "a &amp; b" in text and text.count("<polygon") == 4
    width, height = (float(x) for x in re.search(r'viewBox="0 0 (\S+) (\S+)"', text).groups())
    points = [tuple(map(float, p.split(","))) for d in re.findall(r'points="([^"]+)"', text) for p in d.split()]
    assert points and all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_ablate_switches_one_detail_and_knows_its_names():
    jobs = [("tree", 0, 2, {}, None), ("tree", 0, 2, {"whiten": False}, None), ("tree", 0, 2, {}, "k3_in_reward")]
    curves = [ablate.one(*job) for job in jobs]
    assert all(len(c) == 1 and c[0][0] == 2 for c in curves)
    assert len({c[0][1] for c in curves}) == 3                                 # every switch changes something
    fields = set(ppo.Config.__dataclass_fields__)
    for what, changes, bug in ablate.SWITCHES.values():
        assert what and set(changes) <= fields and (bug is None or bug in bugs.BUGS)
    with pytest.raises(Exception, match="whitten is not known"):
        ablate.main(ablate.Config(switch=("whitten",)))


def test_mutants_are_small_changes_and_are_judged_by_the_certificates():
    source = "def f(x, mask):\n    '''text'''\n    y = x * mask + 1\n    return y if y > 0 else -x\n"
    texts = [text for _, text in mutants.mutants(source)]
    assert len(texts) == len(set(texts))
    for wanted in ("y = x / mask + 1", "y = x + 1", "y = x * mask - 1", "y = x * mask\n", "y = x * mask + 2", "pass\n",
                   "y >= 0", "-x if y > 0 else y", "else x"):
        assert any(wanted in text for text in texts), wanted
    before = ppo.gae
    text = next(t for what, t in mutants.mutants(mutants.inspect.getsource(ppo.gae)) if "* lam" in what)
    assert mutants.by_certificates(ppo, "gae", text, list(mutants.CHEAP)) == "credit" and ppo.gae is before
