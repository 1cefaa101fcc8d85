"""ppo.py: every formula against numbers worked by hand, enumeration or a loop, and the four roles against each other.

Training curves do not show most mistakes of PPO: a reward one token late, a value that knows the action, padding inside
a mean, a swapped max. So the indices are tested one by one, and the gradient of a whole update against the exact
gradient of the objective, summed over every answer that exists. The ids in brackets (P1, P18, ...) number the details
of PPO.
"""
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import common
import lora
import ppo
import reward as reward_stage
from data import batch as data_batch
from reward import RewardModel

END, PAD = 2, 0
TOKENIZER = SimpleNamespace(eos_ids=[END], pad_id=PAD, decode=lambda ids: " ".join(map(str, ids)))
FP32, BF16 = torch.float32, torch.bfloat16


def world(dtype: torch.dtype = FP32) -> common.World:
    return common.World(torch.device("cpu"), dtype)


def config(**changes) -> ppo.Config:
    return ppo.Config(**{"lora_r": 4, "lora_alpha": 8.0, "response_len": 8, "batch_size": 6, "micro_batch": 2,
                         "ppo_epochs": 1, "missing_eos": None, **changes})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- log-probabilities

def test_the_defaults_of_the_maths_are_those_of_the_command_line():
    """Here callers always say them; a reader in a notebook does not."""
    cfg = ppo.Config()
    for function, names in ((ppo.logprobs, {"temperature": cfg.temperature}),
                            (ppo.token_logprobs, {"temperature": cfg.temperature}),
                            (ppo.gae, {"gamma": cfg.gamma, "lam": cfg.lam}),
                            (ppo.policy_loss, {"clip": cfg.clip}), (ppo.value_loss, {"clip": cfg.value_clip}),
                            (ppo.policy_logprobs, {"entropy": False})):
        told = inspect.signature(function).parameters
        assert {name: told[name].default for name in names} == names, function.__name__


def test_p1_logprobs_by_hand():
    """(P1) Logits 0 and log 3: p = 1/4, 3/4. ids 0 1 0 -> log 3/4 = -0.2877, log 1/4 = -1.3863.
    At temperature 1/2 the logits double, 0 and log 9: log 9/10 = -0.1054, log 1/10 = -2.3026."""
    logits, ids = torch.tensor([[[0.0, math.log(3)]] * 3]), torch.tensor([[0, 1, 0]])
    assert ppo.logprobs(logits, ids)[0].tolist() == pytest.approx([-0.2877, -1.3863], abs=5e-5)
    assert ppo.logprobs(logits, ids, 0.5)[0].tolist() == pytest.approx([-0.1054, -2.3026], abs=5e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_p1_logprobs_are_the_gathered_log_softmax(temperature):
    """(P1) Entry t is the log-probability of token t + 1 under the logits at t: one shift, in this direction."""
    logits, ids = noise(2, 6, 97) * 3, random_ids(2, 6)
    expected = (logits / temperature).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    assert_close(ppo.logprobs(logits, ids, temperature), expected, 1e-6)


def test_p47_logprobs_are_taken_in_fp32():
    """(P47) From bf16 logits: exactly those of the same logits in fp32."""
    logits, ids = (noise(2, 6, 97) * 3).bfloat16(), random_ids(2, 6)
    assert ppo.logprobs(logits, ids).dtype == FP32
    assert torch.equal(ppo.logprobs(logits, ids), ppo.logprobs(logits.float(), ids))
    assert torch.equal(ppo.logprobs(logits, ids, 0.7), ppo.logprobs(logits.float(), ids, 0.7))


# ---------------------------------------------------------------- KL

def test_p17_kl_by_hand():
    """(P17) p = 1/2, q = 1/4: k1 = log 2 = 0.6931; k3 = q/p - 1 - log q/p = 0.5 - 1 + 0.6931 = 0.1931. Exchanged:
    k1 = -0.6931, k3 = 2 - 1 - 0.6931 = 0.3069."""
    p, q = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    assert ppo.kl(p, q).tolist() == pytest.approx([0.6931, -0.6931], abs=5e-5)
    assert ppo.kl(p, q, "k3").tolist() == pytest.approx([0.1931, 0.3069], abs=5e-5)
    with pytest.raises(ValueError, match="k1, k3"):
        ppo.kl(p, q, "k2")


def test_p17_both_estimators_average_to_the_kl():
    """(P17) Summed over all eight outcomes with the policy's probabilities both give KL(policy || reference); the other
    direction, exp(log p - log q) - 1 - (log p - log q), gives another number."""
    logp, ref = noise(8).double().log_softmax(0), noise(8, seed=1).double().log_softmax(0)
    exact = (logp.exp() * (logp - ref)).sum()
    for kind in ("k1", "k3"):
        assert_close((logp.exp() * ppo.kl(logp, ref, kind)).sum()[None], exact[None], 1e-10, kind)
    assert (ppo.kl(logp, ref, "k3") >= 0).all()
    assert abs((logp.exp() * ppo.kl(ref, logp, "k3")).sum() / exact - 1) > 0.1


def test_p17_k3_keeps_its_digits_near_zero():
    """(P17) Two distributions that differ by 1e-4: k3 = 5e-9, which exp(x) - 1 in fp32 would round away."""
    k3 = ppo.kl(torch.tensor([0.0]), torch.tensor([1e-4]), "k3")
    assert k3.item() == pytest.approx(5e-9, rel=0.1)


def test_p23_adaptive_kl_follows_the_closed_form():
    """(P23) beta 0.15, target 6, horizon 10000, 256 answers. KL 12: error 1, cut to 0.2: x 1.00512. KL 6: stays.
    KL 5.4: error -0.1: x 0.99744. KL 0: error -1, cut to -0.2: x 0.99488."""
    controller, beta = ppo.AdaptiveKL(0.15, 6.0, 10000), 0.15
    for measured, factor in ((12, 1.00512), (6, 1.0), (5.4, 0.99744), (0, 0.99488), (6.3, 1 + 0.05 * 0.0256)):
        controller.update(measured, 256)
        beta *= factor
        assert controller.coef == pytest.approx(beta, rel=1e-9), measured


def test_p23_without_a_target_beta_is_fixed():
    controller = ppo.AdaptiveKL(0.05)
    controller.update(100.0, 512)
    assert controller.coef == 0.05


# ---------------------------------------------------------------- masks and scores

@given(st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4),
       st.sampled_from([[2], [2, 4], [5, 0]]))
def test_p5_response_mask_is_the_loop(rows, ends):
    """(P5) One up to and including the first end token, whichever of several it is, and zero behind it."""
    expected = []
    for row in rows:
        stop = next((t for t, token in enumerate(row) if token in ends), len(row))
        expected.append([int(t <= stop) for t in range(len(row))])
    assert ppo.response_mask(torch.tensor(rows), ends).tolist() == expected


def test_p5_pad_may_be_the_end_token():
    """(P5, S3) [7, END, END, END] with pad == eos: the first END was chosen, the others are padding."""
    assert ppo.response_mask(torch.tensor([[7, 2, 2, 2], [2, 2, 2, 2]]), [2]).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_p7_an_answer_without_end_gets_the_fixed_score():
    """(P7) Exactly the fixed score, however good the text; None: judged as it is. The clip (P20) is for the reward
    model's words, not for the penalty."""
    scores, ended = torch.tensor([3.0, 2.0, -7.0]), torch.tensor([True, False, True])
    assert ppo.final_scores(scores, ended, -1.0).tolist() == [3, -1, -7]
    assert ppo.final_scores(scores, ended, None).tolist() == [3, 2, -7]
    assert ppo.final_scores(scores, ended, -10.0, clip=2.5).tolist() == [2.5, -10, -2.5]
    assert ppo.final_scores(scores, ended, 0.0).tolist() == [3, 0, -7], "0 is a score, not 'off'"


def test_p18_token_rewards_by_hand():
    """(P18) beta 0.1; score 2 on an answer of two tokens with KL 1 and -3, garbage behind; score -1 on one of three:
    [-0.1, 0.3 + 2, 0] and [-0.2, 0, 0.1 - 1]"""
    kls = torch.tensor([[1.0, -3.0, 99.0], [2.0, 0.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = ppo.token_rewards(torch.tensor([2.0, -1.0]), kls, mask, 0.1)
    assert_close(rewards, torch.tensor([[-0.1, 2.3, 0.0], [-0.2, 0.0, -0.9]]), 1e-6)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 1000))
def test_p18_the_score_is_earned_once_at_the_last_token(lengths, seed):
    """(P18) Per answer sum r + beta sum KL == score; a large score makes the last chosen token the argmax; nothing
    behind."""
    mask = torch.tensor([[int(t < n) for t in range(7)] for n in lengths])
    kls, scores = noise(len(lengths), 7, seed=seed), 50 + noise(len(lengths), seed=seed + 1)
    rewards = ppo.token_rewards(scores, kls, mask, 0.3)
    assert_close(rewards.sum(1) + 0.3 * (kls * mask).sum(1), scores, 1e-5)
    assert rewards.argmax(1).tolist() == [n - 1 for n in lengths]
    assert not (rewards * (1 - mask)).any()


def test_p14_rewards_are_numbers_not_paths_for_gradients():
    """(P14, P33) What score() stores, and with it KL and rewards, needs no gradient."""
    r = scored()
    for name in ("logp", "ref_logp", "values", "scores", "entropy", "sampler_logp"):
        assert not getattr(r, name).requires_grad, name


# ---------------------------------------------------------------- advantages

def test_p29_gae_by_hand():
    """(P29) The example of the docstring: rewards 0 0 1, values 0.5 0.6 0.7, gamma 1, lambda 0.9: deltas 0.1 0.1 0.3,
    advantages 0.1 + 0.9 * 0.37 = 0.433, 0.1 + 0.9 * 0.3 = 0.37, 0.3; returns are advantages + values."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 3), 1.0, 0.9)
    assert advantages[0].tolist() == pytest.approx([0.433, 0.37, 0.3], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.933, 0.97, 1.0], abs=1e-6)
    advantages, _ = ppo.gae(rewards, values, torch.ones(1, 3), 0.5, 0.0)
    assert advantages[0].tolist() == pytest.approx([0.3 - 0.5, 0.35 - 0.6, 0.3], abs=1e-6), "lambda 0: the deltas"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0.5, 1), st.floats(0, 1), st.integers(0, 1000))
def test_p29_gae_is_its_definition(lengths, gamma, lam, seed):
    """(P29) A_t = sum over l of (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V = 0 behind the
    end: two plain loops in float64. Rewards and values behind the end are garbage and must not matter."""
    B, R = len(lengths), 9
    rewards, values = noise(B, R, seed=seed).double(), noise(B, R, seed=seed + 1).double()
    mask = torch.tensor([[int(t < n) for t in range(R)] for n in lengths])
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        v = [*values[b, :n].tolist(), 0.0]
        delta = [float(rewards[b, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        assert advantages[b].tolist() == pytest.approx([*expected, *[0.0] * (R - n)], abs=1e-9)
        expected = [a + x for a, x in zip(expected, v[:n], strict=True)]
        assert returns[b].tolist() == pytest.approx([*expected, *[0.0] * (R - n)], abs=1e-9)


def test_p29_lambda_one_is_reward_to_go():
    """(P29) lambda = gamma = 1: advantage + value is the sum of the rewards still to come, whatever the values are."""
    rewards, values = noise(3, 6), noise(3, 6, seed=1)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert_close(returns, to_go, 1e-5)
    assert_close(advantages + values * mask, to_go, 1e-5)


def test_p29_padding_changes_nothing():
    """(P29) Five more columns behind the end, full of garbage: the same advantages and returns."""
    rewards, values, mask = noise(2, 4), noise(2, 4, seed=1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    short = ppo.gae(rewards, values, mask)
    more_rewards = torch.cat((rewards, noise(2, 5, seed=2)), 1)
    more_values = torch.cat((values, noise(2, 5, seed=3)), 1)
    for a, b in zip(short, ppo.gae(more_rewards, more_values, F.pad(mask, (0, 5))), strict=True):
        assert torch.equal(a, b[:, :4]) and not b[:, 4:].any()


def test_p30_returns_are_there_before_whitening():
    """(P30) gae gives the returns itself: whitening the advantages afterwards leaves them alone. (That main whitens
    after gae, and hands these very returns to the update, is tested on the whole script in test_scripts.py.)"""
    rewards, values, mask = noise(2, 4), noise(2, 4, seed=1), torch.ones(2, 4)
    advantages, returns = ppo.gae(rewards, values, mask)
    kept = returns.clone()
    white = ppo.whiten(advantages, mask)
    assert torch.equal(returns, kept) and not torch.allclose(white + values, returns)
    assert_close(advantages + values, returns, 1e-6)


def test_p31_whiten_by_hand():
    """(P31) 1 and 3 under the mask, garbage beside: mean 2, biased variance 1 -> -1 and 1 (the unbiased one would give
    +-0.7071). Without shifting the mean (P21): 1 and 3. Padding is exactly 0."""
    x, mask = torch.tensor([[1.0, 77.0, 3.0]]), torch.tensor([[1, 0, 1]])
    assert ppo.whiten(x, mask)[0].tolist() == pytest.approx([-1, 0, 1], abs=1e-5)
    assert ppo.whiten(x, mask, shift_mean=False)[0].tolist() == pytest.approx([1, 0, 3], abs=1e-5)
    assert ppo.whiten(x * 10, mask, shift_mean=False)[0].tolist() == pytest.approx([19, 0, 21], abs=1e-5)


@given(st.integers(0, 1000), st.booleans())
def test_p21_p31_whiten_over_the_mask(seed, shift):
    """(P21, P31) Over real tokens only: std 1 and mean 0, or the old mean without shifting; pads exactly 0."""
    x, mask = noise(4, 7, seed=seed).double() * 3 + 5, (noise(4, 7, seed=seed + 1) > -0.5).long()
    mask[0, :2] = 1
    white, keep = ppo.whiten(x, mask, shift_mean=shift), mask == 1
    assert white[keep].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert white[keep].mean().item() == pytest.approx(0.0 if shift else x[keep].mean().item(), abs=1e-6)
    assert not white[~keep].any()


def test_p31_whiten_a_constant_is_zero():
    assert ppo.whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)).abs().max() < 1e-3


def test_p31_whiten_over_all_ranks(monkeypatch):
    """(P31) Count, sum and squared differences are summed over ranks: with two equal ranks nothing changes; a sum that
    is left out would."""
    x, mask = noise(3, 5) + 2, torch.ones(3, 5)
    alone = ppo.whiten(x, mask)
    calls = []
    monkeypatch.setattr(common, "all_sum", lambda v: calls.append(1) or 2 * v)
    assert_close(ppo.whiten(x, mask), alone, 1e-6)
    assert len(calls) == 3


# ---------------------------------------------------------------- the two losses

@pytest.mark.parametrize("advantage, ratio, loss, slope", [
    (+1, 1.1, -1.1, -1.1), (+1, 0.9, -0.9, -0.9), (+1, 1.5, -1.2, 0.0), (+1, 0.5, -0.5, -0.5),
    (-1, 1.1, +1.1, +1.1), (-1, 0.9, +0.9, +0.9), (-1, 1.5, +1.5, +1.5), (-1, 0.5, +0.8, 0.0)])
def test_p34_policy_loss_in_all_eight_cases(advantage, ratio, loss, slope):
    """(P34) max(-A rho, -A clip(rho, 0.8, 1.2)): a good action earns nothing above 1.2, a bad one nothing below 0.8,
    and there the gradient in log p is exactly 0; everywhere else it is -A rho, also beyond the clip on the wrong
    side."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found, _ = ppo.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), torch.ones(1, 1), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6) and logp.grad.item() == pytest.approx(slope, abs=1e-6)


def test_p34_at_ratio_one_the_loss_is_minus_the_mean_advantage():
    logp, advantages, mask = noise(2, 5), noise(2, 5, seed=1), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    loss, stats = ppo.policy_loss(logp, logp.clone(), advantages, mask)
    assert_close(loss[None], -(advantages[mask == 1]).mean()[None], 1e-6)
    assert stats["ratio"] == 1 and stats["approxkl"] == 0 and stats["clipfrac"] == 0


def test_p41_policy_statistics_by_hand():
    """(P41) Log-ratios 0.1 and -0.3: ratios 1.1052 and 0.7408, their mean 0.9230, of squares 0.8851; approxkl
    (0.01 + 0.09) / 4 = 0.025; one of two is further than 0.2 from 1; with advantages of 1 and -2 the surrogate
    is (1.1052 - 1.4816) / 2 = -0.1882."""
    logp, advantages = torch.tensor([[0.1, -0.3]]), torch.tensor([[1.0, -2.0]])
    _, stats = ppo.policy_loss(logp, torch.zeros(1, 2), advantages, torch.ones(1, 2))
    expected = {"ratio": 0.9230, "ratio_sq": 0.8851, "approxkl": 0.025, "clipfrac": 0.5, "surrogate": -0.1882}
    assert {k: x.item() for k, x in stats.items()} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value, ret, loss, slope, clipped", [
    (+0.1, 1, 0.405, -0.9, False), (+0.5, 1, 0.320, 0.0, True),
    (-0.1, 1, 0.605, -1.1, False), (-0.5, 1, 1.125, -1.5, False),
    (+0.1, -1, 0.605, +1.1, False), (+0.5, -1, 1.125, +1.5, False),
    (-0.1, -1, 0.405, +0.9, False), (-0.5, -1, 0.320, 0.0, True)])
def test_p32_value_loss_in_all_quadrants(value, ret, loss, slope, clipped):
    """(P32) Old value 0, clip 0.2. Towards a return of 1: at 0.1 half of 0.9^2; at 0.5 half of (0.2 - 1)^2 and no
    gradient: it has moved enough. Away from it, at -0.5, half of 1.5^2: the way back is never cut off. Twice the same
    token and one of padding: means over two."""
    values, mask = torch.tensor([[value, value, 9.0]], requires_grad=True), torch.tensor([[1, 1, 0]])
    found, stats = ppo.value_loss(values, torch.zeros(1, 3), torch.full((1, 3), float(ret)), mask, 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad[0].tolist() == pytest.approx([slope / 2, slope / 2, 0.0], abs=1e-6)
    assert stats["clipfrac"].item() == float(clipped)
    assert stats["error"].item() == pytest.approx((value - ret) ** 2, abs=1e-6)


@pytest.mark.parametrize("which", ["policy", "value"])
def test_p36_micro_batches_sum_to_the_minibatch(which):
    """(P36) With the minibatch's number of tokens, losses, statistics and gradients of micro-batches of 1, 2 and 3 rows
    of unequal length add up to those of the whole; a mean of means would not."""
    new, old, target = noise(6, 5) * 0.3, noise(6, 5, seed=1) * 0.3, noise(6, 5, seed=2)
    mask = torch.tensor([[int(t < n) for t in range(5)] for n in (5, 1, 3, 2, 4, 1)])

    def run(size: int, n: float | None) -> tuple[float, dict, Tensor]:
        x, loss, stats = new.clone().requires_grad_(), 0.0, {}
        for i in range(0, 6, size):
            rows = slice(i, i + size)
            fn = ppo.policy_loss if which == "policy" else ppo.value_loss
            part, s = fn(x[rows], old[rows], target[rows], mask[rows], 0.2, n)
            part.backward()
            loss += part.item()
            stats = {k: stats.get(k, 0.0) + v.item() for k, v in s.items()}
        return loss, stats, x.grad

    loss, stats, gradient = run(6, None)
    for size in (1, 2, 3):
        other_loss, other_stats, other_gradient = run(size, 16)
        assert other_loss == pytest.approx(loss, rel=1e-5) and other_stats == pytest.approx(stats, rel=1e-5)
        assert_close(other_gradient, gradient, 1e-6)


@pytest.mark.parametrize("fn", [ppo.policy_loss, ppo.value_loss])
def test_p40_padding_is_in_no_loss_no_gradient_and_no_statistic(fn):
    """(P40) Other numbers behind the end, huge ones too: not a bit of loss or statistics changes, and no gradient
    arrives."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    tensors = [noise(2, 4, seed=s) * 0.3 for s in range(3)]
    loss, stats = fn(*tensors, mask)
    garbage = [torch.where(mask == 1, x, 1e4 * noise(2, 4, seed=9 + s)).requires_grad_() for s, x in enumerate(tensors)]
    other, other_stats = fn(*garbage, mask)
    other.backward()
    assert torch.equal(other, loss) and other_stats.keys() == stats.keys()
    assert all(torch.equal(stats[k], other_stats[k]) for k in stats)
    assert not garbage[0].grad[mask == 0].any() and garbage[0].grad[mask == 1].any()


def test_explained_variance_by_hand():
    """Returns 0 and 2 (garbage beside): values equal to them: 1; a constant: 0; values 2 and 0: errors -2, 2: 1 - 8/2 =
    -3."""
    returns, mask = torch.tensor([[0.0, 2.0, 50.0]]), torch.tensor([[1, 1, 0]])
    for values, expected in (([0.0, 2.0, 0.0], 1.0), ([7.0, 7.0, 3.0], 0.0), ([2.0, 0.0, 9.0], -3.0)):
        assert ppo.explained_variance(torch.tensor([values]), returns, mask) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- four roles on one base

def trained_reward(directory, dtype: torch.dtype = FP32, seed: int = 3) -> None:
    """A reward adapter with B not zero and a shift, saved as reward.py saves it."""
    model = tiny_model().to(dtype)
    torch.manual_seed(seed)
    lora.apply(model, 4, 8.0, name="reward")
    with torch.no_grad():
        for name, p in lora.parameters(model, "reward"):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        judge = RewardModel(model, "reward")
        judge.head.bias.fill_(0.37)
    reward_stage.save(judge, None, directory, base="base")


REWARD: list[str] = []                       # the directory of a trained reward model: one_base reads it as ppo.py does


@pytest.fixture(scope="module", autouse=True)
def saved_reward(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    trained_reward(directory)
    REWARD[:] = [str(directory)]


def four_roles(dtype: torch.dtype = FP32, **changes) -> ppo.Roles:
    return ppo.one_base(config(reward=REWARD[0], **changes), tiny_model().to(dtype), world(dtype))


def move_policy(roles: ppo.Roles, std: float = 0.1) -> ppo.Roles:
    """Stands for training: the policy's B gets values, so policy and reference differ."""
    with torch.no_grad():
        for i, (name, p) in enumerate(roles.trainable("policy")):
            if "lora_B" in name:
                p.copy_(noise(*p.shape, seed=i) * std)
    return roles


PROMPTS = [random_ids(1, n, seed=20 + n)[0].tolist() for n in (3, 9, 5, 1, 7, 4)]          # ragged: left padding


def sampled(roles: ppo.Roles, cfg: ppo.Config, seed: int = 0, prompts=PROMPTS) -> ppo.Rollout:
    return ppo.rollout(roles, prompts, TOKENIZER, cfg, torch.Generator().manual_seed(seed))


def scored(roles: ppo.Roles | None = None, cfg: ppo.Config | None = None, dtype: torch.dtype = FP32) -> ppo.Rollout:
    roles, cfg = roles or four_roles(dtype), cfg or config()
    return ppo.score(roles, sampled(roles, cfg), cfg, world(dtype))


def optimizer_for(roles: ppo.Roles, cfg: ppo.Config, lr: float) -> torch.optim.Optimizer:
    groups = [{"name": name, "params": roles.trainable(name), "lr": 1.0} for name in ("policy", "value")]
    optimizer = common.optimizer([p for group in groups for p in group["params"]], groups, betas=(0.9, 0.999), eps=1e-5)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def updated(roles: ppo.Roles, r: ppo.Rollout, cfg: ppo.Config, lr: float, dtype: torch.dtype = FP32) -> dict:
    """One call of `update` with Adam, on the rollout's own scores."""
    advantages, returns = advantages_of(r, r.scores, cfg)
    shuffle = torch.Generator().manual_seed(1)
    return ppo.update(roles, r, advantages, returns, optimizer_for(roles, cfg, lr), cfg, world(dtype), 0, shuffle, [])


def advantages_of(r: ppo.Rollout, scores: Tensor, cfg: ppo.Config) -> tuple[Tensor, Tensor]:
    """The middle of main: rewards, GAE, whitening."""
    kls = ppo.kl(r.logp, r.ref_logp) * r.response
    rewards = ppo.token_rewards(ppo.final_scores(scores, r.ended, cfg.missing_eos), kls, r.response, cfg.kl_coef)
    advantages, returns = ppo.gae(rewards, r.values, r.response, cfg.gamma, cfg.lam)
    return ppo.whiten(advantages, r.response), returns


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_p48_at_the_start_the_policy_is_the_reference(dtype):
    """(P48) Bit for bit: log-probabilities of every sampled token, and logits; and both are the loaded model's own."""
    r = scored(dtype=dtype)
    assert torch.equal(r.logp, r.ref_logp) and r.response.sum() > 20
    roles, ids = four_roles(dtype), random_ids(2, 7)
    untouched = tiny_model().to(dtype)(ids)
    for role in ("policy", "reference"):
        assert torch.equal(roles.head(role)(roles.hidden(role, ids, torch.ones_like(ids))), untouched), role


def test_p48_after_training_only_the_policy_has_moved():
    """(P48) The reference gives the same bits before and after, in between other roles' passes."""
    roles, ids = four_roles(), random_ids(2, 7)
    mask = torch.ones_like(ids)
    before = {role: roles.hidden(role, ids, mask) for role in ("policy", "reference")}
    move_policy(roles)
    assert torch.equal(roles.hidden("reference", ids, mask), before["reference"])
    assert not torch.equal(roles.hidden("policy", ids, mask), before["policy"])


def test_p26_value_starts_as_the_reward_model():
    """(P26) At step 0 V behind the last token is the score, bit for bit, with adapter, head and shift."""
    roles, cfg = four_roles(), config()
    r = scored(roles, cfg)
    at_end = roles.value.values(r.ids, r.mask).gather(1, reward_stage.last_real(r.mask)[:, None]).squeeze(1)
    assert_close(at_end, r.scores, 1e-6)
    assert torch.equal(roles.value(r.ids, r.mask), roles.reward(r.ids, r.mask))
    assert roles.value.head.bias.item() == pytest.approx(0.37)
    assert roles.value.head.weight.data_ptr() != roles.reward.head.weight.data_ptr(), "a copy: it will be trained"


def test_p26_an_unrelated_reward_model_gives_a_zero_head():
    """(P26) Where value and reward share nothing the value's head starts at zero (Ziegler et al.)."""
    judge = RewardModel(tiny_model())
    ppo.start_value(judge, None)
    assert not judge.head.weight.any() and not judge.head.bias.any()
    assert judge.head.weight.requires_grad and judge.head.bias.requires_grad


def parameters_with_gradient(roles: ppo.Roles) -> set[str]:
    modules = {"model": roles.policy, "reward": roles.reward.head, "value": roles.value.head}
    return {f"{prefix}.{name}" for prefix, m in modules.items() for name, p in m.named_parameters()
            if p.grad is not None and p.grad.any()}


def test_p27_each_loss_moves_its_own_role_only():
    """(P27) The policy's loss leaves base, value and reward without any gradient; the value's loss base, policy and
    reward."""
    roles, cfg = move_policy(four_roles()), config()
    r = scored(roles, cfg)
    logp, _ = ppo.policy_logprobs(roles, "policy", r.ids, r.mask, r.response, 1.0)
    ppo.policy_loss(logp, r.logp, noise(*r.logp.shape), r.response)[0].backward()
    found = parameters_with_gradient(roles)
    assert found and all(name.endswith(".policy") for name in found), sorted(found)[:5]
    roles.policy.zero_grad()
    values = ppo.response_values(roles, r.ids, r.mask, r.response)
    ppo.value_loss(values, r.values, noise(*values.shape), r.response)[0].backward()
    found = parameters_with_gradient(roles)
    assert {"value.weight", "value.bias"} < found
    assert all(name.endswith(".value") for name in found - {"value.weight", "value.bias"}), sorted(found)[:5]


def test_p27_what_is_trained_is_policy_and_value():
    """Exactly the two adapters and the value's head need a gradient; the reward, its head and the base are frozen."""
    roles = four_roles()
    wanted = {id(p) for role in ("policy", "value") for _, p in roles.trainable(role)}
    everything = [*roles.policy.parameters(), *roles.reward.head.parameters(), *roles.value.head.parameters()]
    assert {id(p) for p in everything if p.requires_grad} == wanted
    assert len(roles.trainable("policy")) == 2 * 7 * 2 and len(roles.trainable("value")) == 2 * 7 * 2 + 2


# ---------------------------------------------------------------- rollout and score

def test_p4_the_sampled_ids_are_the_scored_ids(monkeypatch):
    """(P4) The right half of r.ids is what generate returned, the left half the prompts; nothing is decoded and
    encoded."""
    roles, cfg = four_roles(), config()
    made, generate = [], roles.policy.generate
    monkeypatch.setattr(roles.policy, "generate", lambda *a, **k: made.append(generate(*a, **k)) or made[-1])
    r = scored(roles, cfg)
    assert torch.equal(r.ids[:, -r.R:], made[0]) and r.R == made[0].shape[1]
    for row, mask, prompt in zip(r.ids, r.mask, PROMPTS, strict=True):
        assert row[:9][mask[:9] == 1].tolist() == prompt
    assert torch.equal(r.mask[:, 9:], r.response) and torch.equal(r.response, ppo.response_mask(made[0], [END]))


def test_p2_p3_sampling_is_plain(monkeypatch):
    """(P2, P3) generate is asked for the configured temperature and for no top-k, top-p or greedy choice."""
    roles, asked = four_roles(), {}
    generate = roles.policy.generate

    def spy(ids, n, mask=None, temperature=1.0, **options):
        asked.update(options, temperature=temperature)
        return generate(ids, n, mask, temperature, **options)

    monkeypatch.setattr(roles.policy, "generate", spy)
    sampled(roles, config(temperature=0.7))
    assert asked["temperature"] == 0.7 and not asked.get("top_k") and asked.get("top_p") in (None, 1.0)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_p1_p9_p11_sampler_and_training_path_agree(temperature, merge):
    """(P1, P9, P11) The log-probabilities with which generate drew the tokens, from its cache, are those of the
    training path to 1e-4: same temperature, same positions under left padding, adapter merged or not, policy !=
    reference."""
    roles, cfg = move_policy(four_roles()), config(temperature=temperature, merge=merge)
    r = scored(roles, cfg)
    assert ((r.sampler_logp - r.logp).abs() * r.response).max() < 1e-4
    assert ((r.ref_logp - r.logp).abs() * r.response).max() > 0.1, "the example must tell policy and reference apart"


def test_p13_a_rollout_in_steps_of_one_shape_is_the_same_rollout():
    """(P13) --graph changes how a GPU is asked, not what is drawn, nor what the generator draws next."""
    roles = move_policy(four_roles())
    out = {}
    for graph in (False, True):
        generator = torch.Generator().manual_seed(4)
        out[graph] = [ppo.rollout(roles, PROMPTS, TOKENIZER, config(graph=graph), generator) for _ in range(2)]
    for plain, static in zip(out[False], out[True]):
        assert torch.equal(plain.ids, static.ids) and torch.equal(plain.ended, static.ended)
        assert_close(static.sampler_logp, plain.sampler_logp, 1e-5)


def test_p49_merging_for_sampling_leaves_no_trace():
    """(P49) After a rollout with the merged adapter base and adapter are bit for bit what they were."""
    roles = move_policy(four_roles())
    before = {name: p.clone() for name, p in roles.policy.named_parameters()}
    sampled(roles, config(merge=True))
    after = dict(roles.policy.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("role", ["policy", "reference"])
@torch.no_grad()
def test_p9_left_padding_does_not_change_log_probabilities(role):
    """(P9, R4) Row by row without any padding: the same numbers, from full logits and `logprobs`, for
    log-probabilities, values and scores."""
    roles, cfg = move_policy(four_roles()), config(temperature=0.8)
    r = scored(roles, cfg)
    got = {"policy": r.logp, "reference": r.ref_logp}[role]
    for i, prompt in enumerate(PROMPTS):
        n = int(r.response[i].sum())
        ids = torch.tensor([prompt + r.ids[i, 9:9 + n].tolist()])
        with lora.use(roles.policy, "policy" if role == "policy" else None):
            expected = ppo.logprobs(roles.policy(ids), ids, 0.8)[:, len(prompt) - 1:]
        assert_close(got[i:i + 1, :n], expected, 1e-4, (role, i))
        assert not got[i, n:].any()
        assert_close(r.values[i:i + 1, :n], roles.value.values(ids)[:, len(prompt) - 1:-1], 1e-4, i)
        assert not r.values[i, n:].any()
        assert_close(r.scores[i:i + 1], roles.reward(ids), 1e-4, i)


@torch.no_grad()
def test_p40_entropy_is_that_of_the_full_softmax():
    """(P40) -sum p log p over the whole vocabulary at the sampling temperature, for response tokens; 0 behind the end.
    Not minus the log-probability of the token that was drawn."""
    roles, cfg = move_policy(four_roles()), config(temperature=0.7)
    r = scored(roles, cfg)
    with lora.use(roles.policy, "policy"):
        log_p = (roles.policy(r.ids, r.mask)[:, 8:-1] / 0.7).log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1) * r.response
    assert_close(r.entropy, expected, 1e-4)
    assert not torch.allclose(r.entropy, -r.logp, atol=0.1)


def test_p13_one_generator_gives_two_different_rollouts():
    """(P13) Nothing seeds anew: the second rollout of the same prompts is another one, the same seed gives the same,
    and one prompt twice in a batch gets two answers."""
    roles, cfg, generator = four_roles(), config(), torch.Generator().manual_seed(0)
    first, second = (ppo.rollout(roles, PROMPTS, TOKENIZER, cfg, generator).ids[:, 9:] for _ in range(2))
    assert first.shape != second.shape or not torch.equal(first, second)
    assert torch.equal(sampled(roles, cfg).ids[:, 9:], first)
    twice = sampled(roles, cfg, prompts=[PROMPTS[0], PROMPTS[0]])
    assert not torch.equal(twice.ids[0], twice.ids[1])


def test_an_answer_may_be_only_its_end_token():
    """Every answer ends at once: length 1, with a log-probability, a value, a score and a reward, and an update on such
    a batch is finite. Elsewhere answers of length zero crash or divide by zero."""
    roles, cfg = four_roles(), config(missing_eos=-1.0)
    every_id = SimpleNamespace(eos_ids=range(97), pad_id=PAD)                     # whatever is drawn ends the answer
    r = ppo.score(roles, ppo.rollout(roles, PROMPTS, every_id, cfg, torch.Generator().manual_seed(0)), cfg, world())
    assert r.R == 1 and r.response.all() and r.ended.all() and (r.logp < 0).all() and r.values.all()
    advantages, returns = advantages_of(r, r.scores, cfg)
    assert_close(returns[:, 0], r.scores, 1e-5)                                   # KL is 0: policy == reference
    optimizer = optimizer_for(roles, cfg, 1e-3)
    stats = ppo.update(roles, r, advantages, returns, optimizer, cfg, world(), 0, torch.Generator(), [])
    assert all(math.isfinite(x) for x in stats.values())
    assert all(torch.isfinite(p).all() for p in roles.policy.parameters())


@torch.no_grad()
def test_p25_a_value_does_not_know_the_action_it_judges():
    """(P25) Another response token t: V(s_t) and everything before stay, the values after it change."""
    roles = four_roles()
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (11, 8)]
    ids, mask = data_batch.pad(rows, PAD, side="left")
    response = torch.ones(2, 5, dtype=torch.int64)                                  # P = 6, R = 5
    before = ppo.response_values(roles, ids, mask, response)
    for t in range(5):
        other = ids.clone()
        other[:, 6 + t] = (ids[:, 6 + t] + 1) % 97
        moved = (ppo.response_values(roles, other, mask, response) - before).abs() > 1e-6
        assert moved.tolist() == [[k > t for k in range(5)]] * 2, t


def test_fingerprint_sees_the_base_and_not_the_adapters():
    """One weight of the base, moved by one bit: another fingerprint. Adapters may do what they like; unmerging restores
    it."""
    roles = four_roles()
    before = ppo.fingerprint(roles.reference)
    move_policy(roles)
    assert ppo.fingerprint(roles.reference) == before
    with lora.merged(roles.policy, "policy"):
        assert ppo.fingerprint(roles.reference) != before
    assert ppo.fingerprint(roles.reference) == before
    with torch.no_grad():
        weight = roles.reference.layers[1].mlp.up_proj.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert ppo.fingerprint(roles.reference) != before


def test_p55_describe_writes_what_a_reader_needs():
    """(P55) Prompt and answer as text without padding and end token, score, KL summed over the answer, length,
    ended."""
    ids = torch.tensor([[0, 5, 6, 7, 2, 0], [0, 0, 8, 9, 10, 11]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    r = ppo.Rollout(ids, mask, mask[:, 3:], torch.tensor([True, False]), torch.zeros(2, 3),
                    logp=torch.tensor([[-1.0, -1, 50], [-2, -2, -2]]),
                    ref_logp=torch.tensor([[-1.5, -1.25, 0], [-2, -1, -2]]), scores=torch.tensor([0.5, -0.25]))
    fields = ("split", "prompt", "answer", "score", "kl", "tokens", "ended")
    assert [tuple(row[k] for k in fields) for row in ppo.describe(r, TOKENIZER, "train")] == [
        ("train", "5 6", "7", 0.5, 0.75, 2, True), ("train", "8", "9 10 11", -0.25, -1.0, 3, False)]


# ---------------------------------------------------------------- update

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_p12_the_first_ratio_is_exactly_one(dtype, checkpointing, temperature):
    """(P12, P50) Ragged prompts, several micro-batches, an adapter that differs from the reference, checkpointing on
    and off: not one log-ratio of the first minibatch differs from 0 by one bit. The gradient of this step is therefore
    right."""
    roles, cfg = move_policy(four_roles(dtype)), config(temperature=temperature)
    roles.policy.checkpointing = checkpointing
    r = scored(roles, cfg, dtype)
    stats = updated(roles, r, cfg, 1e-3, dtype)
    assert stats["first_gap"] == 0.0
    assert stats["first_ratio"] == pytest.approx(1, abs=1e-6)


def test_p12_an_adapter_on_the_head_is_sampled_with_and_scored():
    """(P12) The head runs apart from the rest, and under the same adapter: the sampler's log-probabilities are those of
    scoring and of training, and the reference's head stays bare."""
    cfg = config(lora_targets=("q_proj", "lm_head"))
    roles = move_policy(four_roles(lora_targets=cfg.lora_targets))
    bare = move_policy(four_roles(lora_targets=("q_proj",)))
    for a, b in zip(roles.trainable("policy"), bare.trainable("policy")):
        assert a[0] == b[0]
        b[1].data.copy_(a[1])
    r = scored(roles, cfg)
    other = ppo.score(bare, ppo.replace(r), cfg, world())
    assert float((r.logp - other.logp).abs().max()) > 0.1 and torch.equal(r.ref_logp, other.ref_logp)
    assert float(((r.sampler_logp - r.logp).abs() * r.response).max()) < 1e-4
    assert updated(roles, r, cfg, 1e-3)["first_gap"] == 0.0


def test_a_parameter_that_the_loss_does_not_reach_stops_the_first_update():
    """The value writes no words: an adapter on its head would never learn. And nothing frozen may get a gradient."""
    cfg = config()
    roles = four_roles()
    r = scored(roles, cfg)
    lora.attach(roles.value.model, "value2", {"lm_head": (2, 1.0)})
    with pytest.raises(RuntimeError, match="2 trainable parameters got no gradient: policy.lm_head"):
        updated(roles, r, cfg, 1e-3)
    roles = four_roles()
    roles.policy.lm_head.weight.grad = torch.zeros_like(roles.policy.lm_head.weight)
    with pytest.raises(RuntimeError, match="frozen parameters got one: policy.lm_head.weight"):
        updated(roles, scored(roles, cfg), cfg, 1e-3)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_one_pass_may_round_otherwise_and_is_no_other_distribution(dtype, monkeypatch):
    """Other shapes, other rounding: what one pass hands out is moved here as far as bf16 does it. The first update's
    ratio is 1 all the same; who hands out another role's states, or another temperature's, is stopped there."""
    def one_update(step: int) -> dict:
        roles, cfg = move_policy(four_roles(dtype)), config(one_pass=True)
        batch = [{"ids": ids} for ids in PROMPTS]
        return ppo.improve(roles, ppo.start(roles, cfg, world(dtype)), batch, TOKENIZER, cfg, world(dtype), step)[1]

    honest, last_bit = ppo.Roles.hidden_of_all, 2.0 ** (-9 if dtype == BF16 else -24)

    def rounded(self, ids, mask):
        return {role: h + h * (torch.randn_like(h) * last_bit) for role, h in honest(self, ids, mask).items()}

    monkeypatch.setattr(ppo.Roles, "hidden_of_all", rounded)
    found = one_update(0)
    assert found["val/first_ratio_gap"] == 0.0
    ppo.check_start(found | {"val/largest_kl": 0.0}, dtype)
    assert "val/first_ratio_gap" not in one_update(1)
    for a, b in (("policy", "value"), ("reference", "reward")):
        monkeypatch.setattr(ppo.Roles, "hidden_of_all", lambda self, ids, mask, a=a, b=b: {
            **(h := honest(self, ids, mask)), a: h[b], b: h[a]})
        with pytest.raises(common.UserError, match=f"--one_pass gives the {a} other log-probabilities"):
            one_update(0)


def test_p12_without_learning_the_ratio_stays_one():
    """(P12) Learning rate 0, three epochs of two minibatches in other orders and thus other paddings: still 1."""
    roles, cfg = move_policy(four_roles()), config(ppo_epochs=3, minibatches=2)
    stats = updated(roles, scored(roles, cfg), cfg, 0.0)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["approxkl"] < 1e-10 and stats["clipfrac"] == 0


def after_update(cfg: ppo.Config, lr: float = 1e-2, step: int = 0) -> tuple[dict, dict[str, Tensor]]:
    roles = move_policy(four_roles())
    r = scored(roles, cfg.__class__(**{**vars(cfg), "micro_batch": 6}))
    advantages, returns = advantages_of(r, r.scores, cfg)
    optimizer = torch.optim.SGD([p for role in ("policy", "value") for _, p in roles.trainable(role)], lr=lr)
    shuffle = torch.Generator().manual_seed(0)
    stats = ppo.update(roles, r, advantages, returns, optimizer, cfg, world(), step, shuffle, [])
    return stats, {f"{role}.{n}": p.detach() for role in ("policy", "value") for n, p in roles.trainable(role)}


def test_p36_the_update_does_not_depend_on_micro_batches():
    """(P36) The same step, statistics and gradient norms with micro-batches of 1, 2 and 6 answers of unequal length.
    With SGD, whose step is the gradient itself: Adam would hide a wrong factor."""
    expected, weights = after_update(config(micro_batch=6, batch_size=6, grad_clip=0))
    for size in (1, 2):
        stats, other = after_update(config(micro_batch=size, batch_size=6, grad_clip=0))
        assert {k: v for k, v in stats.items() if k != "first_gap"} == pytest.approx(
            {k: v for k, v in expected.items() if k != "first_gap"}, rel=1e-3, abs=1e-6), size
        for name in weights:
            assert_close(other[name], weights[name], 1e-5, (size, name))


def test_rows_of_similar_length_stand_together_and_lose_their_padding():
    """Lengths 9, 3, 7, 5 in micro-batches of two: (3, 5) and (7, 9); what is cut off is padding in every row of
    them."""
    mask = torch.zeros(4, 12, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(((5, 4), (1, 2), (6, 1), (2, 3))):
        mask[row, 6 - prompt:6 + answer] = 1
    ids = torch.arange(48).view(4, 12)
    r = ppo.Rollout(ids, mask, mask[:, 6:], torch.ones(4, dtype=torch.bool), torch.zeros(4, 6))
    minibatches = ppo.plan(r, torch.arange(4), config(micro_batch=2, minibatches=1))
    assert [rows.tolist() for rows in minibatches[0]] == [[1, 3], [2, 0]] and len(minibatches) == 1
    a, m, response = ppo.cut(r, minibatches[0][0])
    assert m.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]] and response.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert a.tolist() == ids[[1, 3], 4:9].tolist()
    assert all(int(mask[rows].sum()) == int(ppo.cut(r, rows)[1].sum()) for rows in minibatches[0])


def test_p35_every_answer_once_per_epoch_in_a_new_order(monkeypatch):
    """(P35) Three epochs of minibatches of two: each epoch sees all six answers, the first in the minibatches of
    `score`, the others in minibatches of their own."""
    roles, cfg = four_roles(), config(ppo_epochs=3, minibatches=3)
    r = scored(roles, cfg)
    seen, real = [], ppo.cut

    def spy(r, rows):
        seen.extend(rows.tolist())
        return real(r, rows)

    monkeypatch.setattr(ppo, "cut", spy)
    updated(roles, r, cfg, 0.0)
    epochs = [seen[:6], seen[6:12], seen[12:]]
    assert all(sorted(e) == list(range(6)) for e in epochs)
    assert [frozenset(epochs[0][i:i + 2]) for i in (0, 2, 4)] == [frozenset((i, i + 1)) for i in (0, 2, 4)]
    assert epochs[1] != epochs[0] and epochs[2] != epochs[1]
    assert {frozenset(epochs[1][i:i + 2]) for i in (0, 2, 4)} != {frozenset((i, i + 1)) for i in (0, 2, 4)}


def test_p28_during_value_warmup_the_policy_stands_still():
    """(P28) With value_warmup 1 step 0 moves the value only, step 1 both."""
    roles = move_policy(four_roles())
    before = {f"{role}.{n}": p.clone() for role in ("policy", "value") for n, p in roles.trainable(role)}
    for step, moves in ((0, False), (1, True)):
        _, after = after_update(config(value_warmup=1), step=step)
        moved = {name for name in before if not torch.equal(after[name], before[name])}
        assert any(name.startswith("value.") for name in moved)
        assert any(name.startswith("policy.") for name in moved) == moves, step


def test_update_touches_nothing_but_policy_and_value():
    """Two updates with Adam: base, reward adapter and reward head are bit for bit what they were; policy and value are
    not."""
    roles, cfg = four_roles(), config(ppo_epochs=2)
    trained = {id(p) for role in ("policy", "value") for _, p in roles.trainable(role)}
    heads = {"reward." + n: p for n, p in roles.reward.head.named_parameters()}
    everything = {**dict(roles.policy.named_parameters()), **heads}
    frozen = {name: p.detach().clone() for name, p in everything.items() if id(p) not in trained}
    moving = {f"{role}.{n}": p.detach().clone() for role in ("policy", "value") for n, p in roles.trainable(role)}
    updated(roles, scored(roles, cfg), cfg, 1e-3)
    assert all(torch.equal(p, everything[name]) for name, p in frozen.items()) and len(frozen) > 40
    now = {f"{role}.{n}": p for role in ("policy", "value") for n, p in roles.trainable(role)}
    assert not [name for name in now if torch.equal(now[name], moving[name])]


def test_a_value_that_is_not_finite_stops_the_update():
    """NaN in the advantages: an error that names step and samples, before the optimiser has moved anything."""
    roles, cfg = four_roles(), config()
    r = scored(roles, cfg)
    advantages, returns = advantages_of(r, r.scores, cfg)
    advantages[0, 0] = math.nan
    before = [p.detach().clone() for _, p in roles.trainable("policy")]
    with pytest.raises(common.NonFinite, match=r"step 7.*policy loss(.|\n)*prompts.jsonl:12"):
        ppo.update(roles, r, advantages, returns, optimizer_for(roles, cfg, 1.0), cfg, world(), 7, torch.Generator(),
                   ["prompts.jsonl:12"])
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, roles.trainable("policy"), strict=True))


# ---------------------------------------------------------------- the whole of it against the exact gradient

class Tree:
    """All 13 answers over {a, b, end} of at most 3 tokens after two ragged prompts, and a made-up score for each."""
    prompts = [[7, 8, 9], [8]]
    ACTIONS = (5, 6, END)                # a, b, end
    R = 3

    def __init__(self):
        answers = [a for n in (1, 2, 3) for a in itertools.product(self.ACTIONS, repeat=n)
                   if END not in a[:-1] and (a[-1] == END or n == 3)]
        self.answers = [(p, list(a)) for p in self.prompts for a in answers]
        ids, mask = data_batch.pad([p for p, _ in self.answers], PAD, side="left")
        new, response = data_batch.pad([a for _, a in self.answers], PAD)
        self.ids, self.mask, self.response = torch.cat((ids, new), 1), torch.cat((mask, response), 1), response
        self.scores = torch.tensor([math.sin(7 * i) for i in range(len(self.answers))])

    def restrict(self, roles: ppo.Roles) -> None:
        """Only a, b and end have a chance: the head gives all others -10000."""
        barrier = torch.full((roles.policy.config.vocab_size,), -1e4).index_fill_(0, torch.tensor(self.ACTIONS), 0.0)
        with torch.no_grad():
            roles.policy.lm_head.weight.mul_(0.5)                              # flat enough that every answer matters
        roles.policy.lm_head.register_forward_hook(lambda module, inputs, logits: logits + barrier)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_update_is_the_exact_policy_gradient(temperature):
    """(P1, P5, P14, P18, P25) J = sum over all answers of p(y) (score(y) - beta log p(y)/ref(y)), by enumeration and
    autograd. PPO's first gradient with lambda = 1, each answer weighted by p(y), is its gradient for any value
    function: a reward at the wrong token, an end token outside the mask, a value that knows its action, a KL with the
    wrong sign or kind, or a temperature left out would each leave an error of 10 to 100 %."""
    tree, cfg = Tree(), config(temperature=temperature, micro_batch=64)
    roles = move_policy(four_roles(), 0.05)
    tree.restrict(roles)
    beta = 0.3
    ended, unknown = (tree.ids[:, -tree.R:] == END).any(1), torch.zeros(tree.response.shape)
    r = ppo.Rollout(tree.ids, tree.mask, tree.response, ended, unknown)
    ppo.score(roles, r, cfg, world())
    p = (r.logp * r.response).sum(1).exp()
    assert p.sum().item() == pytest.approx(2, abs=1e-4), "all answers of both prompts are there"

    rewards = ppo.token_rewards(tree.scores, ppo.kl(r.logp, r.ref_logp) * r.response, r.response, beta)
    advantages, _ = ppo.gae(rewards, r.values, r.response, 1.0, 1.0)           # of an untrained value function
    logp, _ = ppo.policy_logprobs(roles, "policy", r.ids, r.mask, r.response, temperature)
    loss, _ = ppo.policy_loss(logp, r.logp, advantages * p[:, None], r.response, 0.2, n_tokens=1)
    weights = [w for _, w in roles.trainable("policy")]
    got = torch.cat([g.flatten() for g in torch.autograd.grad(-loss, weights)])

    logp, _ = ppo.policy_logprobs(roles, "policy", r.ids, r.mask, r.response, temperature)
    total = logp.sum(1)
    J = (total.exp() * (tree.scores - beta * (total - r.ref_logp.sum(1)))).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(J, weights)])
    assert float((got - exact).norm() / exact.norm()) < 1e-4, (got.norm(), exact.norm())


# ---------------------------------------------------------------- it learns

def test_it_learns_to_write_a_token():
    """Reward: how often the answer contains token 50. Thirty updates of 64 answers from a random model, the KL nearly
    free: the count rises from about nothing to nearly all six, through rollout, score, GAE, whitening and update."""
    cfg = config(batch_size=64, micro_batch=32, response_len=6, ppo_epochs=4, kl_coef=0.01, lora_r=8, lora_alpha=16.0)
    roles = four_roles(lora_r=8, lora_alpha=16.0)
    optimizer, generator = optimizer_for(roles, cfg, 1e-2), torch.Generator().manual_seed(0)
    shuffle, prompts, history = torch.Generator().manual_seed(1), (PROMPTS * 11)[:64], []
    for step in range(30):
        r = ppo.score(roles, ppo.rollout(roles, prompts, TOKENIZER, cfg, generator), cfg, world())
        scores = ((r.ids[:, -r.R:] == 50) * r.response).sum(1).float()
        history.append(scores.mean().item())
        ppo.update(roles, r, *advantages_of(r, scores, cfg), optimizer, cfg, world(), step, shuffle, [])
    first, last = sum(history[:3]) / 3, sum(history[-3:]) / 3
    assert first < 0.5 and last > 4.5, [round(x, 2) for x in history]
