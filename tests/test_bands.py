"""Expected curves: how they are made, which run they may stand behind, and what is unusual beside them."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import bands
import common
import report
from course import bugs, check, goodhart, randomwalks, tree

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "course" / "expected").glob("*.json"))


def test_curves_are_low_median_and_high_of_the_steps_that_all_seeds_have():
    logs = [[{"step": 1, "a": 1.0, "seconds": 1.0}, {"step": 2, "a": 5.0}, {"step": 3, "a": 0.0, "b": 1.0}],
            [{"step": 1, "a": 3.0}, {"step": 2, "a": None}, {"step": 3, "a": 9.0}],
            [{"step": 1, "a": 2.0, "time/score": 1.0}, {"step": 2, "a": 6.0}, {"step": 3, "a": 4.0}]]
    assert bands.curves(logs) == {"a": {"step": [1, 3], "low": [1.0, 0.0], "high": [3.0, 9.0], "median": [2.0, 4.0]}}
    assert bands.at_the_end(logs, ["a"]) == {"a": [0.0, 9.0, 4.0]}
    assert bands.spread([1.0, 3.0]) == [0.0, 4.0] and bands.spread([1.0, 1.0]) == [0.98, 1.02]


BAND = {"x": {"step": list(range(1, 11)), "low": [0.0] * 10, "median": [0.5] * 10, "high": [1.0] * 10}}


@pytest.mark.parametrize("tail, said", [([1.4, 1.4], False), ([1.4, 1.7], False), ([1.7, 1.4], False),
                                        ([1.7, 1.7], True), ([-0.4, -0.4], False), ([-0.7, 1.7], True)])
def test_unusual_is_most_of_the_last_fifth_outside_the_widened_range(tail, said):
    """0 .. 1 is widened to -0.51 .. 1.51."""
    assert bool(bands.unusual({"x": [9.0] * 8 + tail, "y": [0.0]}, BAND)) == said


def test_a_shorter_run_is_judged_at_its_own_steps():
    band = {"x": BAND["x"] | {"low": [10.0 * i for i in range(10)], "high": [10.0 * i + 1 for i in range(10)]}}
    assert not bands.unusual({"x": [0.5, 10.5, 20.5]}, band) and bands.unusual({"x": [0.5, 10.5, 50.0]}, band)


def test_curves_are_found_by_settings_or_by_stage():
    cfg = tree.config(seed=7, out_dir="elsewhere")
    about = {"stage": "ppo", "config": json.loads(json.dumps(dataclasses.asdict(cfg)))}
    file = {"settings": {"plain": bands.settings(dataclasses.asdict(tree.config())),
                         "dear": bands.settings(dataclasses.asdict(tree.config(kl_coef=0.5)))},
            "curves": {"plain": BAND, "dear": {}}}
    assert bands.beside(about, file) == (BAND, "plain")
    about["config"]["kl_coef"] = 0.1
    found, why = bands.beside(about, file)
    assert found == {} and "plain: kl_coef 0.1 (there 0.3)" in why and "dear: kl_coef 0.1 (there 0.5)" in why
    assert bands.beside({"stage": "sft", "config": {}}, {"curves": {"sft": BAND}}) == (BAND, "sft")


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_recorded_bands_hold_five_seeds_and_say_how_they_were_made(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["seeds"]) >= 5 and found["command"].startswith("python ") and found["seconds"] and found["machine"]
    for name, values in found["figures"].items():
        assert len(values) == len(found["seeds"])
        assert found["bands"][name] == pytest.approx(bands.spread(values), rel=1e-4, abs=1e-5)
    for kind in found["curves"].values():
        for band in kind.values():
            assert all(a <= b <= c for a, b, c in zip(band["low"], band["median"], band["high"], strict=True))
            assert len(band["step"]) == len(band["low"]) and band["step"] == sorted(band["step"])


def test_recorded_bands_are_those_of_the_settings_as_they_are():
    """Whoever changes a default of the benchmarks makes their bands again."""
    lab = goodhart.Config()
    kinds = {"tree": {"whole models": tree.config(), "adapters": tree.config(lora_r=8, lr=3e-3, value_lr=3e-3)},
             "randomwalks": {"randomwalks": randomwalks.Config()},
             "lab": {f"{n} labels, beta {b:g}": goodhart.climb_settings(lab, n, b, 3)
                     for n, b in [(2000, b) for b in lab.betas] + [(500, 0.0), (8000, 0.0)]}}
    for name, configs in kinds.items():
        found = json.loads((ROOT / "course" / "expected" / f"{name}.json").read_text(encoding="utf-8"))
        assert set(found["settings"]) == set(configs)
        for key, cfg in configs.items():
            now = bands.settings(dataclasses.asdict(cfg))          # it may have options that came later
            assert {k: now.get(k) for k in found["settings"][key]} == found["settings"][key], f"{name}, {key}"


def test_from_a_run_to_its_bands_its_report_and_its_verdict(tmp_path, monkeypatch, capsys):
    """The tree in small: two seeds make a file, a third run finds it by itself, in the report and in check.py; with
    other settings it stands alone and says why; what leaves the range is told."""
    monkeypatch.setattr(bands, "ROOT", tmp_path)
    monkeypatch.setattr(common, "git_hash", lambda: "")
    cfg = tree.config(steps=5, batch_size=16, micro_batch=16, expected="e.json", out_dir=str(tmp_path / "runs"))
    assert not bands.make(cfg.expected, {"small": cfg}, tree.main, (0, 1))               # five updates reach no optimum
    made = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert made["seeds"] == [0, 1] and made["curves"]["small"]["exact/regret"]["step"] == [2, 4, 5]
    assert not {"seconds", "tokens_per_sec", "time/train"} & set(made["curves"]["small"])
    run, other = tmp_path / "runs/small_seed_0", tmp_path / "other"
    assert bands.unusual(check.read(run)[1], made["curves"]["small"]) == []

    monkeypatch.setattr("sys.argv", ["report.py", str(run)])
    report.main()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('class="band"') > 20 and "ppo: curves of e.json (small)" in page
    tree.main(dataclasses.replace(cfg, kl_coef=0.2, out_dir=str(other)))
    monkeypatch.setattr("sys.argv", ["report.py", str(other)])
    report.main()
    page = (other / "report.html").read_text(encoding="utf-8")
    assert 'class="band"' not in page and "no curves of e.json" in page and "kl_coef 0.2 (there 0.3)" in page

    (run / "gate.json").unlink()
    capsys.readouterr()
    assert check.main([str(run)]) and f"PASS ppo ({run}, beside e.json: small)\n" == capsys.readouterr().out
    for far in (1, 6):                                         # one figure of many may be unusual, six may not
        for name in list(made["curves"]["small"])[:far]:
            band = made["curves"]["small"][name]
            band.update(low=[x + 50 for x in band["low"]], high=[x + 50 for x in band["high"]])
        (tmp_path / "e.json").write_text(json.dumps(made), encoding="utf-8")
        assert check.main([str(run)]) == (far == 1)
        assert capsys.readouterr().out.count("unusual: objective/") == far
    with pytest.raises(common.UserError, match="does not exist"):
        check.main([str(run), "--expected", "nowhere.json"])


def test_the_demos_chain_names_its_bands(tmp_path):
    for stage in ("sft", "ppo"):
        (tmp_path / stage).mkdir()
    assert bands.named_by(tmp_path / "sft", {"config": {}}) is None
    (tmp_path / "demo.json").write_text(json.dumps({"expected": "course/expected/demo.json"}), encoding="utf-8")
    assert bands.named_by(tmp_path / "sft", {"config": {}}) == ROOT / "course/expected/demo.json"
    assert bands.named_by(tmp_path / "sft", {"config": {"expected": "course/expected/gone.json"}}) is None


def test_the_table_of_the_zoo_is_what_the_rules_say_of_the_recorded_logs():
    """Of seeds that no rule was written with; how well the rules do is for the table to say."""
    result, tuned = (json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
                     for name in ("zoo_check", "zoo"))
    assert check.zoo_table(result) == (ROOT / "docs" / "results" / "zoo_check.md").read_text(encoding="utf-8")
    assert not set(result["seeds"]) & set(tuned["seeds"]) and set(result["bugs"]) == set(bugs.BUGS)
    assert all(len(v.outcomes) == len(result["seeds"]) for v in check.judge_zoo(result))
    causes = {rule.cause for rule in check.RULES} | {""}
    assert {cause for runs in result["elsewhere"].values() for _, _, cause in runs} <= causes


def test_the_same_run_under_two_names_is_one_sound_run():
    curve, other = ([{"step": [1, 2], "objective/kl": [0.0, x]}] for x in (1.0, 1.5))
    result = {"sound": {"ppo {}": [curve, other], 'ppo {"micro_batch": 16}': [
        [{"step": [1, 2], "objective/kl": [0.0, 1.00001]}], [{"step": [1, 2], "objective/kl": [0.0, 1.7]}]]}}
    assert check.sound_runs(result) == [("ppo", "")] * 3


def test_a_cause_for_one_bug_is_exact_and_for_several_a_family():
    one, many = (next(r for r in check.RULES if name in r.bugs) for name in ("kl_missing", "retokenised"))
    run, crashed = [{"step": [1]}], [{"crash": ["e"]}]
    assert [check.outcome(*x) for x in (("kl_missing", run, one), ("retokenised", run, many), ("kl_sign", run, one),
                                        ("kl_sign", run, None), ("kl_sign", crashed, None))] == list(check.OUTCOMES)


def test_randomwalks_write_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(randomwalks, "fine_tune", lambda graph, seed: real(graph, seed, epochs=1))
    cfg = randomwalks.Config(steps=2, batch_size=8, micro_batch=8, out_dir=str(tmp_path / "r"))
    torch.manual_seed(0)
    assert not randomwalks.main(cfg)                                                     # two updates prove nothing
    assert len(bands.rows_of(tmp_path / "r/metrics.jsonl")) == 2
    assert json.loads((tmp_path / "r/gate.json").read_text(encoding="utf-8"))["passed"] is False


real = randomwalks.fine_tune
