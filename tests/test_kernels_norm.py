"""Norms: the kernels against the definition, values and every gradient; the definition against torch and the model."""
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, TOLERANCE, check, kernels_only, leaf, names, random  # noqa: F401
from torch.autograd import gradcheck

from kernels import norm as N
from model import RMSNorm


@pytest.mark.parametrize("shape", [(37, 24), (2, 5, 257), (1, 1), (3, 2100)], ids=str)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", **names)
def test_values_and_gradients(dtype, layer, shape):
    """Rows that share a program, rows that fill one, a row of one number; outputs and gradients with and without the
    residual sum, whose gradient takes in what arrives at the stream."""
    for residual in (False, True):
        x, r = leaf(random(*shape, dtype=dtype)), leaf(random(*shape, dtype=dtype, seed=1))
        w, b = leaf(random(shape[-1], dtype=dtype, seed=2) + 1), leaf(random(shape[-1], dtype=dtype, seed=3))
        dy, ds = random(*shape, dtype=dtype, seed=4), random(*shape, dtype=dtype, seed=5)
        got = N.norm(x, w, b if layer else None, 1e-3, layer, r if residual else None)
        x64, r64, w64, b64 = (leaf(t.double()) for t in (x, r, w, b))
        s64 = x64 + r64 if residual else x64
        rounded = s64 + ((s64.detach()).to(dtype).double() - s64.detach())      # the stream is kept in the dtype
        y64 = N.ref_norm(rounded, w64, b64 if layer else None, 1e-3, layer)
        y, s = got if residual else (got, None)
        if residual:
            assert torch.equal(s, x.detach() + r.detach())
            torch.autograd.backward((y, s), (dy, ds))
            torch.autograd.backward((y64, rounded), (dy.double(), ds.double()))
        else:
            y.backward(dy)
            y64.backward(dy.double())
        pairs = {"y": (y, y64), "dx": (x.grad, x64.grad), "dw": (w.grad, w64.grad)}
        pairs |= {"dr": (r.grad, r64.grad)} if residual else {}
        pairs |= {"db": (b.grad, b64.grad)} if layer else {}
        for name, (a, e) in pairs.items():
            if shape == (1, 1) and name in ("y", "dx", "dw") and (layer or name == "dx"):
                assert (a.detach().double() - e.detach()).abs().max() < 1e-2    # nothing but rounding is left of these
                continue
            check(a, e, TOLERANCE[dtype], f"{name} residual={residual}")
            assert a.dtype == dtype


def test_strided_rows_frozen_weights_and_no_weight_at_all():
    x = leaf(random(6, 4, 40)[:, 1])                                   # rows far apart
    y = N.rms_norm(x, None, 1e-5)
    y.sum().backward()
    x64 = leaf(x.double())
    N.ref_norm(x64, None, None, 1e-5, False).sum().backward()
    check(x.grad, x64.grad, 1e-5)
    w = random(40, seed=1)
    y = N.layer_norm(x, w, None, 1e-5)
    check(y, F.layer_norm(x.double(), (40,), w.double(), None, 1e-5), 1e-5)
    y.sum().backward()
    assert w.grad is None and N.rms_norm(x[:0], None).shape == (0, 40)


def test_a_bf16_stream_may_have_fp32_weights():
    """Gemma's 1 + w is kept in fp32; fp16 stands in for bf16, which the interpreter cannot do."""
    x, w = leaf(random(9, 40, dtype=torch.float16)), leaf(random(40, seed=1) + 1)
    y = N.rms_norm(x, w)
    y.backward(random(9, 40, dtype=torch.float16, seed=2))
    check(y, N.ref_norm(x.double(), w.double(), None, 1e-6, False), 2e-3)
    assert y.dtype == x.grad.dtype == torch.float16 and w.grad.dtype == torch.float32


def test_many_rows_are_walked_over_by_few_programs():
    x, w, dy = leaf(random(500, 24)), leaf(random(24, seed=1)), random(500, 24, seed=2)
    N.rms_norm(x, w).backward(dy)
    x64, w64 = leaf(x.double()), leaf(w.double())
    N.ref_norm(x64, w64, None, 1e-6, False).backward(dy.double())
    check(x.grad, x64.grad, 1e-5)
    check(w.grad, w64.grad, 1e-5)
    first = w.grad.clone()
    w.grad = None
    N.rms_norm(x, w).backward(dy)
    assert torch.equal(first, w.grad)                                  # the same bits every time


def test_the_definition_is_that_of_torch_and_of_the_model(monkeypatch):
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (7,), (7,)))
    check(N.ref_norm(x, w, None, 1e-5, False), F.rms_norm(x, (7,), w, 1e-5), 1e-12)
    check(N.ref_norm(x, w, b, 1e-5, True), F.layer_norm(x, (7,), w, b, 1e-5), 1e-12)
    ours = RMSNorm(7, 1e-5)
    with torch.no_grad():
        ours.weight.copy_(w)
    check(N.rms_norm(x.float(), w.float(), 1e-5), ours(x.float()), 1e-7)
    check(N.layer_norm(x, w, b, 1e-5, residual=x)[0], F.layer_norm(2 * x, (7,), w, b, 1e-5), 1e-12)
    assert gradcheck(lambda x, w: N.ref_norm(x, w, None, 1e-5, False), (x, w))
    assert gradcheck(lambda x, w, b: N.ref_norm(x, w, b, 1e-5, True), (x, w, b))
