"""The scan against PPO's loop over tokens."""
import pytest
import torch
from kernel_cases import DEVICE, check, kernels_only, random  # noqa: F401

import ppo
from kernels import gae as G


def data(B, R):
    lengths = torch.tensor([R, 1, max(1, R // 2), max(1, R - 1), 3][:B]).clamp(max=R)
    mask = (torch.arange(R) < lengths[:, None]).long().to(DEVICE)
    return random(B, R), random(B, R, seed=1), mask


@pytest.mark.parametrize("R, block", [(1, 2048), (7, 2048), (64, 2048), (64, 16), (65, 16), (37, 8)])
def test_the_scan_is_the_loop(R, block, monkeypatch):
    monkeypatch.setattr(G, "BLOCK", block)
    rewards, values, mask = data(5, R)
    got = G.gae(rewards, values, mask, 0.97, 0.9)
    expected = G.ref_gae(rewards.double(), values.double(), mask, 0.97, 0.9)
    for name, a, b in zip(("advantages", "returns"), got, expected):
        check(a, b, 1e-6, name)


def test_the_example_of_the_docstring():
    rewards, values, mask = (torch.tensor([row], device=DEVICE) for row in ([0.0, 0, 1], [0.5, 0.6, 0.7], [1, 1, 1]))
    advantages, returns = G.gae(rewards, values, mask, 1.0, 0.9)
    check(advantages, torch.tensor([[0.433, 0.37, 0.3]], device=DEVICE), 1e-6)
    check(returns, torch.tensor([[0.933, 0.97, 1.0]], device=DEVICE), 1e-6)


def test_ppo_takes_the_scan_where_kernels_run(monkeypatch):
    """credit, from a scored rollout: the same numbers from the loop and from the scan, and each does run."""
    rewards, values, mask = data(5, 24)
    scores = random(5, seed=3)
    r = ppo.Rollout(None, None, mask, mask.sum(1) < 24, None, logp=rewards, ref_logp=random(5, 24, seed=4),
                    values=values * mask, scores=scores)
    cfg, ran, out = ppo.Config(gamma=0.97, lam=0.9), [], {}
    for name, where in (("loop", ppo), ("scan", G)):
        real = where.gae
        monkeypatch.setattr(where, "gae", lambda *a, name=name, real=real: (ran.append(name), real(*a))[1])
    for kind in ("torch", "triton"):
        monkeypatch.setenv("CHATPIXIU_KERNELS", kind)
        out[kind] = ppo.credit(r, cfg, 0.05)
    assert ran == ["loop", "scan"]
    for name, a, b in zip(("scores", "KL", "advantages", "returns"), out["triton"], out["torch"]):
        check(a, b, 1e-5, name)


def test_padding_is_zero_and_its_garbage_is_not_read():
    rewards, values, mask = data(5, 20)
    clean = G.gae(rewards, values, mask)
    dirty = G.gae(torch.where(mask == 1, rewards, 7.0), torch.where(mask == 1, values, -9.0), mask)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b) and not bool(a[mask == 0].any())
