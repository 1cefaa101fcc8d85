"""Attention on a CPU: softmax(scale q k^T + bias) v in blocks of queries, memory linear in the length.

    each block of queries:  s = scale q k^T + bias     p = softmax(s)     o = p v
    backward, p again:      dv += p^T do     ds = p (do v^T - rowsum(do o))     dq = scale ds k     dk += scale ds^T q

        queries  0..127   |##..............|      # computed   . left out: a block asks from the first key that any of
               128..255   |.###............|      its queries sees to the last one. Of a long text half of the square is
               256..383   |...###..........|      never touched, of packed texts and of a window nearly all of it

A block of scores stays in the cache, where the whole matrix goes out to memory and back for every elementwise step.
Of the scores nothing is kept for the backward, they are made again (Dao et al. 2022, arXiv 2205.14135, section 3.1).
The G heads that share a key head are rows of one matrix: no key is copied.

Shapes:  B batch   T queries   S keys, of which the last T are the queries   H heads   K key/value heads   D head dim
"""
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128                                # queries at once
LANES = 64                                 # keys are left out in such steps: sums keep their order, and every bit


def spans(bias: Tensor | None, T: int, S: int) -> list[tuple[slice, slice]]:
    """The queries of each block and the keys they ask. 300 queries of 310 keys, no bias: causal
    -> (0:128, 0:138), (128:256, 0:266), (256:300, 0:310)"""
    found = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first, end = 0, S - T + stop
        if bias is not None:               # the keys that anybody sees; a query without any would be an error elsewhere
            seen = (bias[:, :, start:stop].amax((0, 1, 2)) > -math.inf).nonzero()
            first, end = int(seen[0]) // LANES * LANES, int(seen[-1]) + 1
        found.append((slice(start, stop), slice(first, end)))
    return found


def fold(x: Tensor, K: int) -> Tensor:
    """(B, H, T, D) -> (B, K, G T, D): the heads that share a key head, one below the other."""
    return x.reshape(x.shape[0], K, -1, x.shape[-1])


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Of one block: q (B, H, n, D), k (B, K, S, D), bias (B, 1 or H, n, S) -> (B, K, G n, S), at least fp32."""
    (B, H, n, _), (_, K, S, _) = q.shape, k.shape
    scores = (fold(q, K) @ k.transpose(2, 3)).view(B, K, H // K, n, S).mul_(scale)
    if bias is None:                       # causal: only the last n keys can be later than a query of this block
        scores[..., S - n:].masked_fill_(torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1), -math.inf)
    else:
        scores.add_(bias.view(B, -1, max(1, bias.shape[1] // K), n, S))
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).view(B, K, -1, S)


class Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        k, v = k.contiguous(), v.contiguous()          # or every product would copy them, transposed number by number
        out = torch.empty_like(q)                      # with q's strides: o_proj reads (B, T, H D) as it lies
        ctx.scale, ctx.spans = scale, spans(bias, q.shape[2], k.shape[2])
        for rows, keys in ctx.spans:
            probs = probabilities(q[:, :, rows], k[:, :, keys], None if bias is None else bias[:, :, rows, keys], scale)
            out[:, :, rows] = (probs.to(v.dtype) @ v[:, :, keys]).view_as(q[:, :, rows])
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, bias, out = ctx.saved_tensors
        K, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows, keys in ctx.spans:
            ask, k_here, do = fold(q[:, :, rows], K), k[:, :, keys], fold(dout[:, :, rows], K)
            probs = probabilities(q[:, :, rows], k_here, None if bias is None else bias[:, :, rows, keys], ctx.scale)
            dv[:, :, keys] += probs.to(v.dtype).transpose(2, 3) @ do
            delta = (do.to(wide) * fold(out[:, :, rows], K)).sum(-1, keepdim=True)             # (B, K, G n, 1)
            ds = (do @ v[:, :, keys].transpose(2, 3) - delta).mul_(probs).to(q.dtype)
            dq[:, :, rows] = (ds @ k_here).mul_(ctx.scale).view_as(q[:, :, rows])
            dk[:, :, keys] += ds.transpose(2, 3) @ ask
        return dq, dk.mul_(ctx.scale).to(k.dtype), dv.to(v.dtype), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D), bias (B, 1 or H, T, S) or None: causal -> (B, H, T, D)."""
    return Blocks.apply(q.to(v.dtype), k.to(v.dtype), v, bias, scale)          # autocast: RoPE made fp32 of q and k
