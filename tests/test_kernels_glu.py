"""Gated activations: the kernels against the definition, each activation and each gradient; what is kept."""
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, TOLERANCE, check, kernels_only, leaf, names, random  # noqa: F401
from torch.autograd import gradcheck

from kernels import glu as G


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(G, "BLOCK", 64)


@pytest.mark.parametrize("kind", G.KINDS)
@pytest.mark.parametrize("dtype", **names)
def test_values_and_gradients(dtype, kind):
    gate, up = leaf(random(2, 3, 150, dtype=dtype, scale=2.0)), leaf(random(2, 3, 150, dtype=dtype, seed=1))
    dh = random(2, 3, 150, dtype=dtype, seed=2)
    h = G.glu(gate, up, kind)
    h.backward(dh)
    g64, u64 = leaf(gate.double()), leaf(up.double())
    expected = G.ref_glu(g64, u64, kind)
    expected.backward(dh.double())
    for name, a, e in (("h", h, expected), ("dgate", gate.grad, g64.grad), ("dup", up.grad, u64.grad)):
        check(a, e, TOLERANCE[dtype], name)
        assert a.dtype == dtype


@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_halves_of_one_product_and_dense_tensors(kind):
    """Strided halves go row by row, dense tensors of whole blocks as one long row: the same numbers."""
    both = random(64, 256)
    gate, up = both[:, :128], both[:, 128:]
    dense = gate.contiguous(), up.contiguous()
    assert G.grid(*dense)[1] == 64 * 64 and G.grid(gate, up)[1] == 128
    expected = G.ref_glu(gate.double(), up.double(), kind)
    for pair in ((gate, up), dense):
        a, b = (leaf(x) for x in pair)
        h = G.glu(a, b, kind)
        check(h, expected, 1e-5)
        h.backward(dense[0])
        a64, b64 = (leaf(x.double()) for x in pair)
        G.ref_glu(a64, b64, kind).backward(dense[0].double())
        check(a.grad, a64.grad, 1e-5)
        check(b.grad, b64.grad, 1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_with_the_projection_behind_it(frozen):
    gate, up, w = leaf(random(2, 5, 70)), leaf(random(2, 5, 70, seed=1)), random(24, 70, seed=2)
    w = w if frozen else leaf(w)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = G.glu_linear(gate, up, w, "silu")
    assert kept == [(2, 5, 70), (2, 5, 70), (24, 70)]                  # gate, up and the weight: no h
    dy = random(2, 5, 24, seed=3)
    y.backward(dy)
    g64, u64, w64 = (leaf(x.double()) for x in (gate, up, w))
    expected = F.linear(G.ref_glu(g64, u64), w64)
    expected.backward(dy.double())
    pairs = [(y, expected), (gate.grad, g64.grad), (up.grad, u64.grad)]
    pairs += [] if frozen else [(w.grad, w64.grad)]
    for a, e in pairs:
        check(a, e, 1e-5)


def test_definition_by_finite_differences_and_empty_rows(monkeypatch):
    assert G.glu(torch.empty(0, 8, device=DEVICE), torch.empty(0, 8, device=DEVICE)).shape == (0, 8)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for kind in ("silu", "gelu", "gelu_tanh"):
        assert gradcheck(lambda g, u, kind=kind: G.ref_glu(g, u, kind), (gate, up))
        check(G.glu(gate, up, kind), G.ref_glu(gate, up, kind), 1e-12)
    check(G.glu_linear(gate, up, w), F.linear(G.ref_glu(gate, up), w), 1e-12)
