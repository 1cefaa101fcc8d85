"""Sampling by thresholds: the same tokens as the sort gives, and the distribution that top-k and top-p leave."""
import math

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, check, kernels_only, random  # noqa: F401

from kernels import sample as S
from sampling import sample as with_sort

CASES = [(None, None), (1, None), (5, None), (0, 1.0), (None, 0.5), (None, 0.0), (20, 0.9), (1000, 0.95)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(S, "BLOCK", 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k, top_p", CASES)
def test_the_same_tokens_as_the_sort(top_k, top_p, dtype, monkeypatch):
    order = torch.stack([torch.randperm(301, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    logits = ((order - 150) / 16).to(DEVICE, dtype)                    # no two are equal, and none is rounded
    noise = torch.rand(4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids, logp = S.sample(logits, noise, 0.7, top_k, top_p)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")                   # sampling.py's own way
    for reference in (with_sort, S.ref_sample):
        z = logits.double() if reference is S.ref_sample else logits.float()
        expected, expected_logp = reference(z, noise, 0.7, top_k, top_p)
        assert torch.equal(ids, expected), reference
        assert float((logp - expected_logp).abs().max()) < 1e-4


@pytest.mark.parametrize("top_k, top_p", [(None, None), (4, None), (None, 0.6), (4, 0.6)])
def test_a_sweep_of_noise_gives_the_probabilities(top_k, top_p):
    """24 equal steps of noise on one row: each token is drawn about 24 p times, the dropped ones never."""
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 2.5, -math.inf, 0.5], device=DEVICE)
    steps = (torch.arange(24, device=DEVICE) + 0.5) / 24
    ids, logp = S.sample(row.expand(24, 7), steps, 1.0, top_k, top_p)
    w = torch.softmax(row.double(), 0)
    keep = torch.tensor([sum(float(u) > float(p) for u in w) < (top_k or 99) for p in w], device=DEVICE)
    w = w * keep
    if top_p:
        w = w * torch.tensor([sum(float(u) for u in w if u > p) < top_p * float(w.sum()) for p in w], device=DEVICE)
    w = w / w.sum()
    counts = torch.bincount(ids, minlength=7).double()
    assert float((counts / 24 - w).abs().max()) <= 1 / 24
    assert not bool(counts[w == 0].any())
    check(logp, w[ids].log(), 1e-5)


def test_ties_at_the_threshold_all_stay():
    logits = torch.tensor([[0.2, 0.4, 0.2, 0.2, 0.0, -0.0]], device=DEVICE).expand(12, 6)
    noise = (torch.arange(12, device=DEVICE) + 0.5) / 12
    assert set(S.sample(logits, noise, 1.0, 2)[0].tolist()) == {0, 1, 2, 3}
    assert set(S.sample(logits, noise, 1.0, 5)[0].tolist()) == {0, 1, 2, 3, 4, 5}        # 0.0 and -0.0 are equal


def test_the_ends_of_the_noise():
    logits = torch.full((2, 100), -math.inf, device=DEVICE)
    logits[:, 17], logits[:, 60] = 0.0, 1.0
    noise = torch.tensor([0.0, 1 - 2 ** -24], device=DEVICE)
    assert S.sample(logits, noise)[0].tolist() == [17, 60]


def test_a_row_that_is_not_finite_says_so():
    logits = random(2, 70)
    logits[1, 3] = float("nan")
    logp = S.sample(logits, torch.full((2,), 0.5, device=DEVICE), 1.0, 5, 0.9)[1]
    assert bool(logp[0].isfinite()) and bool(logp[1].isnan())
