"""Four bits a weight: NormalFloat and double quantisation, QLoRA by hand (Dettmers et al. 2023, arXiv 2305.14314).

    w[i] = code[q[i]] * absmax[i // 64]        code: 16 quantiles of a normal distribution, scaled to [-1, 1], one is 0
    absmax[j] = mean + step[j // 256] * c[j]     c in -127 .. 127: the scales are quantised as well

Bits a weight: 4 + 8/64 + 32/(64 256) = 4.127 with double quantisation, 4.5 without: a 7B base takes 3.6 GB, not 14.

A linear layer unpacks W, multiplies, and forgets it; the backward pass unpacks it again. A product of N rows costs 2 N
FLOPs a weight, unpacking it 2.5 bytes: from a few hundred rows on the product hides it.

    packed  | q0 q1 | q2 q3 | ...          a program unpacks BLOCK bytes into 2 BLOCK weights: high four bits first,
             `-- byte              lookup of 16 numbers, the block's scale, two stores beside each other
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.backend import tl, triton, use_triton

GROUP, SUPER = 64, 256                 # weights that share a scale; scales that share a step
BLOCK = 1024


class NF4(NamedTuple):
    """A quantised matrix. absmax is fp32 per group, or int8 with mean and step (double quantisation)."""
    packed: Tensor                     # (numbers / 2,) uint8
    absmax: Tensor                     # (groups,) fp32 or int8
    step: Tensor                       # (groups / 256,) fp32; without double quantisation empty
    mean: Tensor                       # () fp32
    code: Tensor                       # (16,) fp32
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self[:4])


def normal_float(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values (appendix E): 8 positive and 7 negative quantiles at equal distances of probability, and 0."""
    outer = 1 - (1 / 32 + 1 / 30) / 2                                        # of the outermost quantile
    above = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    return (values / values.max()).float().to(device)


@torch.no_grad()
def quantise(w: Tensor, double: bool = True) -> NF4:
    """(out, in) weights -> the nearest of the 16 values for each; the count must be a multiple of 64."""
    if w.numel() % GROUP:
        raise ValueError(f"a matrix of {tuple(w.shape)} is no whole number of groups of {GROUP} weights")
    groups, code = w.detach().float().reshape(-1, GROUP), normal_float(w.device)
    absmax = groups.abs().amax(1)
    borders = (code[1:] + code[:-1]) / 2
    mean = absmax.mean() if double else absmax.new_zeros(())
    step, scales = absmax.new_empty(0), absmax
    if double:
        away = F.pad(absmax - mean, (0, -len(absmax) % SUPER)).view(-1, SUPER)
        step = away.abs().amax(1) / 127
        levels = (away / step.clamp(min=1e-30)[:, None]).round()
        scales, absmax = ((x.view(-1)[:len(absmax)]) for x in (mean + step[:, None] * levels, levels.to(torch.int8)))
    # By the scale that unpacking will use: what rounding took from it is not lost twice.
    q = torch.bucketize((groups / scales.clamp(min=1e-30)[:, None]).contiguous(), borders, out_int32=True)
    q = q.view(-1, 2).to(torch.uint8)
    return NF4(q[:, 0] << 4 | q[:, 1], absmax.contiguous(), step, mean, code, tuple(w.shape), w.dtype)


def ref_dequantise(q: NF4) -> Tensor:
    """The definition, in fp32 and rounded once."""
    scales = q.absmax
    if q.step.numel():
        scales = q.mean + q.step.repeat_interleave(SUPER)[:len(scales)] * scales
    index = torch.stack((q.packed >> 4, q.packed & 15), 1).view(-1, GROUP).long()
    return (q.code[index] * scales[:, None]).view(q.shape).to(q.dtype)


@triton.jit
def unpack_kernel(PACKED, ABSMAX, STEP, MEAN, CODE, OUT, N, DOUBLE: tl.constexpr, GROUP: tl.constexpr,
                  SUPER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)         # bytes
    inside = at < N
    byte = tl.load(PACKED + at, mask=inside, other=0).to(tl.int32)
    group = at // (GROUP // 2)
    scale = tl.load(ABSMAX + group, mask=inside, other=0).to(tl.float32)
    if DOUBLE:
        scale = tl.load(MEAN) + tl.load(STEP + group // SUPER, mask=inside, other=0.0) * scale
    pair = tl.join(tl.load(CODE + (byte >> 4)) * scale, tl.load(CODE + (byte & 15)) * scale)             # (BLOCK, 2)
    both = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(OUT + both, pair.to(OUT.dtype.element_ty), mask=inside[:, None])


@torch.no_grad()
def dequantise(q: NF4) -> Tensor:
    """-> (out, in) in the dtype that was quantised."""
    out = torch.empty(q.shape, device=q.packed.device, dtype=q.dtype)
    if not use_triton(out):
        return ref_dequantise(q)
    n, double = q.packed.numel(), q.step.numel() > 0
    unpack_kernel[(-(-n // BLOCK),)](q.packed, q.absmax, q.step if double else q.mean, q.mean, q.code, out, n,
                                     DOUBLE=double, GROUP=GROUP, SUPER=SUPER, BLOCK=BLOCK, num_warps=4)
    return out


class NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, q):
        ctx.q = q                                                            # constants: nothing to save
        return F.linear(x, dequantise(q).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dy @ dequantise(ctx.q).to(dy.dtype) if ctx.needs_input_grad[0] else None, dbias, None


def nf4_linear(x: Tensor, q: NF4, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out) through the frozen quantised matrix; the gradient reaches x, and adapters beside it."""
    return NF4Linear.apply(x, bias, q)


def dense(weight: Tensor | NF4, dtype: torch.dtype) -> Tensor:
    """A frozen matrix for one product: as it is, or unpacked for as long as somebody holds it."""
    return dequantise(weight).to(dtype) if isinstance(weight, NF4) else weight


class Shape(nn.Parameter):
    """A parameter that knows its shape and has no numbers. Computing with it is an error: F.linear of a CPU takes a
    plain tensor of the meta device without a word and returns whatever lies in its memory."""
    KNOWN = ("__get__", "__set__", "size", "dim", "numel", "detach", "requires_grad_", "__repr__")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ not in cls.KNOWN:
            raise RuntimeError(f"{function.__name__}: this matrix is in four bits (QuantisedLinear.quantised)")
        return super().__torch_function__(function, types, args, kwargs or {})


class QuantisedLinear(nn.Linear):
    """A frozen linear whose matrix is `quantised`; its `weight` is a shape without numbers."""
    def __init__(self, quantised: NF4, bias: nn.Parameter | None = None):
        super().__init__(*quantised.shape[::-1], bias=False, device="meta", dtype=quantised.dtype)
        self.weight, self.bias, self.quantised = Shape(self.weight.data, requires_grad=False), bias, quantised

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self.quantised, self.bias)


def nbytes(numbers: int) -> int:
    """Bytes of a matrix of so many weights, with double quantisation."""
    groups = numbers // GROUP
    return numbers // 2 + groups + 4 * -(-groups // SUPER) + 4


def traffic(numbers: int, size: int = 2) -> float:
    """Bytes that unpacking moves."""
    return numbers * (0.5 + 1 / GROUP + size)
