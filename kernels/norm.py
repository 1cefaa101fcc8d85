"""RMSNorm and LayerNorm, with the residual sum in front of them if wanted: memory traffic and nothing else.

    s = x + r                         (where a residual r is given; s is the new stream, returned beside y)
    RMS     y = s / sqrt(mean(s^2) + eps) * w                    Layer   y = (s - mean) / sqrt(var + eps) * w + b

    backward, with n = the normalised s and g = dy * w:
            ds = (g - n * mean(g n)) / rms                               ds = (g - mean(g) - n * mean(g n)) / std
            dw = sum over rows of dy * n        db = sum over rows of dy        dx = dr = ds + what arrives at s itself

        +-------------------------- C --------------------------+
        | program 0: ROWS rows at once, all of each in registers |       Forward: a program per ROWS rows. Backward: a
        +-------------------------------------------------------+       few programs per processor, each walking over
        | program 1                                             |       rows p, p + P, p + 2 P ... and adding up its own
        +-------------------------------------------------------+       dw; one sum over the P partial rows at the end,
        | ...                                                   |       in the same order every time.

Bytes (C wide, 2 a number): forward 4 C a row, with the residual 8 C; backward 6 C (8 C). FLOPs: about 5 C, never felt.
Everything between the load and the store is fp32, and the result is rounded once.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import choice, power_of_two, processors, tl, triton, use_triton

SMALL = 1 << 24        # numbers: below, the library's fused RMSNorm takes a fifth of our time on the host (docs/LOG.md)
WIDEST = 8192       # numbers of a row that fit into the registers of one program, next to their weights' gradients


# ---------------------------------------------------------------- the definition

def ref_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer: bool) -> Tensor:
    """(..., C) -> (..., C). The rule of the kernels, and of a model whose norms are kept in fp32."""
    h = x if x.dtype == torch.float64 else x.float()
    if layer:
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h if weight is None else h * weight.to(h.dtype)
    return (h if bias is None else h + bias.to(h.dtype)).to(x.dtype)


# ---------------------------------------------------------------- kernels

@triton.jit
def forward_kernel(X, RES, W, B, Y, S, MEAN, RSTD, xs, rs, N, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   LAYER: tl.constexpr, HAS_RES: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns[None, :] < C)
    x = tl.load(X + rows[:, None] * xs + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RES:
        x += tl.load(RES + rows[:, None] * rs + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(S.dtype.element_ty)                                   # the norm of what the stream holds
        tl.store(S + rows[:, None] * C + columns[None, :], rounded, mask=inside)
        x = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(x, 1) / C
        tl.store(MEAN + rows, mean, mask=rows < N)
        x = tl.where(columns[None, :] < C, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + tl.cast(eps, tl.float32))
    tl.store(RSTD + rows, rstd, mask=rows < N)
    y = x * rstd[:, None]
    if HAS_W:
        y *= tl.load(W + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    if HAS_B:
        y += tl.load(B + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + rows[:, None] * C + columns[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(DY, S, W, DS, MEAN, RSTD, DX, DW, DB, gs, ss, ds, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    LAYER: tl.constexpr, HAS_DS: tl.constexpr, HAS_W: tl.constexpr, WANT_W: tl.constexpr,
                    WANT_B: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    dw, db = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_W:
        w = tl.load(W + columns, mask=columns < C, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), (N + ROWS - 1) // ROWS, tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows[:, None] < N) & (columns[None, :] < C)
        dy = tl.load(DY + rows[:, None] * gs + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        n = tl.load(S + rows[:, None] * ss + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + rows, mask=rows < N, other=0.0)[:, None]
        if LAYER:
            n -= tl.load(MEAN + rows, mask=rows < N, other=0.0)[:, None]
        n = tl.where(inside, n * rstd, 0.0)
        g = dy * w[None, :] if HAS_W else dy
        out = g - n * (tl.sum(g * n, 1) / C)[:, None]
        if LAYER:
            out -= (tl.sum(g, 1) / C)[:, None]
        out *= rstd
        if HAS_DS:
            out += tl.load(DS + rows[:, None] * ds + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + rows[:, None] * C + columns[None, :], out.to(DX.dtype.element_ty), mask=inside)
        if WANT_W:
            dw += dy * n
        if WANT_B:
            db += dy
    at = tl.program_id(0).to(tl.int64) * C + columns
    if WANT_W:
        tl.store(DW + at, tl.sum(dw, 0), mask=columns < C)
    if WANT_B:
        tl.store(DB + at, tl.sum(db, 0), mask=columns < C)


# ---------------------------------------------------------------- launch

def launch(C: int) -> dict:
    """About 4,096 numbers a program; narrow rows share one, wide ones take more warps: 16 numbers a thread."""
    block = power_of_two(C)
    rows = max(1, min(16, 2048 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, rows * block // 512)), "num_stages": 1}


def flat(x: Tensor) -> Tensor:
    """(..., C) as rows with one stride; a copy only where there is no such stride."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, layer):
        shape, (rows, C) = x.shape, (x.numel() // x.shape[-1], x.shape[-1])
        flat_x, plan = flat(x), launch(C)
        y = torch.empty(shape, device=x.device, dtype=x.dtype)
        rstd = torch.empty(rows, device=x.device, dtype=torch.float32)
        mean = torch.empty(rows, device=x.device, dtype=torch.float32) if layer else rstd
        flat_r = flat_x if residual is None else flat(residual)
        s = flat_x if residual is None else torch.empty(shape, device=x.device, dtype=x.dtype)
        forward_kernel[(-(-rows // plan["ROWS"]),)](
            flat_x, flat_r, rstd if weight is None else weight, rstd if bias is None else bias, y, s, mean, rstd,
            flat_x.stride(0), flat_r.stride(0), rows, C, float(eps), LAYER=layer, HAS_RES=residual is not None,
            HAS_W=weight is not None, HAS_B=bias is not None, **plan)
        ctx.save_for_backward(s, weight, mean, rstd)
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        return y if residual is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        s, weight, mean, rstd = ctx.saved_tensors
        C, rows, plan = dy.shape[-1], len(rstd), launch(dy.shape[-1])
        dy, flat_s, shape = flat(dy), flat(s), dy.shape
        extra = dy if ds is None else flat(ds)
        n = min(-(-rows // plan["ROWS"]), 4 * processors(dy.device.index) if dy.is_cuda else 3)
        dx = torch.empty(shape, device=dy.device, dtype=s.dtype)
        _, _, want_w, want_b = ctx.needs_input_grad[:4]
        dw, db = (torch.empty(n, C, device=dy.device, dtype=torch.float32) if want else rstd
                  for want in (want_w, want_b))
        backward_kernel[(n,)](
            dy, flat_s, rstd if weight is None else weight, extra, mean, rstd, dx, dw, db, dy.stride(0),
            flat_s.stride(0), extra.stride(0), rows, C, LAYER=ctx.layer, HAS_DS=ds is not None,
            HAS_W=weight is not None, WANT_W=want_w, WANT_B=want_b, **plan)
        return (dx, dx if ctx.needs_input_grad[1] else None, dw.sum(0).to(weight.dtype) if want_w else None,
                db.sum(0).to(ctx.bias_dtype) if want_b else None, None, None)


# ---------------------------------------------------------------- what others call

def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer: bool,
         residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    small = x.numel() < SMALL and residual is None and not layer and (weight is None or weight.dtype == x.dtype)
    if x.is_cuda and small and choice() == "auto" and bias is None:          # there the host's pace decides
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    if use_triton(x) and x.shape[-1] <= WIDEST and x.numel():
        return Norm.apply(x, residual, weight, bias, eps, layer)
    if residual is not None:
        x = x + residual
    if layer and (weight is None or weight.dtype == x.dtype):
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)                 # one pass on a CPU, the same function
    else:
        y = ref_norm(x, weight, bias, eps, layer)
    return y if residual is None else (y, x)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x (..., C), weight (C,) -> y; with a residual of x's shape (y, x + residual)."""
    return norm(x, weight, None, eps, False, residual)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5,
               residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """As rms_norm, with the mean taken off and a bias put on."""
    return norm(x, weight, bias, eps, True, residual)


def traffic(rows: int, C: int, size: int = 2, residual: bool = False, backward: bool = False) -> int:
    """Bytes that must move."""
    return rows * C * size * ((3 + residual) if backward else (2 + 2 * residual))
