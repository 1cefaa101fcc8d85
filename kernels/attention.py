"""Attention in tiles, forward and backward, for the masks that libraries lack; the scores are never stored.

    o_t = sum_s p_ts v_s    p_t = softmax over the keys s that t sees of  cap tanh(q_t.k_s scale / cap) - slope (t - s)

Every mask of a language model is one interval of keys per query, lo_t <= s < hi_t, and neither bound ever falls:

    causal               [0, t]                  packed documents     [start of t's document, t]
    prefix-LM (GLM)      [0, max(t, prefix)]     sliding window       [t - window + 1, t]
    left padding         [first real token, t]   encoder              [start, end of the document)

and any combination is the intersection. `spans` writes the two bounds down once per batch. The tiles that a block of
queries needs follow from the bounds of its first and last row alone, and so do the tiles without any mask in them:

      keys ->     lo_first      lo_last            hi_first      hi_last         (drawn: prefix 3, blocks of 2)
    block of   |     | partial  |       full          |  partial    |                    x x x .|. . .
    queries    |  .  |  / / /   |   no mask at all    |  / / /      |   .                x x x .|. . .
               +-----+----------+---------------------+-------------+---                 x x x x|. . .     one program
                                                                                         x x x x|x . .     = one row
    forward and dQ: a program owns a block of queries and walks over its keys.           -------+-----       of tiles
    dK, dV: a program owns a block of keys of one key head and walks over the queries of all heads that share it, in the
    interval `first`, `last` of queries that see a key: no atomics, the same bits every time.

FLOPs: 4 B H D per pair (t, s) that is seen, forward; 10 more backward (2.5 times). Bytes: q, k, v, o once, and k, v
once more per block of queries, mostly from the cache. Kept for the backward: o and one log-sum-exp per row.
The exponential has base 2 and log2(e) is folded into the scale: that is the one the hardware has.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import LOG2E, architecture, choice, power_of_two, tanh, tiles, tl, triton, use_triton

# (queries, keys, stages, warps) per architecture and head dim; for dK, dV also whether full tiles have a loop of their
# own: sizes that fit the card's shared memory and spill no register (tests/test_sm90_compile.py). Those of 90 at 64 and
# 128 were timed on an H200 by `python -m kernels.bench --tune attention` (docs/results/kernels_h200.json).
FORWARD = {80: {64: (64, 64, 2, 4), 128: (64, 64, 2, 4), 256: (64, 32, 2, 4)},
           86: {64: (64, 64, 2, 4), 128: (64, 32, 2, 4), 256: (32, 32, 1, 4)},
           90: {64: (64, 64, 3, 4), 128: (64, 64, 3, 4), 256: (128, 32, 2, 8)}}
DQ = {80: {64: (64, 64, 2, 4), 128: (64, 64, 2, 4), 256: (64, 32, 2, 4)},
      86: {64: (64, 64, 2, 4), 128: (64, 32, 2, 4), 256: (32, 32, 1, 4)},
      90: {64: (64, 64, 3, 4), 128: (64, 32, 3, 4), 256: (128, 32, 2, 8)}}
DKV = {80: {64: (32, 64, 2, 4, 0), 128: (32, 64, 2, 8, 0), 256: (16, 32, 2, 4, 0)},
       86: {64: (32, 64, 2, 4, 0), 128: (32, 32, 2, 4, 0), 256: (16, 32, 1, 4, 0)},
       90: {64: (32, 64, 2, 4, 1), 128: (32, 64, 3, 4, 0), 256: (16, 32, 2, 4, 0)}}
SHORT = 256         # on a CPU the definition is the faster one up to here (docs/LOG.md)


class Spans(NamedTuple):
    """Which keys a query sees and which queries see a key, int32; a leading 1 instead of B: the same in every row."""
    lo: Tensor          # (B, T) first key
    hi: Tensor          # (B, T) one behind the last key
    first: Tensor       # (B, S) first query
    last: Tensor        # (B, S) one behind the last query
    plain: bool         # nothing but causal: a library does that
    ahead: bool         # some token sees later ones


def spans(length: int, queries: int | None = None, docs: Tensor | None = None, prefix: Tensor | int | None = None,
          window: int | None = None, causal: bool = True, device: torch.device | str = "cpu",
          context: Tensor | None = None) -> Spans:
    """S keys, of which the last T are the queries. docs (B, S) is model.py's mask: 0 padding (it sees itself), equal
    numbers side by side one document. prefix: tokens at a document's start that all see each other, (B,) or (B, S);
    context (B, S) marks them instead.

        docs [[0, 1, 1, 1, 2, 2]], prefix 2      lo [[0, 1, 1, 1, 4, 4]]      hi [[1, 3, 3, 4, 6, 6]]"""
    S, T = length, length if queries is None else queries
    device = device if docs is None else docs.device
    index = torch.arange(S, device=device)[None]
    if docs is None:
        start, end = torch.zeros_like(index), torch.full_like(index, S)
    else:
        new = F.pad((docs[:, 1:] != docs[:, :-1]) | (docs[:, 1:] == 0), (1, 0), value=True)
        start = torch.where(new, index, 0).cummax(1).values
        ends = F.pad(torch.where(new, index, S)[:, 1:], (0, 1), value=S)     # where the next document begins
        end = ends.flip(1).cummin(1).values.flip(1)
    hi = index + 1 if causal else end
    if prefix is not None:
        prefix = torch.as_tensor(prefix, device=device)
        prefix = prefix[:, None] if prefix.dim() == 1 else prefix
        hi = torch.maximum(hi, torch.minimum(start + prefix, end))
    if context is not None:                                                  # up to the next token outside the context
        stop = torch.where(context, S, index).flip(1).cummin(1).values.flip(1)
        hi = torch.where(context, torch.minimum(stop, end), hi)
    lo = start if window is None else torch.maximum(start, index - window + 1)
    rows = max(len(lo), len(hi))
    lo, hi = (x.expand(rows, S)[:, S - T:].contiguous() for x in (lo, hi))
    keys = index.expand(rows, S).contiguous()
    first, last = torch.searchsorted(hi, keys, right=True), torch.searchsorted(lo, keys, right=True)
    ahead = not causal or prefix is not None or context is not None
    plain = not ahead and docs is None and window is None and T == S
    return Spans(*(x.to(torch.int32) for x in (lo, hi, first, last)), plain, ahead)


# ---------------------------------------------------------------- the definition

def ref_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, slopes: Tensor | None = None, softcap: float = 0.0,
                  scale: float | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D), H a multiple of K, slopes (H,) -> (B, H, T, D). A query that sees nothing
    gives 0. The G heads that share a key head are rows of one product: no key is copied."""
    B, H, T, D = q.shape
    K, S, G = k.shape[1], k.shape[2], H // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.reshape(B, K, G * T, D) @ k.transpose(2, 3)).view(B, H, T, S).to(wide)
    scores = scores * (D ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys = torch.arange(S, device=q.device)
    if slopes is not None:
        distance = (torch.arange(S - T, S, device=q.device)[:, None] - keys).clamp(min=0)
        scores = scores - slopes.to(wide)[:, None, None] * distance
    hidden = (keys < spans.lo[..., None]) | (keys >= spans.hi[..., None])                                # (B, T, S)
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    p = scores.softmax(-1).masked_fill((spans.lo >= spans.hi)[:, None, :, None], 0.0)
    return (p.to(v.dtype).view(B, K, G * T, S) @ v).view(B, H, T, D)


# ---------------------------------------------------------------- tiles

@triton.jit
def load_tile(X, stride, start, limit, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows start .. start + BM of a (length, D) matrix as (BM, BD), zeros behind D. Rows behind the last one repeat it:
    what is made of them is masked later, and a load without a mask takes fewer registers. The offsets within a tile
    are the same for all tiles: a loop moves one pointer."""
    dims, rows = tl.arange(0, BD), tl.arange(0, BM)
    if BOUNDED:
        rows = tl.minimum(rows, limit - 1 - start)
    at = X + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if BD != D:
        return tl.load(at, mask=dims[None, :] < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tile(X, stride, start, limit, x, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    dims, rows = tl.arange(0, BD), tl.arange(0, BM)
    tl.store(X + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + dims[None, :]),
             x.to(X.dtype.element_ty), mask=(rows[:, None] < limit - start) & (dims[None, :] < D))


@triton.jit
def score_tile(a, b, rows, columns, scale, cap, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, AHEAD: tl.constexpr):
    """Scores in base 2, and tanh's value, of which the backward makes its derivative. a = q, b = k, or the tile on its
    side, a = k, b = q. rows, columns: slope times position, counted from the block's first one. ALiBi's penalty
    -slope max(t - s, 0) is slope min(t, s) without a term that a whole row shares, and where nobody looks ahead
    slope s: one addition, no integer in the loop. The row's term goes into its log-sum-exp."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee") * scale
    t = s
    if HAS_CAP:
        t = tanh(s)
        s = t * cap
    if HAS_SLOPES:
        s += tl.minimum(rows, columns) if AHEAD else columns
    return s, t


@triton.jit
def ranges(first_low, last_low, first_high, last_high, BLOCK: tl.constexpr):
    """From the bounds of a block's first and last row (drawn above): where partial tiles begin, how many there are on
    the left; the first full tile and their number; where partial ones go on, and how many there are in all."""
    begin = first_low // BLOCK * BLOCK
    inner = tl.minimum((last_low + BLOCK - 1) // BLOCK * BLOCK, tl.maximum(last_high, begin))
    outer = tl.maximum(first_high // BLOCK * BLOCK, inner)
    left = (inner - begin + BLOCK - 1) // BLOCK
    partial = left + tl.maximum(last_high - outer + BLOCK - 1, 0) // BLOCK
    return begin, left, inner, (outer - inner) // BLOCK, outer, partial


@triton.jit
def tile_start(i, begin, left, outer, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    """Of tile i of the full ones, or of the partial ones on both sides: one loop for each kind."""
    if PARTIAL:
        return tl.where(i < left, begin, outer - left * BLOCK) + i * BLOCK
    else:
        return begin + i * BLOCK


@triton.jit
def forward_tiles(acc, peak, total, q, K, V, kt, vt, lo, hi, begin, left, outer, count, anchor, up, slope, S, scale,
                  cap, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_CAP: tl.constexpr,
                  HAS_SLOPES: tl.constexpr, AHEAD: tl.constexpr, PARTIAL: tl.constexpr):
    """The online softmax: what was summed so far shrinks whenever a larger score appears."""
    for i in range(count):
        start = tile_start(i, begin, left, outer, BN, PARTIAL)
        columns = start + tl.arange(0, BN)
        k = load_tile(K, kt, start, S, D, BD, BN, PARTIAL)
        PLAIN: tl.constexpr = not (HAS_CAP or HAS_SLOPES)                    # the scale is then part of exp2's argument
        across = (columns - anchor).to(tl.float32) * slope
        s, _ = score_tile(q, k, up[:, None], across[None, :], 1.0 if PLAIN else scale, cap, HAS_CAP, HAS_SLOPES, AHEAD)
        if PARTIAL:
            s = tl.where((columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None]), s, -float("inf"))
        factor = scale if PLAIN else 1.0
        new = tl.maximum(peak, tl.max(s, 1) * factor)
        safe = tl.where(new == -float("inf"), 0.0, new) if PARTIAL else new  # a row that has not seen a key yet
        p = tl.exp2(s * factor - safe[:, None])
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(V, vt, start, S, D, BD, BN, PARTIAL)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new
    return acc, peak, total


@triton.jit
def forward_kernel(Q, K, V, OUT, LSE, LO, HI, SLOPES, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, span, H, G, T, S,
                   scale, cap, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, AHEAD: tl.constexpr):
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM                    # long rows first: they end together
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)
    rows = m0 + tl.arange(0, BM)
    final = tl.minimum(m0 + BM, T) - 1
    LO, HI = LO + b * span, HI + b * span
    lo, hi = tl.load(LO + tl.minimum(rows, final)), tl.load(HI + tl.minimum(rows, final))
    slope = tl.load(SLOPES + h) * 1.4426950408889634 if HAS_SLOPES else 0.0
    up, anchor = tl.arange(0, BM).to(tl.float32) * slope, m0 + S - T
    q = load_tile(Q + b * qb + h * qh, qt, m0, T, D, BD, BM, True)
    K, V = K + b * kb + (h // G) * kh, V + b * vb + (h // G) * vh
    begin, left, inner, full, outer, partial = ranges(tl.load(LO + m0), tl.load(LO + final), tl.load(HI + m0),
                                                      tl.load(HI + final), BN)
    acc = tl.zeros((BM, BD), tl.float32)
    peak, total = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc, peak, total = forward_tiles(acc, peak, total, q, K, V, kt, vt, lo, hi, inner, 0, 0, full, anchor, up, slope, S,
                                     scale, cap, D, BD, BN, HAS_CAP, HAS_SLOPES, AHEAD, False)
    acc, peak, total = forward_tiles(acc, peak, total, q, K, V, kt, vt, lo, hi, begin, left, outer, partial, anchor, up,
                                     slope, S, scale, cap, D, BD, BN, HAS_CAP, HAS_SLOPES, AHEAD, True)
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    store_tile(OUT + b * ob + h * oh, ot, m0, T, out, D, BD, BM)
    # +inf where nothing was seen: the backward's exp2(s - lse) is then 0 by itself
    lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)) - up, float("inf"))
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + rows, lse, mask=rows < T)


@triton.jit
def gradient_tile(a, b, c, d, lse, delta, rows, columns, index, low, high, scale, cap, HAS_CAP: tl.constexpr,
                  HAS_SLOPES: tl.constexpr, AHEAD: tl.constexpr, PARTIAL: tl.constexpr):
    """p and d loss / d (q.k * scale) of one tile, made again from q, k and the row's log-sum-exp; c, d = do, v. On its
    side (see score_tile) where the next product needs the transpose: turning p around would cost its registers."""
    s, t = score_tile(a, b, rows, columns, scale, cap, HAS_CAP, HAS_SLOPES, AHEAD)
    p = tl.exp2(s - lse)
    if PARTIAL:
        p = tl.where((index >= low) & (index < high), p, 0.0)
    ds = p * (tl.dot(c, tl.trans(d), input_precision="ieee") - delta)
    if HAS_CAP:
        ds *= 1 - t * t
    return p, ds


@triton.jit
def dq_tiles(dq, q, do, lse, delta, K, V, kt, vt, lo, hi, begin, left, outer, count, anchor, up, slope, S, scale, cap,
             D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
             AHEAD: tl.constexpr, PARTIAL: tl.constexpr):
    for i in range(count):
        start = tile_start(i, begin, left, outer, BN, PARTIAL)
        columns = start + tl.arange(0, BN)
        k = load_tile(K, kt, start, S, D, BD, BN, PARTIAL)
        v = load_tile(V, vt, start, S, D, BD, BN, PARTIAL)
        across = (columns - anchor).to(tl.float32) * slope
        _, ds = gradient_tile(q, k, do, v, lse[:, None], delta[:, None], up[:, None], across[None, :], columns[None, :],
                              lo[:, None], hi[:, None], scale, cap, HAS_CAP, HAS_SLOPES, AHEAD, PARTIAL)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(Q, K, V, OUT, DO, LSE, DELTA, DQ, LO, HI, SLOPES, qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, ob, oh,
              ot, xb, xh, xt, span, H, G, T, S, scale, cap, factor, D: tl.constexpr, BD: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
              AHEAD: tl.constexpr):
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)
    rows = m0 + tl.arange(0, BM)
    final = tl.minimum(m0 + BM, T) - 1
    LO, HI = LO + b * span, HI + b * span
    lo, hi = tl.load(LO + tl.minimum(rows, final)), tl.load(HI + tl.minimum(rows, final))
    slope = tl.load(SLOPES + h) * 1.4426950408889634 if HAS_SLOPES else 0.0
    up, anchor = tl.arange(0, BM).to(tl.float32) * slope, m0 + S - T
    row = tl.program_id(1).to(tl.int64) * T + rows
    lse = tl.load(LSE + row, mask=rows < T, other=float("inf")) + up
    q = load_tile(Q + b * qb + h * qh, qt, m0, T, D, BD, BM, True)
    do = load_tile(DO + b * gb + h * gh, gt, m0, T, D, BD, BM, True)
    o = load_tile(OUT + b * ob + h * oh, ot, m0, T, D, BD, BM, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)                  # what the softmax's derivative subtracts
    tl.store(DELTA + row, delta, mask=rows < T)                              # for dK, whose kernel comes next
    K, V = K + b * kb + (h // G) * kh, V + b * vb + (h // G) * vh
    begin, left, inner, full, outer, partial = ranges(tl.load(LO + m0), tl.load(LO + final), tl.load(HI + m0),
                                                      tl.load(HI + final), BN)
    dq = tl.zeros((BM, BD), tl.float32)
    dq = dq_tiles(dq, q, do, lse, delta, K, V, kt, vt, lo, hi, inner, 0, 0, full, anchor, up, slope, S, scale, cap, D,
                  BD, BN, HAS_CAP, HAS_SLOPES, AHEAD, False)
    dq = dq_tiles(dq, q, do, lse, delta, K, V, kt, vt, lo, hi, begin, left, outer, partial, anchor, up, slope, S, scale,
                  cap, D, BD, BN, HAS_CAP, HAS_SLOPES, AHEAD, True)
    store_tile(DQ + b * xb + h * xh, xt, m0, T, dq * factor, D, BD, BM)


@triton.jit
def dkv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, qh, qt, gh, gt, first, last, begin, left, outer, count, G, T,
              across, anchor, scale, cap, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_CAP: tl.constexpr,
              HAS_SLOPES: tl.constexpr, AHEAD: tl.constexpr, PARTIAL: tl.constexpr):
    for i in range(G * count):                                               # the G heads that share these keys, flat
        h = (i // count).to(tl.int64)
        start = tile_start(i % count, begin, left, outer, BM, PARTIAL)
        q = load_tile(Q + h * qh, qt, start, T, D, BD, BM, PARTIAL)
        do = load_tile(DO + h * gh, gt, start, T, D, BD, BM, PARTIAL)
        rows = start + tl.arange(0, BM)
        row = h * T + (tl.minimum(rows, T - 1) if PARTIAL else rows)
        slope = tl.load(SLOPES + h) * 1.4426950408889634 if HAS_SLOPES else 0.0
        up = (rows - anchor).to(tl.float32) * slope
        p, ds = gradient_tile(k, q, v, do, (tl.load(LSE + row) + up)[None, :], tl.load(DELTA + row)[None, :],
                              up[None, :], (across * slope)[:, None], rows[None, :], first[:, None], last[:, None],
                              scale, cap, HAS_CAP, HAS_SLOPES, AHEAD, PARTIAL)                           # (BN, BM)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, FIRST, LAST, SLOPES, qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt,
               xb, xh, xt, span, H, G, T, S, scale, cap, factor, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, AHEAD: tl.constexpr,
               SPLIT: tl.constexpr):
    n0 = tl.program_id(0) * BN                                               # the first keys are seen most: they start
    kv_heads = H // G
    b, head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)
    columns = n0 + tl.arange(0, BN)
    final = tl.minimum(n0 + BN, S) - 1
    FIRST, LAST = FIRST + b * span, LAST + b * span
    first, last = tl.load(FIRST + tl.minimum(columns, final)), tl.load(LAST + tl.minimum(columns, final))
    begin, left, inner, full, outer, partial = ranges(tl.load(FIRST + n0), tl.load(FIRST + final), tl.load(LAST + n0),
                                                      tl.load(LAST + final), BM)
    k = load_tile(K + b * kb + head * kh, kt, n0, S, D, BD, BN, True)
    v = load_tile(V + b * vb + head * vh, vt, n0, S, D, BD, BN, True)
    Q, DO = Q + b * qb + head * G * qh, DO + b * gb + head * G * gh
    LSE, DELTA = LSE + (b * H + head * G) * T, DELTA + (b * H + head * G) * T
    SLOPES += head * G
    across, anchor = tl.arange(0, BN).to(tl.float32), n0 - S + T
    dk, dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    if SPLIT:
        dk, dv = dkv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, qh, qt, gh, gt, first, last, inner, 0, 0, full, G,
                           T, across, anchor, scale, cap, D, BD, BM, HAS_CAP, HAS_SLOPES, AHEAD, False)
        dk, dv = dkv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, qh, qt, gh, gt, first, last, begin, left, outer,
                           partial, G, T, across, anchor, scale, cap, D, BD, BM, HAS_CAP, HAS_SLOPES, AHEAD, True)
    else:                                                                    # all as partial ones: fewer registers
        count = tl.maximum(tl.load(LAST + final) - begin + BM - 1, 0) // BM
        dk, dv = dkv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, qh, qt, gh, gt, first, last, begin, count, 0, count,
                           G, T, across, anchor, scale, cap, D, BD, BM, HAS_CAP, HAS_SLOPES, AHEAD, True)
    store_tile(DK + b * xb + head * xh, xt, n0, S, dk * factor, D, BD, BN)
    store_tile(DV + b * xb + head * xh, xt, n0, S, dv, D, BD, BN)


# ---------------------------------------------------------------- launch

def launch(table: dict, x: Tensor) -> dict:
    """Tile sizes for x's card and head dim. fp32 has no tensor cores: a quarter of the rows, more threads."""
    queries, keys, stages, warps, *split = tiles(table, architecture(x), x.shape[-1])
    if x.element_size() == 4:
        queries, keys, stages, warps = max(16, queries // 4), max(16, keys // 4), 1, 8
    return {"D": x.shape[-1], "BD": power_of_two(max(16, x.shape[-1])), "BM": queries, "BN": keys,
            "num_stages": stages, "num_warps": warps, **({"SPLIT": bool(split[0])} if split else {})}


def by_token(B: int, H: int, T: int, D: int, like: Tensor) -> Tensor:
    """(B, H, T, D) whose memory is (B, T, H, D): what the next product reads without a copy."""
    return torch.empty(B, T, H, D, device=like.device, dtype=like.dtype).transpose(1, 2)


def rows_are_dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels take any strides but one: the numbers of a head must lie side by side, as they do by themselves."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans, slopes, softcap, scale):
        q, k, v = rows_are_dense(q, k, v)
        (B, H, T, D), K, S = q.shape, k.shape[1], k.shape[2]
        out, lse = by_token(B, H, T, D, q), torch.empty(B * H, T, device=q.device, dtype=torch.float32)
        slopes = slopes if slopes is None else slopes.to(q.device, torch.float32).contiguous()
        inside, cap = (scale / softcap, softcap * LOG2E) if softcap else (scale * LOG2E, 0.0)
        flags = {"HAS_CAP": softcap > 0, "HAS_SLOPES": slopes is not None,
                 "AHEAD": spans.ahead and slopes is not None}                # asked of ALiBi only: fewer versions
        span = T if len(spans.lo) > 1 else 0                                 # one row of bounds serves every row
        plan = launch(FORWARD, q)
        forward_kernel[(-(-T // plan["BM"]), B * H)](
            q, k, v, out, lse, spans.lo, spans.hi, lse if slopes is None else slopes, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *out.stride()[:3], span, H, H // K, T, S, float(inside), float(cap), **flags, **plan)
        ctx.save_for_backward(q, k, v, out, lse, slopes, *spans[:4])
        ctx.numbers = inside, cap, scale, span, flags
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, out, lse, slopes, lo, hi, first, last = ctx.saved_tensors
        inside, cap, scale, span, flags = ctx.numbers
        do, = rows_are_dense(do)
        (B, H, T, D), K, S = q.shape, k.shape[1], k.shape[2]
        delta = torch.empty_like(lse)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
        slopes = lse if slopes is None else slopes
        dq, dk, dv = by_token(B, H, T, D, q), by_token(B, K, S, D, k), by_token(B, K, S, D, v)
        numbers = (H, H // K, T, S, float(inside), float(cap), float(scale))
        plan = launch(DQ, q)
        dq_kernel[(-(-T // plan["BM"]), B * H)](
            q, k, v, out, do, lse, delta, dq, lo, hi, slopes, *strides, *out.stride()[:3], *dq.stride()[:3], span,
            *numbers, **flags, **plan)
        plan = launch(DKV, q)
        dkv_kernel[(-(-S // plan["BN"]), B * K)](
            q, k, v, do, lse, delta, dk, dv, first, last, slopes, *strides, *dk.stride()[:3], S if span else 0,
            *numbers, **flags, **plan)
        return dq, dk, dv, None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, slopes: Tensor | None = None, softcap: float = 0.0,
              scale: float | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D) of any strides -> (B, H, T, D); slopes (H,) and scale at least 0. Plain
    causal attention goes to the library: nobody beats it there with a kernel that can be read."""
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads cannot share {k.shape[1]} key heads evenly")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    library = spans.plain and slopes is None and not softcap and (q.is_cuda or q.shape[2] > SHORT)
    if library and choice() != "triton":
        if not q.is_cuda:                                                    # a CPU is slow with shared heads
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.is_cuda)
    if use_triton(q):
        return Attention.apply(q, k, v, spans, slopes, softcap, scale)
    return ref_attention(q, k, v, spans, slopes, softcap, scale)


def flops(spans: Spans, batch: int, heads: int, dim: int, backward: bool = False) -> int:
    """Of the pairs that are seen, whatever a kernel computes beside them."""
    pairs = int((spans.hi - spans.lo).sum()) * (batch // len(spans.lo))
    return pairs * heads * dim * (14 if backward else 4)
