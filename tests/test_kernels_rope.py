"""RoPE: the kernel against the definition, the definition against the model's rotate."""
import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, check, kernels_only, leaf, names, random  # noqa: F401
from torch.autograd import gradcheck

from kernels import rope as R
from model import ModelConfig, rope_tables, rotate


def tables(T, dim, dtype=torch.float32, rows=1):
    config = ModelConfig(hidden_size=dim, num_heads=1, num_kv_heads=1, max_positions=64)
    positions = torch.arange(T)[None] + 3 * torch.arange(rows)[:, None]
    return [t.to(DEVICE) for t in rope_tables(config, positions, dtype)]


@pytest.mark.parametrize("H, K, D, R_dim", [(4, 2, 16, 16), (3, 1, 20, 8), (5, 5, 12, 12), (1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", **names)
def test_kernel_is_the_definition_with_its_gradients(dtype, H, K, D, R_dim):
    """Whole and partial rotation, head counts that are no power of two, q as a projection leaves it and k dense."""
    q, k = leaf(random(2, 7, H, D, dtype=dtype).transpose(1, 2)), leaf(random(2, K, 7, D, dtype=dtype, seed=1))
    cos, sin = tables(7, R_dim, dtype, rows=2)
    dq, dk = random(2, H, 7, D, dtype=dtype, seed=2), random(2, 7, K, D, dtype=dtype, seed=3).transpose(1, 2)
    got = R.rope(q, k, cos, sin)
    torch.autograd.backward(got, (dq, dk))
    for name, x, y, g in (("q", q, got[0], dq), ("k", k, got[1], dk)):
        x64 = leaf(x.double())
        expected = R.ref_rope(x64, cos.double(), sin.double())
        expected.backward(g.double())
        check(y, expected, TOLERANCE[dtype], name)
        check(x.grad, x64.grad, TOLERANCE[dtype], "d" + name)
        assert y.dtype == x.grad.dtype == dtype


def test_one_table_for_all_rows_and_in_place():
    q, k = random(3, 7, 4, 16).transpose(1, 2), random(3, 2, 7, 16, seed=1)
    cos, sin = tables(7, 8)
    expected = R.ref_rope(q, cos, sin), R.ref_rope(k, cos, sin)
    for y, e in zip(R.rope(q, k, cos, sin), expected):
        check(y, e, 1e-6)
    out = R.rope_(q, k, cos, sin)
    assert out[0] is q and out[1] is k
    check(q, expected[0], 1e-6)
    check(k, expected[1], 1e-6)


def test_the_definition_is_the_rotation_of_the_model(monkeypatch):
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    q, k = torch.randn(2, 4, 7, 12, dtype=torch.float64), torch.randn(2, 2, 7, 12, dtype=torch.float64)
    for dim in (12, 8):
        cos, sin = (t.cpu() for t in tables(7, dim, torch.float64, rows=2))
        for x in (q, k):
            check(R.ref_rope(x, cos, sin), rotate(x, cos, sin), 1e-12)
        expected = rotate(q, cos, sin), rotate(k, cos, sin)
        for y, e in zip(R.rope_(q.clone(), k.clone(), cos, sin), expected):
            check(y, e, 1e-12)
    assert gradcheck(lambda q, k: R.rope(q, k, cos, sin), (leaf(q), leaf(k)))
