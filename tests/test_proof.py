"""The certificates in their fast form (course/certificates.py, course/proof.py), and the bug zoo against them."""
import json
import re
import statistics
import warnings
from pathlib import Path

import pytest
import torch

import ppo
import sft
from course import bugs, certificates, check, tree, zoo
from data import batch as data_batch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", certificates.FAST)
def test_certificate(name):
    figures = certificates.FAST[name]()
    assert figures and all(x == x for x in figures.values())


def caught(name: str) -> tuple[str, str] | None:
    """The first certificate that the bug breaks, and how."""
    for title, certificate in certificates.FAST.items():
        with bugs.inject(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                certificate()
            except Exception as error:
                return title, f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", bugs.BUGS)
def test_no_bug_of_the_zoo_passes_all_certificates(name):
    """And it is a certificate that stops it, with what it measured, not a crash for another reason."""
    found = caught(name)
    assert found, f"{name} is seen by no certificate"
    assert found[1].startswith("AssertionError"), found


def test_a_bug_leaves_with_its_block():
    before = {name: vars(ppo)[name] for name in ("kl", "gae", "policy_loss", "rollout")}
    for name in bugs.BUGS:
        patched = bugs.BUGS[name].patches()
        saved = {key: vars(key[0])[key[1]] for key in patched}
        with pytest.raises(KeyError), bugs.inject(name):
            assert all(vars(where)[what] is not saved[where, what] for where, what in patched), name
            raise KeyError
        assert all(vars(where)[what] is old for (where, what), old in saved.items()), f"{name} stays behind"
    assert before == {name: vars(ppo)[name] for name in before}


def test_every_bug_has_a_diagnosis_in_two_languages():
    for item in bugs.BUGS.values():
        assert 40 < len(item.why_en) < 300 and item.en.count(". ") >= 1, item.name
        assert any("\u4e00" <= letter <= "\u9fff" for letter in item.zh) and item.zh.count("。") >= 2, item.name


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((ROOT / "docs/results/zoo.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", bugs.BUGS)
def test_a_diagnosis_says_what_the_record_shows(name, record):
    """Of every figure it names: in all recorded runs it is where the diagnosis says, beyond all sound runs. Where it
    names none, the curve looks sound and check.py has nothing to say. Other figures it may not speak of."""
    item, entry = bugs.BUGS[name], record["bugs"][name]
    sound = record["sound"][entry["sound"]]
    assert len(entry["curves"]) == len(sound) == len(record["seeds"]) >= 3
    for sign in item.signs:
        assert zoo.shows(sign, entry["curves"], sound), zoo.measured(sign, entry["curves"], sound)
        opposite = bugs.Sign(sign.metric, {"higher": "lower", "lower": "higher"}[sign.way], sign.when)
        assert not zoo.shows(opposite, entry["curves"], sound)
    if not item.signs:
        settings = json.loads(entry["sound"].split(" ", 1)[1])
        assert not zoo.seen(entry, sound) and not any(check.first_causes(item.stage, entry["curves"], settings))
    logged = {key for curve in sound for table in curve for key in table} - {"step"}
    named = set(re.findall(r"[a-z]+/\w+|\b(?:kl_coef|loss_weight|num_end_tokens)\b", item.en + item.zh)) & logged
    assert named <= {sign.metric for sign in item.signs} <= logged | {"crash"}


def test_the_tables_are_those_of_the_record(record):
    assert (ROOT / "docs/results/zoo.md").read_text(encoding="utf-8") == zoo.table(record)
    assert set(record["bugs"]) == set(bugs.BUGS) and "--no_certificates" not in record["command"]
    assert all(entry["caught"] for entry in record["bugs"].values())


def test_a_bug_outside_the_zoo_has_its_guard():
    for _, _, test in bugs.ABSENT:
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_means_of_means_are_means():
    """The bugs average the means of micro-batches; they do not sum them, and sft.evaluate is not touched."""
    rows = [{"ids": [1] * n + [tree.END], "mask": [0] + [1] * n} for n in (2, 3, 5, 9)]
    net, cfg = tree.network(0), sft.Config(micro_batch=2, lora_r=0, grad_clip=0.0)
    means = [float(sft.batch_loss(net, *sft.collate(rows[i:i + 2], tree.END, "cpu")).detach()) for i in (0, 2)]
    held = sft.evaluate(net, rows, tree.TOKENIZER, cfg, tree.WORLD)
    still = torch.optim.SGD(net.parameters(), lr=0.0)
    with bugs.inject("sft_mean_of_means"):
        found = sft.improve(net, rows, still, tree.TOKENIZER, cfg, tree.WORLD, 1)["loss"]
        assert sft.evaluate(net, rows, tree.TOKENIZER, cfg, tree.WORLD) == held
    assert found == pytest.approx(sum(means) / 2, rel=1e-5) and abs(found - held["eval/loss"]) > 1e-3

    mask, _ = data_batch.pad([[1] * n for n in (1, 2, 4, 4)], 0)
    x, old, target = (certificates.noise(4, 4, seed=s) * 0.3 for s in range(3))
    for fn in ("policy_loss", "value_loss"):
        means = [float(getattr(ppo, fn)(x[i:i + 2], old[i:i + 2], target[i:i + 2], mask[i:i + 2], 0.2)[0])
                 for i in (0, 2)]
        whole = float(getattr(ppo, fn)(x, old, target, mask, 0.2)[0])
        with bugs.inject("mean_of_means"):
            r = ppo.Rollout(mask, mask, mask, mask[:, 0] == 1, x)
            minibatch, = ppo.plan(r, torch.arange(4), tree.config(micro_batch=2))
            found = sum(float(getattr(ppo, fn)(x[rows], old[rows], target[rows], mask[rows], 0.2, 11)[0])
                        for rows in minibatch)
        assert found == pytest.approx(sum(means) / 2, rel=1e-6) and abs(found - whole) > 1e-3


def test_a_curve_comes_back_from_its_tables():
    rows = [{"step": 1, "a": 1.0, "b": 2.0, "lr": 9.0}, {"step": 2, "a": 3.0, "b": 4.0}, {"step": 2, "c": 1 / 3}]
    curve = zoo.tables(rows)
    assert curve == [{"step": [1, 2], "a": [1.0, 3.0], "b": [2.0, 4.0]}, {"step": [2], "c": [0.333333]}]
    assert zoo.points(curve, "b") == [(1, 2.0), (2, 4.0)] and zoo.points(curve, "lr") == []
    high, low, crash = [{"step": [1, 2], "exact/x": [0.0, 5.0]}], [{"step": [2], "exact/x": [1.0]}], [{"crash": ["e"]}]
    sound = [[{"step": [2], "exact/x": [y]}] for y in (1.0, 2.0)]              # widened: 0.498 .. 2.502
    for curves, said in (([high, crash], True), ([high, low], False), ([sound[1]], False)):
        assert zoo.seen({"shown": "exact/x", "curves": curves}, sound) == said
    assert zoo.shows(bugs.Sign("exact/x", "higher", "last"), [high], sound)
    assert not zoo.shows(bugs.Sign("exact/x", "higher", "first"), [high], sound)
    assert zoo.shows(bugs.Sign("crash", "higher"), [crash], sound)
    assert not zoo.shows(bugs.Sign("crash", "higher"), [crash, high], sound)


def test_a_zoo_in_which_nothing_is_caught_fails(tmp_path, monkeypatch):
    """And logs alone claim nothing of certificates, whatever an older file knew."""
    cfg = zoo.Config(only=("kl_sign",), curves=False, out_dir=str(tmp_path))
    monkeypatch.setattr(zoo.certificates, "FAST", {"losses": certificates.losses})       # it does not see this bug
    assert not zoo.main(cfg)
    monkeypatch.setattr(zoo.certificates, "FAST", {"KL": certificates.kl_estimators})
    assert zoo.main(cfg)
    cfg.certificates = False
    assert zoo.main(cfg)
    found = json.loads((tmp_path / "zoo.json").read_text(encoding="utf-8"))
    assert found["bugs"]["kl_sign"]["caught"] is None


# ---------------------------------------------------------------- the tree itself

def test_the_tree_has_121_answers_and_its_rewards_are_those_of_its_rule():
    answers = tree.answers()
    assert len(answers) == 121 == len({tuple(a) for a in answers}) and sum(a[-1] == tree.END for a in answers) == 40
    a, b, end = tree.A, tree.B, tree.END
    assert tree.true_reward([a, end], [a, b, a, end]) == 1 + 0.5 + 0.5      # "ab", begins with the prompt's last, three
    assert tree.true_reward([b, end], [a, b, a, b]) == 2                    # "ab" twice
    assert tree.true_reward([b, end], [end]) == 0
    r = tree.everything()
    one = tree.gold(r.ids, r.mask, r.response)
    assert one.tolist() == [tree.true_reward(p, y) for p in tree.PROMPTS for y in answers]


def test_the_optimum_without_a_price_of_kl_is_the_best_answer():
    exact = tree.Exact(tree.build(tree.config(kl_coef=0.0)), tree.config(kl_coef=0.0))
    small = tree.Exact(tree.build(tree.config(kl_coef=1e-4)), tree.config(kl_coef=1e-4))
    assert float(exact.optimum()) == pytest.approx(2.0)                        # "ab" and its first letter and three
    assert float(small.optimum()) == pytest.approx(float(exact.optimum()), abs=2e-3)


def test_nothing_beats_the_closed_form_optimum():
    """p* has the objective J*, and 200 other policies have less."""
    cfg = tree.config()
    exact = tree.Exact(tree.build(cfg), cfg)
    best = (exact.ref + exact.reward / cfg.kl_coef).log_softmax(1)
    assert abs(float(exact.J(best) - exact.optimum())) < 1e-5
    for seed in range(200):
        other = (best + 0.3 * certificates.noise(4, 121, seed=seed).float()).log_softmax(1)
        assert exact.J(other) < exact.optimum()
    assert float(exact.optimum() - exact.J(exact.ref)) > 0.5                  # there is something to learn


@pytest.mark.parametrize("lora_r, beta, learned", [(0, 0.3, False), (8, 0.3, False), (8, 0.1, True)])
def test_ppo_comes_near_the_known_optimum_in_seconds(lora_r, beta, learned):
    """The fast form of the known optimum: 30 updates of 128 answers, instead of 60 of 256."""
    lr = 3e-3 if lora_r else 1e-3
    cfg = tree.config(steps=30, batch_size=128, micro_batch=128, lora_r=lora_r, lr=lr, value_lr=lr, kl_coef=beta)
    roles = tree.build(cfg, learned)
    assert not learned or {roles.reward.model, roles.value.model, roles.reference} == {roles.policy}   # one base
    history = tree.train(roles, cfg, every=30)
    assert history[0]["val/largest_kl"] == 0 and history[0]["val/first_ratio_gap"] == 0
    assert history[-1]["exact/regret"] <= 0.02, history[-1]["exact/regret"]
    assert torch.isfinite(torch.tensor([x for row in history for x in row.values()])).all()


def test_the_controller_holds_a_kl_with_real_ppo():
    """Its fast form, 60 updates of 64 answers: beta 0.1 alone lets the KL rise over 4 nats, then it is brought to 2."""
    cfg = tree.config(steps=60, batch_size=64, micro_batch=64, temperature=1.0, kl_coef=0.1, kl_target=2.0,
                      kl_horizon=250)
    kls = [row["objective/kl"] for row in tree.train(tree.build(cfg), cfg, every=60)]
    assert max(kls) > 4 and statistics.mean(kls[-20:]) == pytest.approx(2, rel=0.15), kls
