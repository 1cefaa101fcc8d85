"""Attention: the bounds of every mask against the mask drawn by hand, then the kernels against the definition."""
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, TOLERANCE, check, kernels_only, leaf, random  # noqa: F401
from torch.autograd import gradcheck

from kernels import attention as A
from model import ModelConfig, alibi_slopes, attend, attention_bias, count_positions


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    tile(monkeypatch)


def tile(monkeypatch, split=True):
    """Tiles of 16 x 32 and 32 x 16: 53 rows are several of them, with full ones between partial ones."""
    def launch(table, x):
        rows, columns = (16, 32) if table is A.FORWARD else (32, 16)
        D = x.shape[-1]
        return {"D": D, "BD": A.power_of_two(max(16, D)), "BM": rows, "BN": columns, "num_stages": 1, "num_warps": 4,
                **({"SPLIT": split} if table is A.DKV else {})}
    monkeypatch.setattr(A, "launch", launch)


DOCS = torch.tensor([[1] * 20 + [2] + [3] * 31 + [0],                 # a document of one token, a pad on the right
                     [0] * 3 + [1] * 40 + [3] * 10])                  # left padding, an empty document 2


def visible(S, T, docs=None, prefix=None, window=None, causal=True):
    """The mask, pair by pair, from the sentences that describe it. (B, T, S)"""
    B, docs = 1 if docs is None else len(docs), None if docs is None else docs.tolist()
    see = torch.zeros(B, S, S, dtype=torch.bool)
    for b in range(B):
        for t in range(S):
            for s in range(S):
                same = docs is None or (docs[b][t] == docs[b][s] and docs[b][t] > 0) or s == t
                number = s if docs is None or docs[b][s] == 0 else s - docs[b].index(docs[b][s])    # in its document
                p = 0 if prefix is None else int(torch.as_tensor(prefix).expand(B)[b])
                ahead = not causal or s <= t or number < p
                see[b, t, s] = same and ahead and (window is None or t - s < window)
    return see[:, S - T:]


MASKS = {"causal": {}, "documents": {"docs": DOCS}, "prefix": {"prefix": torch.tensor([5, 53])}, "no prefix":
         {"prefix": 0}, "window": {"window": 7}, "documents, prefix, window": {"docs": DOCS, "prefix": 9, "window": 12},
         "encoder": {"docs": DOCS, "causal": False}, "all": {"causal": False}}


@pytest.mark.parametrize("T", [53, 4])
@pytest.mark.parametrize("name", MASKS)
def test_spans_are_the_mask(name, T):
    options = dict(MASKS[name])
    if torch.is_tensor(options.get("prefix")):
        expected = torch.cat([visible(53, T, **{**options, "prefix": int(p)}) for p in options["prefix"]])
    else:
        expected = visible(53, T, **options)
    spans = A.spans(53, T, **options)
    keys = torch.arange(53)
    got = (keys >= spans.lo[..., None]) & (keys < spans.hi[..., None])
    assert torch.equal(got, expected)
    rows = torch.arange(T)[:, None]                                    # and seen from the keys it is the same mask
    assert torch.equal((rows >= spans.first[:, None]) & (rows < spans.last[:, None]), expected)
    assert spans.plain == (name == "causal" and T == 53)


def test_the_definition_is_the_attention_of_the_model():
    docs = DOCS[:, :48]
    for positions in ("none", "alibi"):
        config = ModelConfig(num_heads=6, num_kv_heads=2, hidden_size=48, positions=positions)
        q, k, v = random(2, 6, 48, 8).cpu(), random(2, 2, 48, 8, seed=1).cpu(), random(2, 2, 48, 8, seed=2).cpu()
        expected = attend(q, k, v, attention_bias(config, docs, 48, count_positions(docs), q.dtype))
        slopes = alibi_slopes(6) if positions == "alibi" else None
        check(A.ref_attention(q, k, v, A.spans(48, docs=docs), slopes), expected, 1e-6, positions)


def run(function, q, k, v, do, *options):
    q, k, v = leaf(q), leaf(k), leaf(v)
    out = function(q, k, v, *options)
    out.backward(do.to(out.dtype))
    return out, q.grad, k.grad, v.grad


def compare(dtype, B, H, K, T, S, D, spans, slopes=None, softcap=0.0, scale=None):
    q = random(B, T, H, D, dtype=dtype).transpose(1, 2)               # as a projection leaves it: strided heads
    k, v = random(B, K, S, D, dtype=dtype, seed=1), random(B, S, K, D, dtype=dtype, seed=2).transpose(1, 2)
    do = random(B, H, T, D, dtype=dtype, seed=3)
    spans = A.Spans(*(x.to(DEVICE) for x in spans[:4]), *spans[4:])
    got = run(A.attention, q, k, v, do, spans, slopes, softcap, scale)
    expected = run(A.ref_attention, *(x.double() for x in (q, k, v, do)), spans, slopes, softcap, scale)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected):
        check(a, b, TOLERANCE[dtype], name)
        assert a.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_kernels_are_the_definition_for_every_mask(name, dtype):
    options = MASKS[name]
    if name == "causal" and dtype != torch.float32:
        pytest.skip("covered by documents")
    compare(dtype, 2, 2, 1, 53, 53, 16, A.spans(53, **options))


@pytest.mark.parametrize("H, K", [(2, 2), (3, 1), (8, 2)], ids=["groups of 1", "groups of 3", "groups of 4"])
def test_shared_key_heads(H, K):
    compare(torch.float32, 1, H, K, 37, 37, 16, A.spans(37, docs=DOCS[:1, :37]))


def test_the_keys_kernel_with_one_loop_for_all_tiles(monkeypatch):
    tile(monkeypatch, split=False)
    compare(torch.float32, 2, 4, 2, 53, 53, 16, A.spans(53, docs=DOCS, prefix=9), alibi_slopes(4).to(DEVICE))


@pytest.mark.parametrize("window", [None, 20])
def test_slopes_where_nobody_looks_ahead(window):
    """Then the penalty is a term of the key alone: in full tiles, across documents, with fewer queries than keys."""
    compare(torch.float32, 2, 4, 2, 53, 53, 16, A.spans(53, docs=DOCS, window=window), alibi_slopes(4).to(DEVICE))
    compare(torch.float16, 1, 4, 2, 21, 53, 16, A.spans(53, 21, window=window), alibi_slopes(4).to(DEVICE))


@pytest.mark.parametrize("D", [20, 32, 80])
def test_head_dims_that_are_no_power_of_two(D):
    compare(torch.float32, 1, 2, 1, 33, 33, D, A.spans(33, prefix=7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["slopes", "cap", "both"])
def test_slopes_and_caps_in_any_combination(case, dtype):
    """ALiBi for 5 heads (no power of two), with prefix, documents and a window at once; a cap that bites."""
    slopes = alibi_slopes(5).to(DEVICE) if case != "cap" else None
    compare(dtype, 2, 5, 5, 53, 53, 16, A.spans(53, docs=DOCS, prefix=9, window=30), slopes,
            softcap=1.5 if case != "slopes" else 0.0, scale=0.5)


@pytest.mark.parametrize("T, S", [(2, 2), (1, 40), (5, 37), (16, 48), (17, 17)])
def test_fewer_queries_than_keys(T, S):
    slopes = torch.tensor([0.3, 0.1], device=DEVICE)
    compare(torch.float32, 1, 2, 2, T, S, 16, A.spans(S, T), slopes)


def test_a_query_that_sees_nothing_gives_zero_and_takes_no_gradient():
    spans = A.spans(21)
    lo = spans.lo.clone()
    lo[:, 5:9] = spans.hi[:, 5:9]                                      # queries 5 to 8 see no key
    lo = lo.cummax(1).values
    keys = torch.arange(21)[None]
    spans = spans._replace(lo=lo, last=torch.searchsorted(lo.long(), keys, right=True).int(), plain=False)
    compare(torch.float32, 1, 1, 1, 21, 21, 16, spans)


def test_the_same_bits_twice():
    q, k, v, do = (random(1, 4, 40, 16, seed=i) for i in range(4))
    spans = A.spans(40, prefix=3, device=DEVICE)
    for a, b in zip(run(A.attention, q, k, v, do, spans), run(A.attention, q, k, v, do, spans)):
        assert torch.equal(a, b)


def test_gradients_of_the_definition_by_finite_differences(monkeypatch):
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 3, generator=g, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    spans = A.spans(6, docs=torch.tensor([[0, 1, 1, 1, 2, 2]]), prefix=2)
    assert gradcheck(lambda *x: A.attention(*x, spans, torch.tensor([0.5, 0.2, 0.1, 0.3]), 2.0), (q, k, v))
