"""The laboratory, the benchmarks with a known answer, and the tools around them (course/), in small."""
import contextlib
import dataclasses
import itertools
import json
import math
import random
import re
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch

import ppo
from course import ablate, bugs, ceiling, check, figure, goodhart, mutants, proof, randomwalks, record, tree

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
    folder = goodhart.folder_of(cfg, 0, "256 labels, beta 0.2")                # a run folder like any other
    stage, log, settings = check.read(folder)
    assert stage == "ppo" and settings["labels"] == 256 and settings["kl_coef"] == 0.2
    assert log["gold/score"] == pytest.approx([row["gold"] for row in result["runs"]["256 labels, beta 0.2"]])
    first, *_, last = result["best_of_n"]["256"]
    assert first[:2] == [1, 0.0] and last[1] == pytest.approx(math.log(8) - 7 / 8)
    assert last[2] > first[2] and last[3] > first[3]                           # some optimisation does good
    assert result["ended"] > 0.95
    whole = {"runs": [result], "labels": [64, 256], "betas": [0.0, 0.2], "command": "c", "date": "d", "torch": "t",
             "git": "abcdefgh", "workers": 1, "machine": "m"}
    text = goodhart.draw(whole)
    assert text.count("class=\"t\"") == 6 and "nan" not in text
    table = goodhart.table(whole)
    assert "| 64 labels, beta 0 |" in table and "| 64 to 256 labels | best of n | " in table
    judged = goodhart.judge(whole)
    assert isinstance(judged, bool)


def test_peaks_finds_the_top_of_a_parabola():
    rows = [{"step": i, "kl": (i / 10) ** 2, "proxy": i / 10, "gold": 1 - (i / 10 - 2) ** 2} for i in range(60)]
    result = {"gold_mean": 0.0, "gold_std": 1.0, "runs": {"x": rows, "early": rows[:15]}, "best_of_n": {"9": [
        [1, 0.0, 0.0, 0.0], [2, 1.0, 1.0, 3.0], [4, 4.0, 2.0, 2.0]], "99": [[1, 0.0, 0.0, 0.0], [2, 1.0, 1.0, 3.0]]}}
    found, = goodhart.peaks([result], "x")
    early, = goodhart.peaks([result], "early")                                 # it ended while gold still rose
    assert found["reached"] and not early["reached"] and early["d"] == pytest.approx(1.4, abs=0.1)
    assert goodhart.place([found, early]) == f"{goodhart.spread([found['d']])}; no peak reached in 1 of 2"
    best, censored = (goodhart.peaks([result], key, "n")[0] for key in ("9", "99"))
    assert (best["d"], best["peak"], best["end"], best["reached"]) == (1.0, 3.0, 2.0, True) and not censored["reached"]
    assert found["d"] == pytest.approx(2, abs=0.06) and found["peak"] == pytest.approx(1, abs=0.08)
    assert found["gold"] == pytest.approx(sum(r["gold"] for r in rows[-6:]) / 6)


def test_what_moves_is_told_by_paired_differences():
    """1, 2, 3 against 2, 4, 6: the mean of 1, 2, 3 is 2, their interval 4.303 / sqrt(3) on either side; of one seed
    there is none."""
    before, after = ([{"x": float(x)} for x in xs] for xs in ((1, 2, 3), (2, 4, 6)))
    half = 4.3027 / 3 ** 0.5
    assert goodhart.moved(before, after, "x") == pytest.approx((2, 2 - half, 2 + half), rel=1e-4)
    assert goodhart.moved(before[:1], after[:1], "x") == (1, 1, 1)


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
    """More with more pairs, and more from rankings of four than from as many strings in pairs."""
    few, more, ranked = (ceiling.run(pairs, k, held_out=4000) for pairs, k in ((1500, 2), (6000, 2), (6000, 4)))
    for what, first in (("accuracy", 0.68), ("pearson", 0.6)):
        assert first < few[what] < more[what] < ranked[what], what
    assert ranked["accuracy"] < ranked["ceiling"] == pytest.approx(0.829, abs=0.015)


def test_randomwalks_in_twenty_updates(monkeypatch):
    """From 0.35 to 0.9; a score on every token leaves it at 0.45, a value that sees the action at 0.75."""
    graph, real = randomwalks.Graph(), randomwalks.fine_tune
    monkeypatch.setattr(randomwalks, "fine_tune", lambda graph, seed: real(graph, seed, epochs=12))
    monkeypatch.setattr(randomwalks, "PATHS", 2000)
    curve = randomwalks.train(0, 20)
    assert 0.2 < randomwalks.measure(0) < 0.4 and curve[0] < 0.45 and len(graph.starts) == 20
    assert statistics.mean(curve[-5:]) > 0.85, curve


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
    scores = {"step": [3], "low": [90.0], "median": [91.0], "high": [92.0], "from": [80.0], "to": [99.0]}
    bands = {"settings": {"ppo": {"response_len": 4}}, "curves": {"ppo": {"objective/scores": scores}}}
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
    curves = [ablate.one("tree", 0, 2, name) for name in (None, "whiten", "kl_kind", "value_init", "adam_eps",
                                                         "mean_of_means")]
    assert all(len(c) == 1 and c[0][0] == 2 for c in curves)
    assert len({c[0][1] for c in curves}) == 5                                 # all but the last, of one micro-batch
    assert curves[0] == curves[5] == ablate.one("tree", 0, 2, None)            # patches are taken back
    with pytest.raises(Exception, match="whitten is not known"):
        ablate.main(ablate.Config(switch=("whitten",)))
    with pytest.raises(Exception, match="whiten is not known on sft"):
        ablate.main(ablate.Config(on="sft", switch=("whiten",)))


@pytest.mark.parametrize("world, usual", [("tree", tree.config()), ("randomwalks", randomwalks.Config()),
                                          ("language", goodhart.climb_settings(goodhart.Config(), 2000, 0.05, 0)),
                                          ("sft", goodhart.sft_settings()), ("reward", goodhart.reward_settings())])
def test_every_switch_is_another_setting_than_usual_in_its_world(world, usual):
    """A switch that sets what is set already would draw two equal curves; four minibatches are four."""
    for name, switch in ablate.known(world).items():
        change, patches = switch.change(usual), switch.patches()
        assert switch.what and (change or patches), name
        assert not change or dataclasses.replace(usual, **change) != usual, name
        assert "micro_batch" not in change or usual.batch_size % change["micro_batch"] == 0, name
        if name == "minibatches":
            assert change["minibatches"] * change["micro_batch"] == usual.batch_size
        for (where, attribute), value in patches.items():
            assert vars(where)[attribute] is not value, name


def test_ablate_says_where_a_switch_changes_nothing(tmp_path, capsys):
    """The reward model's own step, twice: with a bug that pairs cannot show, and with another rate."""
    made = [[[5, 0.5], [10, 0.6]], [[5, 0.5], [10, 0.7]]]
    other = [[[5, 0.5], [10, 0.65]], [[5, 0.5], [10, 0.74]]]
    runs = {"as it is": made, "only_the_best": [[*c] for c in made], "lr": other}
    text = ablate.table(ablate.Config(on="reward"), runs, "Made")
    assert "| lr | lr 0.0015, not 0.0005 |" in text and "of 2 seeds" in text
    assert re.search(r"only_the_best .*no effect is possible here, the same numbers \|", text)
    assert re.search(r"\| lr .* \| \+0.0450 \(-0.0185 .. \+0.1085\) \|", text)
    assert "only_the_best (no effect possible)" in ablate.draw(ablate.Config(on="reward"), runs)


@pytest.mark.parametrize("world", ["sft", "reward"])
def test_the_first_two_stages_can_be_swept(world, monkeypatch):
    """In small: a curve of the held-out figure that moves, and a detail that moves it."""
    real, label = goodhart.fine_tune, goodhart.label
    monkeypatch.setattr(goodhart, "fine_tune", lambda seed, **more: real(seed, samples=1600, **more))
    monkeypatch.setattr(goodhart, "label", lambda model, n, seed: label(model, n // 10, seed))
    ablate.language.cache_clear()
    plain, fast = (ablate.one(world, 0, 0, name) for name in (None, "lr"))
    ablate.language.cache_clear()
    assert len(plain) == len(fast) >= 2 and plain != fast
    assert plain[-1][1] < plain[0][1] < 3 if world == "sft" else all(0.3 < y < 0.9 for _, y in plain)


def test_the_proof_runs_whatever_is_recorded(tmp_path, capsys):
    """A record that claims something else is measured again; a part that is left out keeps its own and is named."""
    made_by = {"torch": "1.0", "machine": "m", "date": "2001-01-01", "code": "c"}
    old = {"memory": {**made_by, "rows": [{"one base": 99.0}]}, "processes": {**made_by, "rows": [{"x": 1.0}]}}
    (tmp_path / "proof.json").write_text(json.dumps(old), encoding="utf-8")
    assert proof.main(proof.Config(only=("memory",), workers=1, out_dir=str(tmp_path)))
    found = json.loads((tmp_path / "proof.json").read_text(encoding="utf-8"))
    assert found["processes"] == old["processes"]
    assert found["memory"]["rows"][0]["one base"] == pytest.approx(14.92, 1e-3)
    assert found["memory"]["code"] == record.stamp()["code"] and not (tmp_path / "proof.part").exists()
    said = capsys.readouterr().out
    assert "memory: 1 runs" in said and "processes: recorded 2001-01-01, not run" in said
    text = (tmp_path / "proof.md").read_text(encoding="utf-8")
    assert "2001-01-01, torch 1.0" in text and "14.92 GB, by hand 14.92" in text


def test_an_interrupted_run_goes_on_and_other_code_starts_anew(tmp_path, capsys):
    file, made_by = tmp_path / "r.json", record.stamp()
    jobs = {"sums": [(types.SimpleNamespace, (1,))], "none": []}           # cannot be run: its row must be there
    record.Unfinished(file, made_by).keep("sums [1]", {"x": 7})
    fresh, whole = record.run(file, jobs, (), 1, {**made_by, "date": "another"})
    assert fresh["sums"]["rows"] == [{"x": 7}] and list(whole) == ["sums"]
    assert "sums: 0 runs, 1 more before an interruption" in capsys.readouterr().out
    assert record.Unfinished(file, made_by).rows == {}                     # it has ended
    record.Unfinished(file, made_by).keep("sums [1]", {"x": 7})
    assert record.Unfinished(file, {**made_by, "code": "another"}).rows == {}
    with pytest.raises(Exception, match="sum: the parts are sums, none"):
        record.run(file, jobs, ("sum",), 1, made_by)


def test_the_stamp_is_of_the_code_that_runs(monkeypatch):
    before, other = record.stamp()["code"], record.ROOT / "Makefile"
    assert before == record.stamp()["code"] != record.stamp(other)["code"]
    monkeypatch.setitem(sys.modules, "new", types.SimpleNamespace(__file__=str(other)))
    assert record.stamp()["code"] == record.stamp(other)["code"]


def certified(**changes) -> dict[str, bool]:
    """Verdicts over made-up rows that just pass, with some figures changed."""
    x = {"regret": 0.02, "gap": 0.0, "kl": 1.04, "start": 0.40, "early": 0.98, "late": 0.99, "base": 14.92,
         "seconds": 0.9, "k3": 0.275} | changes
    curve = [0.4] * 50 + [x["early"]] * 10 + [x["late"]] * 40
    kinds = proof.certificates.ELSEWHERE | {"k3 in the loss": x["k3"]}
    gradient = {f"{layout}, {what}": y for layout in ("whole models", "adapters")
                for what, y in (("policy", 1e-13), ("CPU seconds", x["seconds"]))}
    sizes = {"one base": x["base"], "by hand": 14.92, "four bf16 copies": 53.91, "four by hand": 53.91,
             "two trained whole": 242.6, "two by hand": 242.6}
    run = {"layout": "l", "judge": "true", "beta": 0.1, "first_gap": x["gap"], "first_kl": 0.0}
    found = {"optimum": [{**run, "seed": s, "regret": [[60, r]]} for s, r in ((10, 0.001), (11, x["regret"]))],
             "adaptive": [{"target": 1.0, "kl": 1.0}, {"target": 1.0, "kl": x["kl"]}],
             "randomwalks": [{"fine-tuned": 0.3, "optimality": [0.99] * 100},
                             {"fine-tuned": x["start"], "optimality": curve}],
             "memory": [sizes], "certificates": [{"name": "exact gradient", **gradient},
                                                 {"name": "KL estimators", **kinds}]}
    return {name: ok for name, ok, _ in proof.verdicts(found)}


@pytest.mark.parametrize("change, verdict", [
    ({"regret": 0.021}, "regret, l, true reward, beta 0.1"), ({"gap": 1e-3}, "before the first step ratio 1 and KL 0"),
    ({"kl": 1.06}, "KL held at 1"), ({"start": 0.41}, "randomwalks, fine-tuned"),
    ({"early": 0.97}, "best five updates within 60"), ({"late": 0.985}, "best five updates within 100"),
    ({"base": 14.84}, "7B, one base"), ({"seconds": 1.1}, "exact gradient in a second"),
    ({"k3": 0.31}, "KL estimators as elsewhere")])
def test_one_seed_that_misses_fails_the_proof(change, verdict):
    assert all(certified().values())
    assert [name for name, ok in certified(**change).items() if not ok] == [verdict]


def test_mutants_are_small_changes_and_are_judged_by_the_certificates():
    source = ("def f(x, mask, n=3, side='left'):\n    '''text'''\n    y = x * mask + 1\n    with torch.no_grad():\n"
              "        z = 2\n    if mask and side == 'right':\n        return z\n    return y if y > 0 else -x\n")
    texts = [text for _, text in mutants.mutants(source)]
    assert len(texts) == len(set(texts))
    for wanted in ("y = x / mask + 1", "y = x + 1", "y = x * mask - 1", "y = x * mask\n", "y = x * mask + 2", "pass\n",
                   "y >= 0", "-x if y > 0 else y", "else x", "n=4", "side='right')", "    if True:\n        z = 2",
                   "if False:", "mask or side", "if mask:", "        pass\n    return y"):
        assert any(wanted in text for text in texts), wanted
    before = ppo.gae
    source = mutants.inspect.getsource(ppo.gae)
    assert mutants.by_certificates(ppo, "gae", source, list(mutants.CHEAP)) == ""              # as it is it passes
    text = next(t for what, t in mutants.mutants(source) if "* lam" in what)
    assert mutants.by_certificates(ppo, "gae", text, list(mutants.CHEAP)) == "credit" and ppo.gae is before
