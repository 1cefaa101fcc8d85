"""One new token against the cache: attention that is all memory traffic, split over the keys to fill the card.

    o = softmax(q k^T scale) v     q (B, H, D), one token a row; k, v (B, K, S, D), of which row b sees lo_b <= s < hi_b

    left-padded rows have lo > 0, ragged ones a hi of their own; a sliding window is lo = hi - window. Only what is seen
    is read, so that short rows cost little. B K programs are too few for a card (32 rows x 8 key heads on 132
    processors), so each row's keys are split evenly:

        row b   lo |--- part 0 ---|--- part 1 ---|--- part 2 ---| hi      program (b K + head, part): G heads that share
                         |               |              |                 the keys x their part, like a tiny forward
                     m, l, acc       m, l, acc      m, l, acc
                         \\---------------+--------------/                 second kernel: the parts' softmaxes joined
                                    o = sum e^(m - max) acc / sum e^(m - max) l

    The G queries of a key head stand in the rows of one tile (16 at least: the matrix units take no less), and k, v are
    read once for all of them; a head by itself would read them G times.

Bytes: 2 B K len D, once. FLOPs: 4 B H len D, nothing beside it. The lengths stay on the device, the number of parts
comes from the size of the cache: a captured CUDA graph serves every step.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.backend import LOG2E, power_of_two, processors, tanh, tl, triton, use_triton

BLOCK = 64                             # keys a program takes at a time
MOST_PARTS = 64


def ref_decode(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, slopes: Tensor | None = None,
               softcap: float = 0.0, scale: float | None = None) -> Tensor:
    """(B, H, D), (B, K, S, D), bounds (B,) -> (B, H, D); ALiBi's distance counts from the last key seen, hi - 1. A row
    that sees nothing gives 0."""
    B, H, D = q.shape
    K, S = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.view(B, K, H // K, D) @ k.transpose(2, 3)).to(wide) * (D ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys = torch.arange(S, device=q.device)
    if slopes is not None:
        scores = scores - slopes.to(wide).view(K, H // K, 1) * (hi[:, None, None, None] - 1 - keys)
    seen = ((keys >= lo[:, None]) & (keys < hi[:, None]))[:, None, None]                             # (B, 1, 1, S)
    p = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0).to(v.dtype)
    # What lies behind hi was never written and may be anything; 0 times it must be 0.
    return (p @ v.masked_fill(~seen[..., 0, :, None], 0.0)).view(B, H, D)


@triton.jit
def part_kernel(Q, K, V, LO, HI, SLOPES, ACC, MAX, SUM, qb, qh, kb, kh, kt, vb, vh, vt, KV, G, scale, cap,
                PARTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr,
                HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr):
    b, head = (tl.program_id(0) // KV).to(tl.int64), (tl.program_id(0) % KV).to(tl.int64)
    part = tl.program_id(1)
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)
    lo, hi = tl.load(LO + b), tl.load(HI + b)
    share = ((tl.maximum(hi - lo, 0) + PARTS - 1) // PARTS + BN - 1) // BN * BN      # whole blocks: no key twice
    begin = lo + part * share
    end = tl.minimum(begin + share, hi)
    group, dims = tl.arange(0, BG), tl.arange(0, BD)
    q = tl.load(Q + b * qb + (head * G + group[:, None]) * qh + dims[None, :],
                mask=(group[:, None] < G) & (dims[None, :] < D), other=0.0)
    slope = tl.load(SLOPES + head * G + group, mask=group < G, other=0.0) * 1.4426950408889634 if HAS_SLOPES else 0.0
    acc = tl.zeros((BG, BD), tl.float32)
    peak, total = tl.full((BG,), -1e30, tl.float32), tl.zeros((BG,), tl.float32)     # finite: an empty part joins as 0
    for start in range(begin, end, BN):
        keys = start + tl.arange(0, BN)
        inside = (keys[:, None] < end) & (dims[None, :] < D)
        k = tl.load(K + b * kb + head * kh + keys[:, None].to(tl.int64) * kt + dims[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_CAP:
            s = tanh(s) * cap
        if HAS_SLOPES:
            s -= slope[:, None] * (hi - 1 - keys[None, :]).to(tl.float32)
        s = tl.where(keys[None, :] < end, s, -float("inf"))
        new = tl.maximum(peak, tl.max(s, 1))
        p, shrink = tl.exp2(s - new[:, None]), tl.exp2(peak - new)
        v = tl.load(V + b * vb + head * vh + keys[:, None].to(tl.int64) * vt + dims[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        peak = new
    at = ((b * KV + head) * G + group) * PARTS + part                                # (B, H, PARTS)
    tl.store(MAX + at, peak, mask=group < G)
    tl.store(SUM + at, total, mask=group < G)
    tl.store(ACC + at[:, None] * BD + dims[None, :], acc, mask=group[:, None] < G)


@triton.jit
def join_kernel(ACC, MAX, SUM, OUT, PARTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row, parts, dims = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, BD)
    peak = tl.load(MAX + row * PARTS + parts)
    weight = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(weight * tl.load(SUM + row * PARTS + parts), 0)
    acc = tl.load(ACC + (row * PARTS + parts[:, None]) * BD + dims[None, :])
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(OUT + row * D + dims, out.to(OUT.dtype.element_ty), mask=dims < D)


def parts(q: Tensor, kv_heads: int, size: int) -> int:
    """How many ways the keys are split: two programs per processor, at least two blocks of keys in each."""
    wanted = 2 * processors(q.device.index) if q.is_cuda else 4
    need = -(-wanted // (len(q) * kv_heads))
    return max(1, min(power_of_two(need), power_of_two(-(-size // (2 * BLOCK))), MOST_PARTS))


def decode(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, slopes: Tensor | None = None, softcap: float = 0.0,
           scale: float | None = None) -> Tensor:
    """q (B, H, D) of the newest token, cache k, v (B, K, S, D) of any strides, lo and hi (B,) int32: row b sees keys
    lo_b to hi_b - 1 -> (B, H, D). For sampling: no gradient."""
    if not use_triton(q):
        return ref_decode(q, k, v, lo, hi, slopes, softcap, scale)
    (B, H, D), K, S = q.shape, k.shape[1], k.shape[2]
    scale = D ** -0.5 if scale is None else scale
    inside, cap = (scale / softcap, softcap * LOG2E) if softcap else (scale * LOG2E, 0.0)
    n, BD = parts(q, K, S), power_of_two(max(16, D))
    acc = torch.empty(B, H, n, BD, device=q.device, dtype=torch.float32)
    peak, total = torch.empty(2, B, H, n, device=q.device, dtype=torch.float32)
    out = torch.empty(B, H, D, device=q.device, dtype=q.dtype)
    part_kernel[(B * K, n)](
        q, k, v, lo, hi, lo if slopes is None else slopes, acc, peak, total, *q.stride()[:2], *k.stride()[:3],
        *v.stride()[:3], K, H // K, float(inside), float(cap), PARTS=n, D=D, BD=BD, BG=power_of_two(max(16, H // K)),
        BN=BLOCK if q.element_size() == 2 else max(16, BLOCK // 4), HAS_CAP=softcap > 0, HAS_SLOPES=slopes is not None,
        num_warps=4, num_stages=3 if BD == 128 else 2)
    join_kernel[(B * H,)](acc, peak, total, out, PARTS=n, D=D, BD=BD, num_warps=4)
    return out


def cache_bytes(lengths: Tensor, kv_heads: int, dim: int, size: int = 2) -> int:
    return 2 * int(lengths.sum()) * kv_heads * dim * size
