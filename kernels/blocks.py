"""Attention on a CPU: softmax(scale q k^T + bias) v in blocks of queries, memory linear in the length.

    each block of queries:  s = scale q k^T + bias     p = softmax(s)     o = p v
    backward, p again:      dv += p^T do     ds = p (do v^T - rowsum(do o))     dq = scale ds k     dk += scale ds^T q

        queries  0..127   |##..............|      # computed   . left out: nobody looks ahead, so a block asks only
               128..255   |####............|      the keys up to its own last query, and half of the square is never
               256..383   |######..........|      touched

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


def spans(T: int, S: int, ahead: bool) -> list[tuple[slice, int]]:
    """The queries of each block, and how many keys they ask; ahead: a query may see keys behind it, so all ask all.
    300 queries of 310 keys -> (0:128, 138), (128:256, 266), (256:300, 310)"""
    return [(slice(i, min(i + BLOCK, T)), S if ahead else S - T + min(i + BLOCK, T)) for i in range(0, T, BLOCK)]


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
    def forward(ctx, q, k, v, bias, scale, ahead):
        k, v = k.contiguous(), v.contiguous()          # or every product would copy them, transposed number by number
        out = torch.empty_like(q)                      # with q's strides: o_proj reads (B, T, H D) as it lies
        for rows, end in spans(q.shape[2], k.shape[2], ahead):
            probs = probabilities(q[:, :, rows], k[:, :, :end], None if bias is None else bias[:, :, rows, :end], scale)
            out[:, :, rows] = (probs.to(v.dtype) @ v[:, :, :end]).view_as(q[:, :, rows])
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale, ctx.ahead = scale, ahead
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, bias, out = ctx.saved_tensors
        K, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows, end in spans(q.shape[2], k.shape[2], ctx.ahead):
            ask, keys, do = fold(q[:, :, rows], K), k[:, :, :end], fold(dout[:, :, rows], K)
            probs = probabilities(q[:, :, rows], keys, None if bias is None else bias[:, :, rows, :end], ctx.scale)
            dv[:, :, :end] += probs.to(v.dtype).transpose(2, 3) @ do
            delta = (do.to(wide) * fold(out[:, :, rows], K)).sum(-1, keepdim=True)             # (B, K, G n, 1)
            ds = (do @ v[:, :, :end].transpose(2, 3) - delta).mul_(probs).to(q.dtype)
            dq[:, :, rows] = (ds @ keys).mul_(ctx.scale).view_as(q[:, :, rows])
            dk[:, :, :end] += ds.transpose(2, 3) @ ask
        return dq, dk.mul_(ctx.scale).to(k.dtype), dv.to(v.dtype), None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, ahead: bool = True) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D), bias (B, 1 or H, T, S) or None: causal -> (B, H, T, D). ahead=False is a
    promise: bias lets no query see a key behind it."""
    # Under autocast RoPE has made fp32 of q and k.
    return Blocks.apply(q.to(v.dtype), k.to(v.dtype), v, bias, scale, ahead and bias is not None)
