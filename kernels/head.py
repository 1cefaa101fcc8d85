"""The head and its loss in one piece: the (tokens, vocabulary) matrix of logits never exists as a whole.

    z = cap * tanh(h W^T / cap) / temperature        logits of N tokens (cap 0: no tanh)                     (N, V)
    lse_i = log sum_v exp z_iv                       log p_i = z_i[t_i] - lse_i         H_i = lse_i - sum_v p_iv z_iv
    cross-entropy   L = sum_i w_i (-log p_i)                                             dL/dlog p_i = -w_i
    clipped PPO     L = sum_i w_i max(-A rho, -A clip(rho, 1-e, 1+e)),  rho = p_i / p_old     = -w_i A rho or 0
    both            dL/dz_iv = dL/dlog p_i * ([v = t_i] - p_iv)      dh = dz W      dW = dz^T h

Every loss of a token is a function of its own log-probability: once the row's sum is known, so is its gradient. A
chunk of rows is therefore finished in one go, while its logits are still there, and the backward pass only multiplies:

              V = 128k
        +------------------+
    h   | chunk of logits  |  1. logits = h W^T                 the library's matrix product        2 NHV FLOPs
    N   +------------------+  2. the row kernel, in place: logits become gradients, two passes over each row
        |   next chunk     |  3. dh = dz W                                                          2 NHV
        |       ...        |  4. dW += dz^T h, summed in fp32 (one chunk: the product's own sum)    2 NHV
        +------------------+
    one program of the kernel:   row  [ block | block | block | ... ]   pass 1: max, sum, entropy;   pass 2: gradient

FLOPs: 2 NHV to look, 4 NHV to train below a frozen head (LoRA), 6 NHV with dW; a method that computes the logits again
in its backward pass needs 2 NHV more. Bytes beside the products': the row kernel reads a logit twice, writes it once.
Memory: one chunk (BUDGET), dh, and dW in fp32. Rounding the dW of each chunk to bf16 would be cheaper and wrong: small
gradients are then lost in the sum.

The plain log-probability is a function too: below a frozen head its dh is known up to one factor per row, so that
log-probs can be differentiated through any loss (DPO, GRPO, PPO) for the same 4 NHV. With dW the products are repeated.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import power_of_two, tanh, tl, triton, use_triton

# Bytes of logits in a chunk. GPU: large, because every chunk reads and writes all of dW once more. CPU: what stays in
# the last-level cache between the product, the row pass and the two products of the backward.
BUDGET = {"cuda": 1 << 30, "cpu": 12 << 20}


class PPO(NamedTuple):
    """What the clipped loss needs per token (N,), and the width of the clip."""
    old_logp: Tensor
    advantages: Tensor
    clip: float


# ---------------------------------------------------------------- the definition

def squash(logits: Tensor, temperature: float, softcap: float) -> Tensor:
    """Logits as they enter the softmax: in fp32 (float64 stays), capped, then divided by the temperature."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z / temperature if temperature != 1 else z


def ref_linear_logprobs(h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
                        temperature: float = 1.0, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """(N, H), (V, H), (N,) -> log-probabilities and entropies (N,). A target below 0 gives log-probability 0."""
    logp = squash(F.linear(h, weight, bias), temperature, softcap).log_softmax(-1)                       # (N, V)
    picked = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return picked.masked_fill(targets < 0, 0.0), -(logp.exp() * logp).sum(-1)


def ppo_terms(logp: Tensor, ppo: PPO) -> tuple[Tensor, Tensor]:
    """Loss of each token and its derivative by the token's log-probability (PPO eq. 7, the pessimist's max)."""
    ratio = torch.exp(logp - ppo.old_logp)
    plain, clipped = -ppo.advantages * ratio, -ppo.advantages * ratio.clamp(1 - ppo.clip, 1 + ppo.clip)
    return torch.maximum(plain, clipped), torch.where(plain >= clipped, plain, 0.0)


# ---------------------------------------------------------------- a chunk of rows

def rows_torch(logits: Tensor, targets: Tensor, coef: Tensor, ppo: PPO | None, temperature: float, softcap: float,
               grad: bool) -> tuple[Tensor, Tensor]:
    """(n, V) logits -> log-probs, entropies (n,); with grad the logits become coef * dlog p (or coef * dloss of PPO)
    by logits, in place."""
    z = squash(logits, temperature, softcap)
    lse = z.logsumexp(-1)
    here, counted = targets.clamp(min=0)[:, None], targets >= 0
    logp = (z.gather(1, here)[:, 0] - lse) * counted
    p = torch.exp(z - lse[:, None])
    entropy = lse - (p * z).sum(-1)
    if grad:
        c = coef * counted if ppo is None else coef * counted * ppo_terms(logp, ppo)[1]
        dz = p.mul_(-c[:, None]).scatter_add_(1, here, c[:, None])
        if softcap:
            dz *= 1 - (z * (temperature / softcap)).square()               # d tanh, from the capped logit itself
        logits.copy_(dz / temperature if temperature != 1 else dz)
    return logp, entropy


# grad is no constexpr: with and without it the log-probability must come from the same instructions, or PPO's first
# ratio is not exactly 1. (An int argument of 1 would become a constant: hence do_not_specialize.)
@triton.jit(do_not_specialize=["grad"])
def row_kernel(LOGITS, TARGETS, COEF, OLD, ADV, LOGP, ENTROPY, stride, V, clip, temperature, softcap, grad,
               HAS_PPO: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                                      # row * stride may pass 2^31
    base = LOGITS + row * stride
    inverse, cap = 1.0 / tl.cast(temperature, tl.float32), tl.cast(softcap, tl.float32)
    columns = tl.arange(0, BLOCK)
    target = tl.load(TARGETS + row)
    here = tl.maximum(target, 0)
    own = tl.load(base + here).to(tl.float32)
    chosen = (cap * tanh(own / cap) if HAS_CAP else own) * inverse
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)                      # max, sum of exp and of exp * z: one each
    total = tl.zeros((BLOCK,), tl.float32)                                   # per column of the block, joined once at
    moment = tl.zeros((BLOCK,), tl.float32)                                  # the end
    for start in range(0, V, BLOCK):
        z = tl.load(base + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
        z = (cap * tanh(z / cap) if HAS_CAP else z) * inverse
        z = tl.where(start + columns < V, z, -float("inf"))                  # tanh has made a number of what is outside
        new = tl.maximum(peak, z)
        safe = tl.where(new == -float("inf"), 0.0, new)                      # nothing seen yet: exp(-inf - -inf) is NaN
        shrink, e = tl.exp(peak - safe), tl.exp(z - safe)
        total = total * shrink + e
        moment = moment * shrink + tl.where(e > 0, e * z, 0.0)
        peak = new
    top = tl.max(peak, 0)
    shrink = tl.exp(peak - top)
    mass = tl.sum(total * shrink, 0)
    lse = top + tl.log(mass)
    logp = tl.where(target >= 0, chosen - lse, 0.0)
    tl.store(LOGP + row, logp)
    tl.store(ENTROPY + row, lse - tl.sum(moment * shrink, 0) / mass)
    if grad != 0:
        tl.debug_barrier()                                                   # all have read the target: write over it
        c = tl.where(target >= 0, tl.load(COEF + row), 0.0)
        if HAS_PPO:
            adv = tl.load(ADV + row)
            ratio = tl.exp(logp - tl.load(OLD + row))
            bounded = tl.minimum(tl.maximum(ratio, 1 - tl.cast(clip, tl.float32)), 1 + tl.cast(clip, tl.float32))
            c *= tl.where(-adv * ratio >= -adv * bounded, -adv * ratio, 0.0)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            x = tl.load(base + start + columns, mask=inside, other=0.0).to(tl.float32)
            t = tanh(x / cap) if HAS_CAP else x
            z = (cap * t if HAS_CAP else x) * inverse
            dz = c * inverse * ((start + columns == here).to(tl.float32) - tl.exp(z - lse))
            dz = dz * (1 - t * t) if HAS_CAP else dz
            tl.store(base + start + columns, dz.to(LOGITS.dtype.element_ty), mask=inside)


def row_launch(V: int) -> dict:
    """A block is a whole row up to 8,192 logits, 16 numbers a thread: wide loads, and no register spilled."""
    block = min(power_of_two(V), 8192)
    return {"BLOCK": block, "num_warps": max(1, min(32, block // 512)), "num_stages": 1}


def rows_triton(logits: Tensor, targets: Tensor, coef: Tensor, ppo: PPO | None, temperature: float, softcap: float,
                grad: bool) -> tuple[Tensor, Tensor]:
    """rows_torch as one kernel, a program per row."""
    n, V = logits.shape
    logp, entropy = torch.empty(2, n, device=logits.device, dtype=torch.float32)
    old, adv, clip = ppo or PPO(coef, coef, 0.0)
    row_kernel[(n,)](logits, targets, coef, old, adv, logp, entropy, logits.stride(0), V, float(clip),
                     float(temperature), float(softcap), int(grad), HAS_PPO=ppo is not None, HAS_CAP=softcap > 0,
                     **row_launch(V))
    return logp, entropy


# ---------------------------------------------------------------- the loop over chunks

def chunk_rows(n: int, weight: Tensor, want_dw: bool) -> int:
    """Rows of a chunk: the budget's worth of logits, a multiple of 64, at least 64. On a GPU equal chunks, or a single
    one in bf16 if the logits fit into the budget and the room of the sum in fp32, which it does not need."""
    vocabulary, size, gpu = len(weight), weight.element_size(), weight.is_cuda
    budget = BUDGET["cuda" if gpu else "cpu"]
    if gpu and want_dw and weight.dtype == torch.bfloat16 and n * vocabulary * size <= budget + weight.nbytes:
        return n
    rows = max(64, budget // (vocabulary * size) // 64 * 64)
    chunks = max(1, -(-n // rows))
    return max(1, -(-n // chunks) if gpu else min(n, rows))


def add_product(total: Tensor | None, dz: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """total + dz^T h of type dtype. A GPU adds inside the product; a CPU rounds each chunk's product to the dtype of
    its factors (its fast product has no other output) and sums those in fp32."""
    if dz.is_cuda and dz.dtype != dtype:
        if total is None:
            return torch.mm(dz.t(), h, out_dtype=dtype)
        return torch.addmm(total, dz.t(), h, out_dtype=dtype, out=total)
    if total is None:
        return (dz.t() @ h).to(dtype)
    return total.addmm_(dz.t(), h) if dz.dtype == dtype else total.add_(dz.t() @ h)


def sweep(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, coef: Tensor, ppo: PPO | None,
          temperature: float, softcap: float, want: tuple[bool, bool, bool]) -> tuple:
    """All chunks: log-probs, entropies (N,), and where wanted dh, dW, dbias of sum_i coef_i * (log p_i or PPO's loss).
    h and weight have the dtype of the products; dh keeps it, dbias and dW are sums in fp32. In a single chunk the
    product itself sums in fp32, and dW is rounded once there."""
    rows_fn, exact = rows_triton if use_triton(h) else rows_torch, torch.float64 if h.dtype == torch.float64 else None
    n, grad = len(h), any(want)
    sums = exact or torch.float32
    rows = chunk_rows(n, weight, want[1])
    dh = torch.empty_like(h) if want[0] else None
    dW = torch.zeros_like(weight) if want[1] and n == 0 else None
    dbias = torch.zeros(len(weight), device=h.device, dtype=sums) if want[2] else None
    logp, entropy = torch.empty(2, n, device=h.device, dtype=sums)
    for start in range(0, n, rows):
        part = slice(start, min(n, start + rows))
        logits = F.linear(h[part], weight, bias)                             # (rows, V), the only one there is
        terms = PPO(ppo.old_logp[part], ppo.advantages[part], ppo.clip) if ppo else None
        logp[part], entropy[part] = rows_fn(logits, targets[part], coef[part], terms, temperature, softcap, grad)
        if want[0]:
            torch.mm(logits, weight, out=dh[part])
        if want[1]:
            dW = add_product(dW, logits, h[part], weight.dtype if rows == n and weight.is_cuda and
                             weight.dtype == torch.bfloat16 else sums)
        if want[2]:
            dbias += logits.sum(0, dtype=sums)
        del logits
    return logp, entropy, dh, dW, dbias


class Loss(torch.autograd.Function):
    """sum_i w_i loss_i, with the gradients made on the way. They are made for weights w / max w: in fp16 the products
    would vanish with w = 1 / tokens. The backward multiplies by max w and by the incoming gradient, in fp32."""
    @staticmethod
    def forward(ctx, h, weight, bias, targets, w, ppo, temperature, softcap, dtype, grad):
        scale = largest(w)
        need = tuple(ctx.needs_input_grad[:3]) if grad else (False,) * 3
        coef = w / scale if ppo else -w / scale
        logp, entropy, *grads = sweep(h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets,
                                      coef, ppo, temperature, softcap, need)
        ctx.save_for_backward(scale, *grads)
        ctx.dtypes = h.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        losses = ppo_terms(logp, ppo)[0] if ppo else -logp
        ctx.mark_non_differentiable(logp, entropy)
        return (losses * w).sum(), logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        scale, *grads = ctx.saved_tensors
        factor = g * scale
        return *(scaled(x, factor, dtype) for x, dtype in zip(grads, ctx.dtypes)), *[None] * 7


class LogProbs(torch.autograd.Function):
    """log p of each target. Frozen head: dh is made in the forward, up to the factor that each row will be given."""
    @staticmethod
    def forward(ctx, h, weight, bias, targets, temperature, softcap, dtype, grad):
        ctx.settings = temperature, softcap, dtype
        ctx.dtypes = h.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        frozen = not any(ctx.needs_input_grad[1:3])
        ones = torch.ones(len(h), device=h.device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        hd, wd, bd = h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        logp, entropy, dh, _, _ = sweep(hd, wd, bd, targets, ones, None, temperature, softcap,
                                        (grad and frozen and ctx.needs_input_grad[0], False, False))
        ctx.save_for_backward(*((dh,) if frozen else (h, weight, bias, targets)))
        ctx.frozen = frozen
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        if ctx.frozen:
            dh, = ctx.saved_tensors
            return scaled(dh, g[:, None], ctx.dtypes[0]), *[None] * 7
        h, weight, bias, targets = ctx.saved_tensors
        temperature, softcap, dtype = ctx.settings
        scale = largest(g)                                                   # as in Loss: fp16 needs numbers around 1
        _, _, *grads = sweep(h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets,
                             g / scale, None, temperature, softcap, tuple(ctx.needs_input_grad[:3]))
        return *(scaled(x, scale, dtype) for x, dtype in zip(grads, ctx.dtypes)), *[None] * 5


def largest(x: Tensor) -> Tensor:
    return x.abs().max().clamp(min=1e-30) if len(x) else x.new_ones(())


def scaled(x: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """x * factor in fp32, rounded once, in one pass. A factor without dimensions would itself be rounded."""
    if x is None:
        return None
    factor = factor if factor.dim() else factor.view(1)
    return torch.mul(x, factor, out=torch.empty(x.shape, device=x.device, dtype=dtype))


# ---------------------------------------------------------------- what others call

def product_dtype(h: Tensor) -> torch.dtype:
    """Under autocast the products have its dtype, as those of F.linear would."""
    kind = h.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor | None = None,
                         bias: Tensor | None = None, temperature: float = 1.0, softcap: float = 0.0) -> Tensor:
    """(N, H) hidden states, (V, H) head, (N,) targets -> sum_i row_weight_i * -log p(target_i), a scalar in fp32; give
    1 / tokens as row_weight for a mean. A target below 0 does not count."""
    w = weights(h, row_weight)
    grad = torch.is_grad_enabled()
    return Loss.apply(h, weight, bias, targets, w, None, temperature, softcap, product_dtype(h), grad)[0]


def linear_ppo(h: Tensor, weight: Tensor, targets: Tensor, old_logp: Tensor, advantages: Tensor,
               row_weight: Tensor | None = None, clip: float = 0.2, bias: Tensor | None = None,
               temperature: float = 1.0, softcap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped policy loss of (N,) chosen tokens -> loss = sum_i row_weight_i * loss_i, and the new log-probs and
    entropies (N,) without gradient, from which ratio, clip fraction and KL follow."""
    w = weights(h, row_weight)
    ppo = PPO(old_logp.to(w.dtype).contiguous(), advantages.to(w.dtype).contiguous(), clip)
    return Loss.apply(h, weight, bias, targets, w, ppo, temperature, softcap, product_dtype(h), torch.is_grad_enabled())


def linear_logprobs(h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
                    softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """(N, H), (V, H), (N,) -> log p(target) (N,), differentiable, and the entropy (N,), for the log only."""
    return LogProbs.apply(h, weight, bias, targets, temperature, softcap, product_dtype(h), torch.is_grad_enabled())


def weights(h: Tensor, row_weight: Tensor | None) -> Tensor:
    kind = torch.float64 if h.dtype == torch.float64 else torch.float32
    if row_weight is None:
        return torch.ones(len(h), device=h.device, dtype=kind)
    return row_weight.detach().to(h.device, kind).expand(len(h)).contiguous()


def flops(n: int, width: int, vocabulary: int, frozen: bool = False, grad: bool = True) -> int:
    return (2 if not grad else 4 if frozen else 6) * n * width * vocabulary


def logit_bytes(n: int, vocabulary: int, size: int = 2) -> int:
    return math.prod((3, n, vocabulary, size))
