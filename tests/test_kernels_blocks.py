"""Attention in blocks of queries against softmax(scale q k^T + bias) v written out, in float64, with its gradients."""
import math

import pytest
import torch

from kernels import blocks


def written_out(q, k, v, bias, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (scale * q @ k.transpose(2, 3) + bias).softmax(-1) @ v


def tensors(B, H, K, T, S, D=8, dtype=torch.float64):
    torch.manual_seed(0)
    # As attention has them: (B, T, H, D) in memory, seen as (B, H, T, D).
    return [torch.randn(B, n, h, D, dtype=dtype).transpose(1, 2).requires_grad_() for n, h in ((T, H), (S, K), (S, K))]


def causal(B, T, S, heads=1):
    see = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    return torch.zeros(B, heads, T, S, dtype=torch.float64).masked_fill(~see, -math.inf)


@pytest.mark.parametrize("heads, kv", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("T, S", [(5, 5), (40, 40), (33, 45), (16, 16), (17, 17)])
@pytest.mark.parametrize("kind", ["none", "causal", "per head", "ahead", "padded", "window", "packed"])
def test_values_and_gradients(heads, kv, T, S, kind, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(blocks, "LANES", 4)
    q, k, v = tensors(2, heads, kv, T, S)
    bias = causal(2, T, S)
    if kind == "per head":
        bias = causal(2, T, S, heads) - torch.rand(2, heads, T, S, dtype=torch.float64)
    elif kind == "ahead":                              # a prefix that sees all of itself
        bias[:, :, :, :S // 2] = 0
    elif kind == "padded":                             # in row 1 nobody but they themselves sees the first three keys
        bias[1, :, :, :3] = bias[1, :, :, :3].masked_fill(~torch.eye(S, dtype=torch.bool)[S - T:, :3], -math.inf)
    elif kind in ("window", "packed"):                 # the last 4 keys; texts of 11 tokens, in the other row of 20
        index, ask = torch.arange(S), torch.arange(S - T, S)[:, None]
        for row, n in enumerate((11, 20)):
            see = index > ask - 4 if kind == "window" else index // n == ask // n
            bias[row] = bias[row].masked_fill(~see, -math.inf)
    expected = written_out(q, k, v, bias, 0.3)
    got = blocks.attend(q, k, v, None if kind == "none" else bias, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), weights),
                            torch.autograd.grad(expected, (q, k, v), weights)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_what_nobody_asks_for_is_not_computed():
    keys = [(0, 138), (0, 266), (0, 310)]
    assert [(k.start, k.stop) for _, k in blocks.spans(None, 300, 310)] == keys
    bias = causal(2, 300, 310)
    assert [(k.start, k.stop) for _, k in blocks.spans(bias, 300, 310)] == keys
    assert [(r.start, r.stop) for r, _ in blocks.spans(bias, 300, 310)] == [(0, 128), (128, 256), (256, 300)]
    bias[0, :, :, 30:60], bias[:, :, 128:, :70] = 0, -math.inf                 # later nobody looks back
    assert [(k.start, k.stop) for _, k in blocks.spans(bias, 300, 310)] == [(0, 138), (64, 266), (64, 310)]


def test_in_bf16_it_is_nearly_as_near_as_the_library():
    """Against float64, beside scaled_dot_product_attention on the same bf16 numbers, values and gradients: at most
    twice as far away, because the scores are rounded once more, when a product hands them over."""
    exact = tensors(2, 4, 2, 300, 300, 16)
    weights = torch.randn(2, 4, 300, 16, dtype=torch.float64)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    expected = written_out(*exact, causal(2, 300, 300), 0.25)
    expected = [expected, *torch.autograd.grad(expected, exact, weights.bfloat16().double())]

    def errors(out):
        grads = torch.autograd.grad(out, rounded, weights.bfloat16())
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip((out, *grads), expected)]

    q, k, v = rounded
    ours = errors(blocks.attend(q, k, v, None, 0.25))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    library = errors(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25))
    assert all(a < 2 * b and a < 0.006 for a, b in zip(ours, library)), (ours, library)


def test_memory_is_linear_in_the_length():
    kept = []
    for T in (256, 512):
        saved = []
        q, k, v = tensors(1, 4, 2, T, T, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            blocks.attend(q, k, v, None, 0.3)
        kept.append(sum(t.untyped_storage().nbytes() for t in saved))
    assert kept[1] == 2 * kept[0] > 0
