"""A mask as the kernels want it: no (T, S) matrix, but the first and the last key of every query, and ALiBi's slopes.

model.py makes the matrix (`attention_bias`, the definition) or, on a GPU, a `Bounds` from the same documents, context
and window; `attend` then takes the kernel that fits: one new token is decode.py's, many are attention.py's.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import attention, decode


class Bounds(NamedTuple):
    spans: attention.Spans
    slopes: Tensor | None                  # (H,), None: no ALiBi

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
        q, options = q.to(v.dtype), (self.slopes, softcap or 0.0, scale)
        if q.shape[2] == 1 and not torch.is_grad_enabled():
            lo, hi = (x[:, 0].expand(len(q)).contiguous() for x in self.spans[:2])
            return decode.decode(q[:, :, 0], k, v, lo, hi, *options)[:, :, None]
        return attention.attention(q, k.to(v.dtype), v, self.spans, *options)

    def for_decoding(self) -> "Bounds":
        """Without what only the backward pass asks for, and what grows with the cache."""
        return self._replace(spans=self.spans._replace(first=None, last=None))


def bounds(docs: Tensor, queries: int, slopes: Tensor | None = None, context: Tensor | None = None,
           window: int | None = None) -> Bounds:
    """docs (B, S) is the mask of all keys, of which the last `queries` ask; context (B, S) is what all may see."""
    spans = attention.spans(docs.shape[1], queries, docs, window=window, context=context)
    return Bounds(spans, None if slopes is None else slopes.to(docs.device))
