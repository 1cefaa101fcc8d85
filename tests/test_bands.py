"""Expected curves: how they are made, which run they may stand behind, and what is unusual beside them."""
import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

import bands
import common
import demo
import report
from course import bugs, check, goodhart, randomwalks, tree

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "course" / "expected").glob("*.json"))


@pytest.mark.parametrize("outside, df, t", [(0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 4, 2.776), (0.01, 9, 3.250),
                                            (0.001, 7, 5.408), (0.002, 30, 3.385), (0.1, 5, 2.015)])
def test_quantiles_are_those_of_the_printed_tables(outside, df, t):
    assert bands.quantile(outside, df) == pytest.approx(t, abs=6e-4)


def test_a_band_is_students_interval_for_one_run_more():
    """1, 2, 3, 4, 5: 3 +- 2.776 * 1.5811 * sqrt(1.2); the same of e^x on a log scale; a rate stays in 0 .. 1."""
    half = 2.7764 * 2.5 ** 0.5 * 1.2 ** 0.5
    assert bands.spread("x", [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx([3 - half, 3 + half], rel=1e-4)
    assert bands.spread("ppo/kl", [math.exp(x) for x in range(1, 6)]) == pytest.approx(
        [math.exp(3 - half), math.exp(3 + half)], rel=1e-3)
    low, high = bands.spread("val/eos_rate", [0.98, 1.0, 1.0, 0.99, 1.0])
    assert 0.9 < low < 0.98 and 1 <= high <= 1.02
    assert bands.spread("x", [1.0, 1.0]) == pytest.approx([0.98, 1.02])                  # one figure, no spread
    assert bands.spread("objective/kl", [0.0, 1.0, 2.0])[0] < 0                          # no logarithm of 0
    wider = bands.spread("x", [1.0, 2.0, 3.0], 0.01)
    assert wider[0] < bands.spread("x", [1.0, 2.0, 3.0])[0] and wider[1] > bands.spread("x", [1.0, 2.0, 3.0])[1]


def runs_of(n: int, metrics: int, dice: random.Random) -> list[list[dict]]:
    """Logs of ten steps of n sound runs, whose metrics and steps hang together."""
    def one() -> list[dict]:
        whole, own = dice.gauss(0, 1), [dice.gauss(0, 1) for _ in range(metrics)]
        return [{"step": s, **{f"m{k}": s + whole + own[k] + 0.5 * dice.gauss(0, 1) for k in range(metrics)}}
                for s in range(1, 11)]
    return [one() for _ in range(n)]


@pytest.mark.parametrize("metrics", [1, 4, 34])
def test_of_sound_runs_at_most_the_level_is_called_unusual_and_one_that_is_far_off_is(metrics):
    dice, called, seen = random.Random(0), 0, 0
    for _ in range(100):
        *earlier, new = runs_of(6, metrics, dice)
        ranges = bands.curves(earlier)
        called += bands.too_many(bands.unusual(bands.columns(new), ranges), ranges)
        far = [{k: x + 30 if k != "step" else x for k, x in row.items()} for row in new]
        seen += bands.too_many(bands.unusual(bands.columns(far), ranges), ranges)
    assert called <= bands.LEVEL * 100 and seen > 90, (called, seen)


def test_every_seed_is_judged_beside_the_others():
    logs = runs_of(5, 3, random.Random(1))
    assert bands.left_out(logs) == [0] * 5
    logs[2] = [{k: x + 500 if k != "step" else x for k, x in row.items()} for row in logs[2]]
    assert bands.left_out(logs) == [0, 0, 3, 0, 0]


@pytest.mark.parametrize("m, k", [(1, 1), (2, 2), (4, 2), (20, 2), (21, 3), (34, 4)])
def test_two_metrics_or_a_tenth_of_them_make_a_run_unusual(m, k):
    ranges = dict.fromkeys(map(str, range(m)))
    assert bands.too_many(["x"] * k, ranges) and not bands.too_many(["x"] * (k - 1), ranges)
    assert not bands.too_many([], {})


def test_curves_are_of_the_steps_that_all_seeds_have():
    logs = [[{"step": 1, "a": 1.0, "seconds": 1.0}, {"step": 2, "a": 5.0}, {"step": 3, "a": 0.0, "b": 1.0}],
            [{"step": 1, "a": 3.0}, {"step": 2, "a": None}, {"step": 3, "a": 9.0}],
            [{"step": 1, "a": 2.0, "time/score": 1.0}, {"step": 2, "a": 6.0}, {"step": 3, "a": 4.0}]]
    ends = [bands.spread("a", x, bands.LEVEL / 2) for x in ([1.0, 3.0, 2.0], [0.0, 9.0, 4.0])]       # of one metric
    assert bands.curves(logs) == {"a": {"step": [1, 3], "low": [1.0, 0.0], "high": [3.0, 9.0], "median": [2.0, 4.0],
                                        "from": [x for x, _ in ends], "to": [x for _, x in ends]}}
    assert bands.at_the_end(logs, ["a"]) == {"a": [0.0, 9.0, 4.0]}
    assert bands.columns(logs[1])["a"][0] == 3.0 and math.isnan(bands.columns(logs[1])["a"][1])


BAND = {"x": {"step": list(range(1, 11)), "low": [0.0] * 10, "median": [0.5] * 10, "high": [1.0] * 10,
              "from": [-0.5] * 10, "to": [1.5] * 10}}


@pytest.mark.parametrize("tail, said", [([1.4, 1.4], False), ([1.4, 1.7], False), ([1.7, 1.4], False),
                                        ([1.7, 1.7], True), ([-0.4, -0.4], False), ([-0.7, 1.7], True)])
def test_unusual_is_most_of_the_last_fifth_outside(tail, said):
    assert bool(bands.unusual({"x": [9.0] * 8 + tail, "y": [0.0]}, BAND)) == said


def test_a_shorter_run_is_judged_at_its_own_steps():
    band = {"x": BAND["x"] | {"from": [10.0 * i for i in range(10)], "to": [10.0 * i + 1 for i in range(10)]}}
    assert not bands.unusual({"x": [0.5, 10.5, 20.5]}, band) and bands.unusual({"x": [0.5, 10.5, 50.0]}, band)


def test_curves_are_found_by_settings():
    cfg = tree.config(seed=7, out_dir="elsewhere")
    about = {"stage": "ppo", "config": json.loads(json.dumps(dataclasses.asdict(cfg)))}
    file = {"settings": {"plain": bands.settings(dataclasses.asdict(tree.config())),
                         "dear": bands.settings(dataclasses.asdict(tree.config(kl_coef=0.5)))},
            "curves": {"plain": BAND, "dear": {}}}
    assert bands.beside(about, file) == (BAND, "plain")
    about["config"]["kl_coef"] = 0.1
    found, why = bands.beside(about, file)
    assert found == {} and "plain: kl_coef 0.1 (there 0.3)" in why and "dear: kl_coef 0.1 (there 0.5)" in why
    found, why = bands.beside(about, {"curves": {"ppo": BAND}})            # whatever runs these were of
    assert found == {} and "does not say with which settings" in why


def test_of_a_chain_the_entry_of_the_stage_is_meant_and_its_own_data_are_no_setting():
    """The reward model's data lie beside its folder, wherever the chain is."""
    def config(where: str, data: str, lr: float = 0.1) -> dict:
        return {"data": data, "out_dir": f"{where}/reward", "lr": lr, "seed": 3}
    file = {"settings": {"reward": bands.settings(config("out/a", "out/a/p.jsonl")), "ppo": {"lr": 9}},
            "curves": {"reward": BAND, "ppo": {}}}
    assert bands.beside({"stage": "reward", "config": config("x/y", "x/y/p.jsonl")}, file) == (BAND, "reward")
    found, why = bands.beside({"stage": "reward", "config": config("x/y", "other/p.jsonl")}, file)
    assert not found and "data 'other/p.jsonl' (there 'p.jsonl')" in why and "ppo" not in why
    assert not bands.beside({"stage": "reward", "config": config("x/y", "x/y/p.jsonl", 0.2)}, file)[0]


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_recorded_bands_hold_five_seeds_and_say_how_they_were_made(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    n = len(found["seeds"])
    assert n >= 5 and found["command"].startswith("python ") and found["machine"] and found["git"] and found["minutes"]
    assert found["settings"].keys() == found["curves"].keys() and {*found["left_out"]} >= {*found["curves"]}
    assert all(len(x) == n for x in [*found["figures"].values(), *found["left_out"].values()])
    for name, band in found["bands"].items():
        expected = bands.spread(name, found["figures"][name], bands.LEVEL / len(found["bands"]))
        assert band == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for kind in found["curves"].values():
        for band in kind.values():
            assert all(z <= a <= b <= c <= d for z, a, b, c, d in zip(*(
                band[key] for key in ("from", "low", "median", "high", "to")), strict=True))
            assert len(band["step"]) == len(band["low"]) and band["step"] == sorted(band["step"])


def test_recorded_bands_are_those_of_the_settings_as_they_are():
    """Whoever changes a default of the benchmarks or of the demo makes their bands again."""
    lab = goodhart.Config()
    kinds = {"tree": {"whole models": tree.config(), "adapters": tree.config(lora_r=8, lr=3e-3, value_lr=3e-3)},
             "randomwalks": {"randomwalks": randomwalks.Config()},
             "lab": {key: goodhart.climb_settings(lab, n, b, 3) for key, (n, b) in goodhart.climbs(lab).items()}}
    wanted = {name: {key: bands.settings(dataclasses.asdict(cfg)) for key, cfg in configs.items()}
              for name, configs in kinds.items()} | {"demo": demo.settings()}
    for name, now in wanted.items():
        found = json.loads((ROOT / "course" / "expected" / f"{name}.json").read_text(encoding="utf-8"))
        assert found["settings"].keys() == now.keys()
        for key, recorded in found["settings"].items():
            assert not bands.differences(now[key], recorded), f"{name}, {key}"


def test_the_table_of_false_alarms_is_that_of_the_recorded_files():
    rows, results = bands.alarms(FILES), ROOT / "docs" / "results"
    assert (results / "bands.md").read_text(encoding="utf-8") == bands.table(rows)
    assert json.loads((results / "bands.json").read_text(encoding="utf-8")) == rows
    wrong, n = sum(r["alarms"] for r in rows), sum(len(r["left_out"]) for r in rows)
    assert n >= 60 and wrong <= bands.LEVEL * n, (wrong, n)


def test_a_run_with_other_settings_is_run_again(tmp_path, monkeypatch):
    """A gate alone says nothing of the settings behind it."""
    monkeypatch.setattr(bands, "ROOT", tmp_path)
    monkeypatch.setattr(common, "git_hash", lambda: "abc")
    cfg = tree.config(steps=2, batch_size=16, micro_batch=16, expected="e.json", out_dir=str(tmp_path / "runs"))
    run = []

    def main(cfg) -> bool:
        run.append((cfg.seed, cfg.kl_coef))
        return tree.main(cfg)

    bands.make(cfg.expected, {"k": cfg}, main, (0, 1))
    bands.make(cfg.expected, {"k": cfg}, main, (0, 1, 2))                                # two are there
    dear = dataclasses.replace(cfg, kl_coef=0.9)
    bands.make(cfg.expected, {"k": dear}, main, (0, 1))
    assert run == [(0, 0.3), (1, 0.3), (2, 0.3), (0, 0.9), (1, 0.9)]
    with pytest.raises(common.UserError, match="k_seed_2 was made with other settings than .*k_seed_0: kl_coef 0.3"):
        bands.write(tmp_path / "f.json", {"k": [tmp_path / "runs" / f"k_seed_{s}" for s in (0, 1, 2)]}, (0, 1, 2))
    made = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert made["settings"]["k"]["kl_coef"] == 0.9 and made["git"] == ["abc"]


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
            band.update({"from": [x + 1e6 for x in band["from"]], "to": [x + 1e6 for x in band["to"]]})
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
