"""A linear layer with LoRA adapters as one function: the base product once, whatever the rows of the batch wear.

    y = x W^T + b + scale (d(x) A^T) B^T          d: dropout, on the adapter's path only (Hu et al. 2021, section 4.1)

    rows      0 .. 7  policy  |  8 .. 15  value  |  16 .. 23  reward  |  24 .. 31  reference: no adapter
    y       = [                    one product x W^T over all 32 rows                     ]
    y[part] +=  scale h B^T    |  scale h B^T    |  scale h B^T       |                   h = d(x[part]) A^T, r wide

    backward, W frozen      g = scale dy B      dx = dy W, dx[part] += d(g A)      dA = g^T d(x)      dB = scale dy^T h

FLOPs: 2 N in out forward and again backward, where full training needs 4; an adapter adds r (in + out) / (in out) of
it forward: 0.8 % for r 16 in a 4096 x 4096 layer. What such a layer loses is traffic: plain autograd writes y twice,
adds two gradients of x, and keeps d(x). Here the small products add into y and dx where they lie. Kept: x, h (N, r),
and with dropout one byte a number. W may be in four bits (nf4.py): it is unpacked for each of the two products with it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.head import add_product
from kernels.nf4 import NF4, dense


class Adapter(NamedTuple):
    """Of the rows `rows` of the batch (dim 0 of x). A (r, in), B (out, r): any dtype, used in that of x."""
    A: Tensor
    B: Tensor
    scale: float
    rows: slice = slice(None)


def ref_lora_linear(x: Tensor, weight: Tensor | NF4, bias: Tensor | None, adapters: Sequence[Adapter],
                    masks: Sequence[Tensor | None] = ()) -> Tensor:
    """The definition. masks: what dropout multiplies each adapter's rows of x by; none: 1."""
    out = F.linear(x, dense(weight, x.dtype), bias)
    pieces = []
    for i, (A, B, scale, rows) in enumerate(adapters):
        part = x[rows] * masks[i] if masks and masks[i] is not None else x[rows]
        delta = torch.zeros_like(out)
        delta[rows] = scale * F.linear(F.linear(part, A.to(x.dtype)), B.to(x.dtype))
        pieces.append(delta)
    return out + sum(pieces) if pieces else out


def dropped(x: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    return x if kept is None else torch.where(kept, x * (1 / (1 - dropout)), 0)


class LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dropout, places, scales, *matrices):
        width, rows = x.shape[-1], x.shape[:-1].numel() // max(1, len(x))    # tokens per row of the batch
        flat, saved = x.reshape(-1, width), []
        y = F.linear(flat, dense(weight, x.dtype), bias)
        places = [slice(start * rows, stop * rows) for start, stop in places]
        for place, scale, A, B in zip(places, scales, matrices[::2], matrices[1::2]):
            part = flat[place]
            kept = torch.rand(part.shape, device=x.device) >= dropout if dropout else None
            h = F.linear(dropped(part, kept, dropout), A.to(x.dtype))                                    # (n, r)
            y[place].addmm_(h, B.to(x.dtype).t(), alpha=scale)
            saved += [h, kept]
        constant = isinstance(weight, NF4)                                   # frozen for good: nothing to watch over
        ctx.save_for_backward(flat, None if constant else weight, *matrices, *saved)
        ctx.settings = dropout, places, scales, x.shape, weight if constant else None
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dropout, places, scales, shape, packed = ctx.settings
        x, weight, *rest = ctx.saved_tensors
        n = 2 * len(places)
        matrices, saved, grads = rest[:n], rest[n:], []
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dy @ dense(weight if packed is None else packed, dy.dtype) if ctx.needs_input_grad[0] else None
        for i, (place, scale) in enumerate(zip(places, scales)):
            (A, B), (h, kept) = matrices[2 * i:2 * i + 2], saved[2 * i:2 * i + 2]
            g = (dy[place] @ B.to(dy.dtype)).mul_(scale)                                                 # (n, r)
            if dx is not None and kept is None:
                dx[place].addmm_(g, A.to(dy.dtype))
            elif dx is not None:
                dx[place].add_(dropped(g @ A.to(dy.dtype), kept, dropout))
            wanted = ctx.needs_input_grad[6 + 2 * i:8 + 2 * i]
            grads.append(add_product(None, g, dropped(x[place], kept, dropout), A.dtype) if wanted[0] else None)
            grads.append(add_product(None, dy[place], h, B.dtype).mul_(scale) if wanted[1] else None)
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return None if dx is None else dx.view(shape), None, dbias, None, None, None, *grads


def lora_linear(x: Tensor, weight: Tensor | NF4, bias: Tensor | None, adapters: Sequence[Adapter],
                dropout: float = 0.0) -> Tensor:
    """x (B, ..., in), frozen weight (out, in) -> (B, ..., out). Adapters may not share a row; dropout draws from
    torch's own generator, a new mask in every call."""
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("lora_linear computes no gradient of the base: weight.requires_grad_(False)")
    places = [adapter.rows.indices(len(x))[:2] for adapter in adapters]
    matrices = [m for adapter in adapters for m in adapter[:2]]
    return LoRALinear.apply(x, weight, bias, dropout, places, [a.scale for a in adapters], *matrices)


def flops(n: int, width: int, out: int, r: int, backward: bool = False) -> int:
    """Of the frozen product and one adapter on all rows."""
    return (4 if backward else 2) * n * width * out + (6 if backward else 2) * n * r * (width + out)
