"""Rotary positions: queries and keys in one launch, whatever their strides, without a copy.

    pair i of a head is (x[i], x[i + R/2]), i < R/2, and turns by the token's angle a_i; numbers from R on stay as is

        y[i]       = x[i] cos a_i - x[i + R/2] sin a_i            backward: the same turn by -a: dx is dy turned back,
        y[i + R/2] = x[i + R/2] cos a_i + x[i] sin a_i            so nothing is kept but the two small tables

        program (b, t):    q of token t   [ head 0 | head 1 | ... | head H-1 ]     each head  [ x1 .. | x2 .. | rest ]
                           k of token t   [ head 0 | ... | head K-1 ]                           R/2     R/2   D - R
                           cos, sin of token t, loaded once for all heads

Bytes: every number of q and k read once and written once, the tables once. FLOPs: 3 a number.
In place (rope_) it moves the same bytes and allocates nothing; for a rollout, where no gradient is asked for.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import power_of_two, tl, triton, use_triton


def ref_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), tables (B or 1, 1, T, R), R <= D: as model.rotate, in fp32 and rounded once."""
    R, wide = cos.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    x1, x2, c, s = (t.to(wide) for t in (x[..., :R // 2], x[..., R // 2:R], cos[..., :R // 2], sin[..., :R // 2]))
    return torch.cat(((x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), x[..., R:]), dim=-1)


@triton.jit
def turn(X, Y, xh, yh, cos, sin, HEADS: tl.constexpr, BH: tl.constexpr, HALF: tl.constexpr, BHALF: tl.constexpr,
         REST: tl.constexpr, BREST: tl.constexpr):
    heads, i = tl.arange(0, BH), tl.arange(0, BHALF)
    inside = (heads[:, None] < HEADS) & (i[None, :] < HALF)
    a, b = heads[:, None].to(tl.int64) * xh + i[None, :], heads[:, None].to(tl.int64) * yh + i[None, :]
    x1 = tl.load(X + a, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(X + a + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + b, (x1 * cos - x2 * sin).to(Y.dtype.element_ty), mask=inside)
    tl.store(Y + b + HALF, (x2 * cos + x1 * sin).to(Y.dtype.element_ty), mask=inside)
    if REST > 0:                                                             # 0 in place: it is there already
        r = tl.arange(0, BREST)
        kept = (heads[:, None] < HEADS) & (r[None, :] < REST)
        x = tl.load(X + heads[:, None].to(tl.int64) * xh + 2 * HALF + r[None, :], mask=kept, other=0.0)
        tl.store(Y + heads[:, None].to(tl.int64) * yh + 2 * HALF + r[None, :], x, mask=kept)


@triton.jit
def rope_kernel(Q, K, QO, KO, COS, SIN, qb, qh, qt, kb, kh, kt, pb, ph, pt, rb, rh, rt, cb, ct, sb, st, T, sign,
                H: tl.constexpr, BH: tl.constexpr, KV: tl.constexpr, BKV: tl.constexpr, HALF: tl.constexpr,
                BHALF: tl.constexpr, REST: tl.constexpr, BREST: tl.constexpr):
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    i = tl.arange(0, BHALF)
    cos = tl.load(COS + b * cb + t * ct + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + b * sb + t * st + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin *= tl.cast(sign, tl.float32)
    turn(Q + b * qb + t * qt, QO + b * pb + t * pt, qh, ph, cos, sin, H, BH, HALF, BHALF, REST, BREST)
    turn(K + b * kb + t * kt, KO + b * rb + t * rt, kh, rh, cos, sin, KV, BKV, HALF, BHALF, REST, BREST)


def launch(H: int, KV: int, D: int, R: int, in_place: bool) -> dict:
    """A program holds all heads of a token, 16 numbers a thread."""
    half, rest = R // 2, 0 if in_place else D - R
    warps = max(1, min(8, power_of_two(H) * power_of_two(half) // 256))
    return {"H": H, "BH": power_of_two(H), "KV": KV, "BKV": power_of_two(KV), "HALF": half,
            "BHALF": power_of_two(half), "REST": rest, "BREST": power_of_two(rest), "num_warps": warps,
            "num_stages": 1}


def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float, q_out: Tensor, k_out: Tensor) -> None:
    (B, H, T, D), KV = q.shape, k.shape[1]
    cb, sb = (t.stride(0) if len(t) > 1 else 0 for t in (cos, sin))          # one table serves every row
    rope_kernel[(B * T,)](q, k, q_out, k_out, cos, sin, *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3],
                          *k_out.stride()[:3], cb, cos.stride(2), sb, sin.stride(2), T, float(sign),
                          **launch(H, KV, D, cos.shape[-1], q_out is q))


def by_token(x: Tensor) -> Tensor:
    """An empty tensor of x's shape (B, H, T, D) whose memory is (B, T, H, D), as a projection leaves it."""
    B, H, T, D = x.shape
    return torch.empty(B, T, H, D, device=x.device, dtype=x.dtype).transpose(1, 2)


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        q, k, cos, sin = dense(q), dense(k), dense(cos), dense(sin)
        out = by_token(q), by_token(k)
        run(q, k, cos, sin, 1.0, *out)
        ctx.save_for_backward(cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq, dk = dense(dq), dense(dk)
        out = by_token(dq), by_token(dk)
        run(dq, dk, *ctx.saved_tensors, -1.0, *out)
        return *out, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D), k (B, K, T, D) of any strides, tables (B or 1, 1, T, R) of model.rope_tables -> both, turned."""
    if use_triton(q) and q.numel():
        return Rope.apply(q, k, cos, sin)
    return ref_rope(q, cos, sin), ref_rope(k, cos, sin)


@torch.no_grad()
def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """rope in place, where nobody asks for a gradient; q and k must be dense along the head."""
    if use_triton(q) and q.numel():
        run(q, k, dense(cos), dense(sin), 1.0, q, k)
        return q, k
    return q.copy_(ref_rope(q, cos, sin)), k.copy_(ref_rope(k, cos, sin))


def traffic(q: Tensor, k: Tensor) -> int:
    """Bytes that must move."""
    return 2 * (q.numel() + k.numel()) * q.element_size()
