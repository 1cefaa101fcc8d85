"""Decoding: the split kernel against the definition, and the definition against attention's last row."""
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, TOLERANCE, check, kernels_only, random  # noqa: F401

from kernels import attention as A
from kernels import decode as D


def bounds(*pairs):
    return (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in zip(*pairs))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(D, "BLOCK", 16)


@pytest.mark.parametrize("H, K", [(2, 2), (3, 1), (8, 2)], ids=["groups of 1", "groups of 3", "groups of 4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_rows_with_everything_on(dtype, H, K):
    """Left padding, a row of one key, a row whose parts are partly empty, a cache that is longer than any row and full
    of NaN outside of what the rows see; ALiBi and a cap."""
    S, dim = 90, 24
    lo, hi = bounds((0, 77), (30, 31), (13, 90), (5, 40))
    q = random(4, H, dim, dtype=dtype)
    k, v = random(4, S, K, dim, dtype=dtype, seed=1).transpose(1, 2), random(4, K, S, dim, dtype=dtype, seed=2)
    for b in range(4):
        for x in (k, v):
            x[b, :, :lo[b]], x[b, :, hi[b]:] = float("nan"), float("nan")
    slopes = torch.rand(H, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = D.decode(q, k, v, lo, hi, slopes, softcap=3.0, scale=0.3)
    expected = D.ref_decode(q.double(), k.double(), v.double(), lo, hi, slopes, 3.0, 0.3)
    check(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("n", [1, 2, 8])
def test_any_number_of_parts_is_one_softmax(n, monkeypatch):
    monkeypatch.setattr(D, "parts", lambda *a: n)
    lo, hi = bounds((0, 50), (20, 50))
    q, k, v = random(2, 4, 32), random(2, 2, 50, 32, seed=1), random(2, 2, 50, 32, seed=2)
    check(D.decode(q, k, v, lo, hi), D.ref_decode(q.double(), k.double(), v.double(), lo, hi), 1e-5)


def test_a_row_that_sees_nothing_gives_zero():
    lo, hi = bounds((0, 9), (4, 4))
    q, k, v = random(2, 2, 16), random(2, 2, 9, 16, seed=1), random(2, 2, 9, 16, seed=2)
    out = D.decode(q, k, v, lo, hi)
    assert torch.isfinite(out).all() and out[1].abs().max() == 0 and out[0].abs().max() > 0


def test_the_definition_is_the_last_row_of_attention():
    q, k, v = random(2, 4, 1, 16), random(2, 2, 30, 16, seed=1), random(2, 2, 30, 16, seed=2)
    docs = torch.ones(2, 30, dtype=torch.int64)
    docs[1, :11] = 0
    spans = A.spans(30, 1, docs=docs)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05], device=DEVICE)
    lo, hi = spans.lo[:, 0].to(DEVICE), spans.hi[:, 0].to(DEVICE)
    spans = A.Spans(*(x.to(DEVICE) for x in spans[:4]), *spans[4:])
    expected = A.ref_attention(q, k, v, spans, slopes, 2.0)[:, :, 0]
    check(D.ref_decode(q[:, :, 0], k, v, lo, hi, slopes, 2.0), expected, 1e-6)


def test_parts_fill_the_card_and_never_more():
    q = torch.empty(1, 8, 64)
    assert D.parts(q, 1, 32) == 1 and D.parts(q, 1, 4096) == 4           # one block; four programs "fill" a CPU
    assert D.parts(torch.empty(64, 8, 64), 8, 4096) == 1
