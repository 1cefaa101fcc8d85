"""Generalised advantage estimation as a scan: R steps in the depth of log R (Schulman et al. 2016, arXiv 1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lambda A_{t+1}          returns_t = A_t + V_t

The recurrence is A_t = a_t A_{t+1} + b_t, with a = gamma lambda and b = delta, both 0 under padding. Two steps in a
row are again such a step: (a, b) after (a', b') is (a a', a b' + b). That is associative, so neighbours are joined in
pairs:

    t         0     1     2     3     4     5     6     7            a program owns a row; longer rows than BLOCK are
              `--+--'     `--+--'     `--+--'     `--+--'            walked from the right, with A of the block behind
                 `-----------+'          `-----------+'              as the carry
                             `-----------------------'

Bytes: rewards, values and mask once, two results. A Python loop over t launches five kernels for each of R tokens.
"""
from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import power_of_two, tl, triton, use_triton

BLOCK = 2048


def ref_gae(*inputs) -> tuple[Tensor, Tensor]:
    """The definition stands where it is read, in ppo.py, which asks for the kernel: so it is imported late."""
    import ppo
    return ppo.gae(*inputs)


@triton.jit
def join(a, b, c, d):
    """The step (c, d) before the step (a, b) in the order of the scan, which runs from the right."""
    return a * c, c * b + d


@triton.jit
def gae_kernel(REWARDS, VALUES, MASK, ADVANTAGES, RETURNS, rs, vs, ms, R, gamma, decay, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gamma, decay = tl.cast(gamma, tl.float32), tl.cast(decay, tl.float32)
    blocks = (R + BLOCK - 1) // BLOCK
    carry = 0.0
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        here, behind = t < R, t + 1 < R
        mask = tl.load(MASK + row * ms + t, mask=here, other=0).to(tl.float32)
        later_mask = tl.load(MASK + row * ms + t + 1, mask=behind, other=0).to(tl.float32)
        v = tl.load(VALUES + row * vs + t, mask=here, other=0.0).to(tl.float32) * mask
        later_v = tl.load(VALUES + row * vs + t + 1, mask=behind, other=0.0).to(tl.float32) * later_mask
        r = tl.load(REWARDS + row * rs + t, mask=here, other=0.0).to(tl.float32)
        a, b = tl.associative_scan((decay * mask, (r + gamma * later_v - v) * mask), 0, join, reverse=True)
        advantage = a * carry + b
        tl.store(ADVANTAGES + row * R + t, advantage, mask=here)
        tl.store(RETURNS + row * R + t, (advantage + v) * mask, mask=here)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, advantage, 0.0), 0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """ref_gae; in fp32 where the kernel runs. Rows may be strided, the numbers of a row lie side by side."""
    if not use_triton(rewards) or not rewards.numel():
        return ref_gae(rewards, values, mask, gamma, lam)
    (B, R), tensors = rewards.shape, [x if x.stride(1) == 1 else x.contiguous() for x in (rewards, values, mask)]
    advantages, returns = torch.empty(2, B, R, device=rewards.device, dtype=torch.float32)
    block = min(BLOCK, power_of_two(R))
    gae_kernel[(B,)](*tensors, advantages, returns, *(x.stride(0) for x in tensors), R, float(gamma),
                     float(gamma * lam), BLOCK=block, num_warps=max(1, min(8, block // 256)))
    return advantages.to(rewards.dtype), returns.to(rewards.dtype)


def traffic(B: int, R: int) -> int:
    """Bytes that must move, fp32 with a mask of int64."""
    return B * R * (4 * 4 + 8)
