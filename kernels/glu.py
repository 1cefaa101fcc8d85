"""Gated activations: SwiGLU and its relatives, h = f(gate) * up, between the two products of an MLP.

    f = silu: x sigmoid(x)        f = gelu: x Phi(x)        f = gelu_tanh: its approximation by tanh        f = relu
    backward     dup = dh f(gate)      dgate = dh up f'(gate)      and h again, if asked for: it then need not be kept

        gate  |====|====|====|====|      a program takes BLOCK numbers of the flat tensors, 16 bytes a thread and
        up    |====|====|====|====|      load; rows matter only where gate and up are the two halves of one product
        h     |====|====|====|====|      (stride 2 I), then a program takes a piece of one row

Bytes (2 a number): forward 6 a number, backward 10 (12 with h). FLOPs: about 10, never felt.

Plain autograd keeps gate, up, f(gate) and h. `glu` keeps gate and up. `glu_linear`, activation and down projection in
one function, keeps no h for the projection's dW either: the backward makes it again in the pass that makes dgate, dup.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import tanh, tl, triton, use_triton

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
BLOCK = 2048


def ref_glu(gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
    """The definition, in fp32 and rounded once."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (FUNCTIONS[kind](gate.to(wide)) * up.to(wide)).to(gate.dtype)


@triton.jit
def activation(x, KIND: tl.constexpr):
    """f(x) and f'(x)."""
    if KIND == 0:
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif KIND == 1:
        phi = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
        return x * phi, phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 2:
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    else:
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)


@triton.jit
def forward_kernel(GATE, UP, H, gs, us, N, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + row * gs + columns, mask=columns < N, other=0.0).to(tl.float32)
    up = tl.load(UP + row * us + columns, mask=columns < N, other=0.0).to(tl.float32)
    f, _ = activation(gate, KIND)
    tl.store(H + row * N + columns, (f * up).to(H.dtype.element_ty), mask=columns < N)


@triton.jit
def backward_kernel(DH, GATE, UP, DGATE, DUP, H, ds, gs, us, N, KIND: tl.constexpr, WANT_H: tl.constexpr,
                    BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    dh = tl.load(DH + row * ds + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gs + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * us + columns, mask=inside, other=0.0).to(tl.float32)
    f, slope = activation(gate, KIND)
    tl.store(DGATE + row * N + columns, (dh * up * slope).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * N + columns, (dh * f).to(DUP.dtype.element_ty), mask=inside)
    if WANT_H:
        tl.store(H + row * N + columns, (f * up).to(H.dtype.element_ty), mask=inside)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """(..., I) and the stride from row to row; a copy only where there is no such stride."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    return flat, flat.stride(0)


def grid(x: Tensor, *others: Tensor) -> tuple[tuple[int, int], int]:
    """Programs and the row length. Dense tensors are one long row for every 64 of BLOCK: no row ends in the middle."""
    n = x.numel()
    if all(t.is_contiguous() for t in (x, *others)) and n % (64 * BLOCK) == 0:
        return (n // (64 * BLOCK), 64), 64 * BLOCK
    return (n // x.shape[-1], -(-x.shape[-1] // BLOCK)), x.shape[-1]


def run_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    h = torch.empty(gate.shape, device=gate.device, dtype=gate.dtype)
    if not h.numel():
        return h
    size, N = grid(gate, up)
    dense = N != gate.shape[-1]
    (g, gs), (u, us) = ((x, N) if dense else rows(x) for x in (gate, up))
    forward_kernel[size](g, u, h, gs, us, N, KIND=KINDS[kind], BLOCK=BLOCK, num_warps=8)
    return h


def run_backward(dh: Tensor, gate: Tensor, up: Tensor, kind: str, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    dgate, dup = (torch.empty(gate.shape, device=gate.device, dtype=gate.dtype) for _ in range(2))
    h = torch.empty_like(dgate) if again else None
    if not dgate.numel():
        return dgate, dup, h
    size, N = grid(gate, up, dh)
    dense = N != gate.shape[-1]
    (d, ds), (g, gs), (u, us) = ((x, N) if dense else rows(x) for x in (dh, gate, up))
    backward_kernel[size](d, g, u, dgate, dup, h if again else dgate, ds, gs, us, N, KIND=KINDS[kind], WANT_H=again,
                          BLOCK=BLOCK, num_warps=8)
    return dgate, dup, h


class GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return run_forward(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        dgate, dup, _ = run_backward(dh, *ctx.saved_tensors, ctx.kind, False)
        return dgate, dup, None


class GLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, kind):
        ctx.save_for_backward(gate, up, weight)
        ctx.kind = kind
        return F.linear(run_forward(gate, up, kind), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight = ctx.saved_tensors
        want = ctx.needs_input_grad[2]
        dgate, dup, h = run_backward(dy @ weight, gate, up, ctx.kind, want)
        dw = dy.reshape(-1, dy.shape[-1]).t() @ h.view(-1, h.shape[-1]) if want else None
        return dgate, dup, dw, None


def glu(gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
    """(..., I), (..., I) -> f(gate) * up. The two halves of one product may be given as they lie in it."""
    return GLU.apply(gate, up, kind) if use_triton(gate) else FUNCTIONS[kind](gate) * up


def glu_linear(gate: Tensor, up: Tensor, weight: Tensor, kind: str = "silu") -> Tensor:
    """glu(gate, up) @ weight^T, (..., I), (C, I) -> (..., C); keeps gate and up, never h."""
    return GLULinear.apply(gate, up, weight, kind) if use_triton(gate) else F.linear(glu(gate, up, kind), weight)


def traffic(numbers: int, size: int = 2, backward: bool = False) -> int:
    """Bytes that must move."""
    return numbers * size * (5 if backward else 3)
