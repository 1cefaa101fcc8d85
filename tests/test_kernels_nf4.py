"""NF4: the published code, the error of quantisation, unpacking against its definition, gradients of the layer."""
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, TOLERANCE, check, kernels_only, leaf, names, random  # noqa: F401

from kernels import nf4 as N

PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_the_code_is_the_published_one():
    check(N.normal_float(), torch.tensor(PUBLISHED), 1e-6)


@pytest.mark.parametrize("dtype", **names)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (7, 192), (130, 256)])
def test_unpacking_is_the_definition(shape, double, dtype):
    q = N.quantise(random(*shape, dtype=dtype), double)
    out = N.dequantise(q)
    check(out, N.ref_dequantise(q), 1e-7 if dtype == torch.float32 else 1e-3)
    assert out.dtype == dtype and out.shape == shape


@pytest.mark.parametrize("double", [False, True])
def test_quantisation_by_hand(double):
    """Each weight becomes the nearest of the 16 values times its group's scale, and numbers of the code come back."""
    w = random(64, 256).cpu()
    q = N.quantise(w, double)
    groups = w.reshape(-1, 64)
    absmax = groups.abs().amax(1)
    scales = absmax if not double else (q.mean + q.step.repeat_interleave(256)[:len(absmax)] * q.absmax.float())
    assert float((scales - absmax).abs().max()) <= (float(q.step.max()) / 2 if double else 0) * 1.001
    nearest = (groups[..., None] / scales[:, None, None] - q.code).abs().argmin(-1)
    check(N.ref_dequantise(q).view(-1, 64), q.code[nearest] * scales[:, None], 1e-6)
    on_code = (q.code[torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0))]).index_fill_(
        1, torch.tensor([0]), 1.0)
    check(N.ref_dequantise(N.quantise(on_code, False)), on_code, 1e-7)


def test_bits_a_weight():
    """4.127 with double quantisation, 4.5 without, and about a tenth of a normal weight's size as the error."""
    w = random(1024, 1024).cpu()
    for double, bits in ((True, 4.127), (False, 4.5)):
        q = N.quantise(w, double)
        assert abs(8 * q.nbytes / w.numel() - bits) < 2e-3
        error = float((N.ref_dequantise(q) - w).norm() / w.norm())
        assert 0.08 < error < 0.1


def test_the_layer_and_its_gradient():
    x, w, b = leaf(random(5, 3, 64)), random(32, 64, seed=1), leaf(random(32, seed=2))
    q = N.quantise(w)
    y = N.nf4_linear(x, q, b)
    w64 = N.ref_dequantise(q).double()
    check(y, x.double() @ w64.t() + b.double(), 1e-6)
    dy = random(5, 3, 32, seed=3)
    dx, db = torch.autograd.grad(y, (x, b), dy)
    check(dx, dy.double() @ w64, 1e-6)
    check(db, dy.double().sum((0, 1)), 1e-6)


def test_a_matrix_that_is_no_whole_number_of_groups():
    with pytest.raises(ValueError, match="groups of 64"):
        N.quantise(random(3, 10))
