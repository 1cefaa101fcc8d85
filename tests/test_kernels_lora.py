"""The LoRA linear: its gradients against float64 autograd, dropout with the very mask it drew, rows that differ."""
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, TOLERANCE, check, leaf, names, poison, random  # noqa: F401
from torch.autograd import gradcheck

from kernels import lora as L


def setup(dtype, wide=torch.float32):
    x, w, b = random(4, 5, 24, dtype=dtype), random(40, 24, dtype=dtype, seed=1, scale=0.2), \
        random(40, dtype=dtype, seed=2)
    matrices = [random(*shape, dtype=wide, seed=3 + i, scale=0.3) for i, shape in enumerate(
        [(4, 24), (40, 4), (3, 24), (40, 3)])]
    return x, w, b, matrices, random(4, 5, 40, dtype=dtype, seed=9)


def adapters(m, rows=(slice(0, 2), slice(3, 4))):
    return [L.Adapter(m[0], m[1], 2.0, rows[0]), L.Adapter(m[2], m[3], 0.5, rows[1])]


@pytest.mark.parametrize("dtype", **names)
def test_rows_of_one_batch_under_different_adapters(dtype):
    """Rows 0 and 1 wear one adapter, row 2 none, row 3 another."""
    x, w, b, m, dy = setup(dtype)
    inputs = [leaf(t) for t in (x, b, *m)]
    with poison():
        y = L.lora_linear(inputs[0], w, inputs[1], adapters(inputs[2:]))
        got = torch.autograd.grad(y, inputs, dy)
    exact = [leaf(t.double()) for t in (x, b, *m)]
    y64 = L.ref_lora_linear(exact[0], w.double(), exact[1], adapters(exact[2:]))
    expected = torch.autograd.grad(y64, exact, dy.double())
    for name, a, e, like in zip(("y", "dx", "db", "dA", "dB", "dA'", "dB'"), (y, *got), (y64, *expected),
                                (x, x, b, *m)):
        check(a, e, TOLERANCE[dtype], name)
        assert a.dtype == like.dtype, name
    plain = torch.nn.functional.linear(x[2].reshape(5, 24), w, b)
    check(y[2], plain.double(), TOLERANCE[dtype], "a row without an adapter")


def test_gradients_by_finite_differences():
    x, w, b, m, _ = (t.double().cpu() if torch.is_tensor(t) else t for t in setup(torch.float32))
    m = [t.double().cpu() for t in m]
    assert gradcheck(lambda x, b, *m: L.lora_linear(x, w, b, adapters(m)), [leaf(t) for t in (x, b, *m)])


def test_dropout_is_exact():
    """The mask is read back from a call with A = 1, B = 1 on the same generator state; the gradient must use it too."""
    x, w, _, m, dy = setup(torch.float32)
    inputs = [leaf(t) for t in (x, *m[:2])]
    torch.manual_seed(5)
    y = L.lora_linear(inputs[0], w, None, [L.Adapter(*inputs[1:], 2.0)], dropout=0.4)
    got = torch.autograd.grad(y, inputs, dy)
    torch.manual_seed(5)
    mask = (torch.rand(20, 24, device=x.device) >= 0.4).double().view(4, 5, 24) / 0.6
    exact = [leaf(t.double()) for t in (x, *m[:2])]
    y64 = L.ref_lora_linear(exact[0], w.double(), None, [L.Adapter(*exact[1:], 2.0)], [mask])
    for name, a, e in zip(("y", "dx", "dA", "dB"), (y, *got), (y64, *torch.autograd.grad(y64, exact, dy.double()))):
        check(a, e, 1e-5, name)
    assert 0.3 < float((mask == 0).double().mean()) < 0.5


def test_only_what_is_wanted_is_computed():
    x, w, b, m, dy = setup(torch.float32)
    A, B = leaf(m[0]), m[1]
    L.lora_linear(x, w, b, [L.Adapter(A, B, 1.0)]).backward(dy)
    assert A.grad is not None and B.grad is None and x.grad is None
    with pytest.raises(ValueError, match="no gradient of the base"):
        L.lora_linear(x, leaf(w), b, [])
    check(L.lora_linear(x, w, b, []), torch.nn.functional.linear(x, w, b), 1e-6)
