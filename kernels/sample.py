"""Drawing tokens with top-k and top-p, without a sort: what is kept is a threshold, found by halving.

    z = logits / temperature        w_v = exp(z_v - max z)
    keep v      if fewer than k tokens are better,                         #{u: z_u > z_v} < k
    and then    if the better ones that were kept hold less than top_p,    sum {w_u: z_u > z_v} < top_p * sum w
    draw        the first token, in the order of ids, whose running sum of the kept w passes noise * their sum

Both conditions read F(z_v) < limit with a falling F. The bits of a float, with the negative ones turned over, are an
integer that orders as the float does: 32 halvings find the smallest key with F < limit, exactly. Each is one pass:

    program = row     [ block | block | ... ]    max -> (32 passes: count) -> (32 passes: mass) -> sum -> draw
                      the row stays in the cache, 256 KB for 128k bf16 logits; no sorted copy, no order, no scatter

Bytes: the logits once from memory, 67 times at most from the cache. Equal logits at the threshold are all kept.
A row's draw depends on its own noise alone: it gives the same text whoever else is in the batch.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.backend import power_of_two, tl, triton, use_triton

BLOCK = 4096


def ref_sample(logits: Tensor, noise: Tensor, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) noise in [0, 1) -> (B,) ids and their log-probabilities. The definition, with a sort."""
    z = logits.float() / temperature if logits.dtype != torch.float64 else logits / temperature
    best = z.sort(dim=-1, descending=True).values
    if top_k and top_k < z.shape[1]:
        z = z.masked_fill(z < best[:, top_k - 1:top_k], -math.inf)
    w = torch.exp(z - best[:, :1])
    if top_p is not None and top_p < 1:
        order = w.sort(dim=-1, descending=True).values
        mass = order.cumsum(-1)
        stay = (mass - order < top_p * mass[:, -1:]).sum(-1, keepdim=True).clamp(min=1)
        w = w.masked_fill(w < order.gather(1, stay - 1), 0.0)
    heights = w.cumsum(-1)
    total = heights[:, -1:]
    new = torch.minimum(torch.searchsorted(heights, noise[:, None].to(heights.dtype) * total, right=True),
                        (heights < total).sum(-1, keepdim=True))
    return new[:, 0], (w.gather(1, new) / total).log()[:, 0]


@triton.jit
def load_scaled(LOGITS, start, V, inverse, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(LOGITS + columns, mask=columns < V, other=-float("inf")).to(tl.float32) * inverse


@triton.jit
def ordered(z):
    """An int32 that orders as the float does; -0.0 counts as 0.0."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def threshold(LOGITS, V, inverse, peak, floor, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key whose better ones, among those from the key `floor` on, count (or weigh) less than limit."""
    low, high = floor.to(tl.int64) - 1, ordered(peak).to(tl.int64)           # the answer lies in (low, high]
    while high - low > 1:
        middle = (low + high) >> 1
        found = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            z = load_scaled(LOGITS, start, V, inverse, BLOCK)
            better = ordered(z).to(tl.int64) > middle
            found += tl.where(better, tl.exp(z - peak) if MASS else 1.0, 0.0)
        less = tl.sum(found, 0) < limit
        low, high = tl.where(less, low, middle), tl.where(less, middle, high)
    return high.to(tl.int32)


@triton.jit
def sample_kernel(LOGITS, NOISE, IDS, LOGP, stride, V, temperature, top_k, top_p, HAS_K: tl.constexpr,
                  HAS_P: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    inverse = 1.0 / tl.cast(temperature, tl.float32)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        best = tl.maximum(best, load_scaled(LOGITS, start, V, inverse, BLOCK))
    peak = tl.max(best, 0)
    floor = ordered(tl.full((), -3.4028234663852886e38, tl.float32))         # every finite number
    if HAS_K:
        floor = threshold(LOGITS, V, inverse, peak, floor, tl.cast(top_k, tl.float32), False, BLOCK)
    if HAS_P:
        mass = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            z = load_scaled(LOGITS, start, V, inverse, BLOCK)
            mass += tl.where(ordered(z) >= floor, tl.exp(z - peak), 0.0)
        floor = threshold(LOGITS, V, inverse, peak, floor, tl.sum(mass, 0) * tl.cast(top_p, tl.float32), True, BLOCK)
    total = 0.0
    for start in range(0, V, BLOCK):
        z = load_scaled(LOGITS, start, V, inverse, BLOCK)
        total += tl.sum(tl.where(ordered(z) >= floor, tl.exp(z - peak), 0.0), 0)
    target, before = tl.load(NOISE + row).to(tl.float32) * total, 0.0
    new, last = V, 0                                                         # the first that passes; the last possible
    for start in range(0, V, BLOCK):
        z = load_scaled(LOGITS, start, V, inverse, BLOCK)
        columns = start + tl.arange(0, BLOCK)
        w = tl.where(ordered(z) >= floor, tl.exp(z - peak), 0.0)
        passed = (before + tl.cumsum(w, 0) > target) & (w > 0)
        new = tl.minimum(new, tl.min(tl.where(passed, columns, V), 0))
        last = tl.maximum(last, tl.max(tl.where(w > 0, columns, 0), 0))
        before += tl.sum(w, 0)
    new = tl.minimum(new, last)                                              # rounding may leave the sum's end open
    tl.store(IDS + row, new.to(tl.int64))
    tl.store(LOGP + row, tl.load(LOGITS + new).to(tl.float32) * inverse - peak - tl.log(total))


@torch.no_grad()
def sample(logits: Tensor, noise: Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) uniform noise -> (B,) ids and their log-probabilities. top_k 0 or None, top_p 1 or None: all
    tokens. The best token is always kept. NaN in a row gives a NaN log-probability."""
    if not use_triton(logits):
        return ref_sample(logits, noise, temperature, top_k, top_p)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    B, V = logits.shape
    ids, logp = torch.empty(B, device=logits.device, dtype=torch.int64), torch.empty(B, device=logits.device)
    block = min(BLOCK, power_of_two(V))
    sample_kernel[(B,)](logits, noise, ids, logp, logits.stride(0), V, float(temperature), float(top_k or 0),
                        float(max(top_p if top_p is not None else 1.0, 1e-20)), HAS_K=bool(top_k) and top_k < V,
                        HAS_P=top_p is not None and top_p < 1, BLOCK=block, num_warps=max(1, min(16, block // 256)))
    return ids, logp


def traffic(B: int, V: int, size: int = 2) -> int:
    """Bytes that must move."""
    return B * V * size
