"""The certificates in their fast form (course/certificates.py, course/proof.py), and the bug zoo against them."""
import statistics
import warnings

import pytest
import torch

import ppo
from course import bugs, certificates, tree


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
        assert 40 < len(item.en) < 300 and item.en.count(". ") >= 1, item.name
        assert any("\u4e00" <= letter <= "\u9fff" for letter in item.zh) and item.zh.count("。") >= 2, item.name


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
