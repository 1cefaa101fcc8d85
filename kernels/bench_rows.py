"""The rows of kernels/bench.py: shapes, random inputs, references in fp32, and each provider's call.

A provider is made from the row's data and returns a step; a step returns its outputs and, in a training row, the
gradients. Imports of peers stand inside the providers: one that is missing is a dash in the table.
"""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, decode, glu, head, norm, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"      # a CPU runs the rows in tests only, much smaller
DIVIDE = 1


class Row(NamedTuple):
    name: str
    flops: float
    bytes: float
    inputs: Callable[[], dict]
    exact: Callable[[dict], tuple] | None
    providers: dict[str, Callable[[dict], Callable]]


def own(data: dict) -> dict:
    """Copies with the same strides: some peers write into their inputs."""
    return {k: v.detach().clone().requires_grad_(v.requires_grad) if torch.is_tensor(v) else v for k, v in data.items()}


def random(*shape: int, seed: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32) * scale
    return x.to(torch.bfloat16).requires_grad_(grad)


def forward(function: Callable, *names: str) -> Callable:
    """A provider that calls function(data[name], ...) without gradients."""
    def make(data: dict) -> Callable:
        def step() -> tuple:
            with torch.no_grad():
                out = function(*(data[n] for n in names))
            return out if isinstance(out, tuple) else (out,)
        return step
    return make


def training(function: Callable, names: str, leaves: str, grads: str) -> Callable:
    """A provider that also differentiates: the outputs, then the gradients of the leaves."""
    def make(data: dict) -> Callable:
        def step() -> tuple:
            out = function(*(data[n] for n in names.split()))
            out = out if isinstance(out, tuple) else (out,)
            given = [data[n] for n in grads.split()] or None
            return *out, *torch.autograd.grad(out, [data[n] for n in leaves.split()], given)
        return step
    return make


def compiled(provider: Callable, function: Callable, *args) -> Callable:
    """The same provider over torch.compile(function); compiling begins when the provider is made."""
    return lambda data: provider(torch.compile(function, dynamic=False), *args)(data)


# ---------------------------------------------------------------- head

def eager_ce(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), targets)


def ours_ce(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return head.linear_cross_entropy(h, w, targets, torch.full((len(h),), 1 / len(h), device=h.device))


def liger_ce(accumulate: torch.dtype | None) -> Callable:
    def function(h, w, targets):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function
        return Function.apply(h, w, targets, None, None, -100, 0.0, 0.0, "mean", None, False, accumulate)[0]
    return function


def trl_logprobs(h: Tensor, w: Tensor, targets: Tensor, outputs: tuple = ()) -> tuple:
    from trl.kernels import ChunkedLogProbFunction
    return ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 32768, None, 1.0, outputs)    # its trainers' chunk


def cce(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy
    return linear_cross_entropy(h, w, targets)


def eager_logprobs(h: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.linear(h, w).float().log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def clipped(logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return head.ppo_terms(logp, head.PPO(old, advantages, 0.2))[0].mean()


def head_data(N: int, H: int, V: int, frozen: bool) -> dict:
    h, w = random(N, H, seed=0), random(V, H, seed=1, scale=0.02, grad=not frozen)
    targets = torch.randint(0, V, (N,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2))
    with torch.no_grad():
        old = torch.cat([head.ref_linear_logprobs(a, w, b)[0] for a, b in zip(h.split(1024), targets.split(1024))])
    return {"h": h, "w": w, "targets": targets, "old": old + random(N, seed=3, scale=0.1, grad=False).float(),
            "advantages": random(N, seed=4, grad=False).float()}


def exact_head(loss: str, frozen: bool) -> Callable:
    """1,024 rows at a time, in fp32."""
    def function(data: dict) -> tuple:
        w, N = data["w"].detach().float().requires_grad_(not frozen), len(data["h"])
        total, logps, entropies, dh = torch.zeros((), device=DEVICE), [], [], []
        for start in range(0, N, 1024):
            part = slice(start, start + 1024)
            h = data["h"][part].detach().float().requires_grad_()
            logp, entropy = head.ref_linear_logprobs(h, w, data["targets"][part])
            one = -logp.sum() / N if loss == "ce" else clipped(logp, data["old"][part], data["advantages"][part]) * \
                len(h) / N
            one.backward()
            total += one.detach()
            dh.append(h.grad)
            logps.append(logp.detach())
            entropies.append(entropy.detach())
        if loss == "logprobs":
            return torch.cat(logps), torch.cat(entropies)
        first = total if loss == "ce" else torch.cat(logps)
        return (first, torch.cat(dh)) if frozen else (first, torch.cat(dh), w.grad)
    return function


def head_rows() -> list[Row]:
    out = []
    for N, H, V, frozen in ((8192, 4096, 128256, False), (8192, 4096, 128256, True), (8192, 4096, 32000, False)):
        N, H, V = N // DIVIDE, H // DIVIDE, V // DIVIDE
        args = ("h w targets", "h" if frozen else "h w", "")
        functions = {"ours": ours_ce, "eager": eager_ce, "liger": liger_ce(None), "liger-fp32": liger_ce(torch.float32),
                     "trl": lambda h, w, t: -trl_logprobs(h, w, t)[0].mean(), "cce": cce}
        providers = {name: training(f, *args) for name, f in functions.items()}
        providers["compile"] = compiled(training, eager_ce, *args)
        out.append(Row(f"head ce {N}x{H}x{V} {'frozen' if frozen else 'trained'}", head.flops(N, H, V, frozen), 0,
                       lambda N=N, H=H, V=V, f=frozen: head_data(N, H, V, f), exact_head("ce", frozen), providers))
    N, H, V = 8192 // DIVIDE, 4096 // DIVIDE, 128256 // DIVIDE

    def ppo(logprobs: Callable) -> Callable:
        def make(data: dict) -> Callable:
            def step() -> tuple:
                logp = logprobs(data["h"], data["w"], data["targets"])
                loss = clipped(logp, data["old"], data["advantages"])
                return logp, *torch.autograd.grad(loss, [data["h"]])
            return step
        return make

    def ours_ppo(data: dict) -> Callable:
        def step() -> tuple:
            loss, logp, _ = head.linear_ppo(data["h"], data["w"], data["targets"], data["old"], data["advantages"],
                                            torch.full((N,), 1 / N, device=DEVICE))
            return logp, *torch.autograd.grad(loss, [data["h"]])
        return step

    out.append(Row(f"head ppo {N}x{H}x{V} frozen", head.flops(N, H, V, True), 0, lambda: head_data(N, H, V, True),
                   exact_head("ppo", True),
                   {"ours": ours_ppo, "trl": ppo(lambda *a: trl_logprobs(*a, ("entropy",))[0]),
                    "eager": ppo(lambda *a: eager_logprobs(*a)[0])}))
    names = ("h", "w", "targets")
    out.append(Row(f"head logprobs {N}x{H}x{V}", head.flops(N, H, V, grad=False), 0, lambda: head_data(N, H, V, True),
                   exact_head("logprobs", True),
                   {"ours": forward(head.linear_logprobs, *names), "eager": forward(eager_logprobs, *names),
                    "trl": forward(lambda *a: trl_logprobs(*a, ("entropy",))[:2], *names)}))
    return out


# ---------------------------------------------------------------- attention

class Shape(NamedTuple):
    B: int
    H: int
    K: int
    T: int
    D: int


def documents(shape: Shape) -> Tensor:
    """Document numbers (B, T): eight uneven documents a row."""
    cuts = torch.tensor([0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.8, 0.85]).mul(shape.T).long()
    docs = torch.zeros(shape.B, shape.T, dtype=torch.int64)
    docs[:, cuts] = 1
    return docs.cumsum(1).to(DEVICE)


def slopes(H: int) -> Tensor:
    return torch.exp2(-8.0 * torch.arange(1, H + 1, device=DEVICE) / H)


class Mask(NamedTuple):
    """One mask, said to everybody in his own language."""
    spans: Callable[[Shape], attention.Spans]
    flex: Callable[[dict], Callable] | None        # mask_mod of FlexAttention
    alibi: bool = False
    softcap: float = 0.0


def causal_mod(data: dict) -> Callable:
    return lambda b, h, t, s: s <= t


def prefix_mod(data: dict) -> Callable:
    length = data["prefix"]
    return lambda b, h, t, s: (s <= t) | (s < length[b])


def docs_mod(data: dict) -> Callable:
    docs = data["docs"]
    return lambda b, h, t, s: (s <= t) & (docs[b, t] == docs[b, s])


MASKS = {"causal": Mask(lambda x: attention.spans(x.T, device=DEVICE), causal_mod),
         "prefix": Mask(lambda x: attention.spans(x.T, prefix=prefixes(x), device=DEVICE), prefix_mod),
         "alibi": Mask(lambda x: attention.spans(x.T, device=DEVICE), causal_mod, alibi=True),
         "prefix+alibi": Mask(lambda x: attention.spans(x.T, prefix=prefixes(x), device=DEVICE), prefix_mod, True),
         "docs": Mask(lambda x: attention.spans(x.T, docs=documents(x)), docs_mod),
         "softcap": Mask(lambda x: attention.spans(x.T, device=DEVICE), causal_mod, softcap=50.0)}


def prefixes(shape: Shape) -> Tensor:
    return torch.linspace(0.2, 0.6, shape.B, device=DEVICE).mul(shape.T).long()


def attention_data(shape: Shape, mask: Mask) -> dict:
    B, H, K, T, D = shape
    q, k, v, do = (random(B, T, heads, D, seed=i, grad=False).transpose(1, 2) for i, heads in enumerate((H, K, K, H)))
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_(), "do": do,
            "spans": mask.spans(shape), "prefix": prefixes(shape), "docs": documents(shape),
            "slopes": slopes(H) if mask.alibi else None, "softcap": mask.softcap}


def exact_attention(data: dict, train: bool) -> tuple:
    """One key head of one row at a time, in fp32."""
    B, H, K = len(data["q"]), data["q"].shape[1], data["k"].shape[1]
    out = [torch.empty_like(data[n], dtype=torch.float32, requires_grad=False) for n in ("q", "q", "k", "v")]
    for b in range(B):
        spans = data["spans"]
        row = attention.Spans(*(x[b:b + 1] if len(x) > 1 else x for x in spans[:4]), *spans[4:])
        for i in range(K):
            at, heads = (slice(b, b + 1), slice(i, i + 1)), slice(i * (H // K), (i + 1) * (H // K))
            q = data["q"][b:b + 1, heads].detach().float().requires_grad_()
            k, v = (data[n][at].detach().float().requires_grad_() for n in ("k", "v"))
            m = data["slopes"] if data["slopes"] is None else data["slopes"][heads]
            o = attention.ref_attention(q, k, v, row, m, data["softcap"])
            out[0][b:b + 1, heads] = o.detach()
            if train:
                o.backward(data["do"][b:b + 1, heads].float())
                out[1][b:b + 1, heads], out[2][at], out[3][at] = q.grad, k.grad, v.grad
    return tuple(out if train else out[:1])


def attention_step(function: Callable, data: dict, train: bool) -> Callable:
    leaves = [data[n] for n in ("q", "k", "v")]

    def step() -> tuple:
        with torch.set_grad_enabled(train):
            out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, data["do"])) if train else (out,)
    return step


def ours_attention(data: dict) -> Callable:
    """The kernel, also for the plain causal mask, which `attention` itself hands to the library."""
    def function(q, k, v):
        os.environ["CHATPIXIU_KERNELS"] = "triton" if q.is_cuda else "torch"
        try:
            return attention.attention(q, k, v, data["spans"], data["slopes"], data["softcap"])
        finally:
            del os.environ["CHATPIXIU_KERNELS"]
    return function


def sdpa(backend: str) -> Callable:
    def make(data: dict) -> Callable:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        def function(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return function
    return make


def sdpa_mask(data: dict) -> Callable:
    """The mask as (B, 1, T, S), ALiBi as a (B, H, T, S) bias; k and v repeated: no fused kernel shares heads."""
    T, spans = data["q"].shape[2], data["spans"]
    keys = torch.arange(T, device=DEVICE)
    mask = ((keys >= spans.lo[..., None]) & (keys < spans.hi[..., None]))[:, None]
    if data["slopes"] is not None:
        bias = -data["slopes"][:, None, None] * (keys[:, None] - keys).clamp(min=0)
        mask = bias[None].masked_fill(~mask, float("-inf")).to(data["q"].dtype)

    def function(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return function


def flex(mask: Mask) -> Callable:
    def make(data: dict) -> Callable:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        B, H, T, _ = data["q"].shape
        block = create_block_mask(mask.flex(data), B, None, T, T, device=DEVICE)
        m, cap = data["slopes"], data["softcap"]

        def alibi(score, b, h, t, s):
            return score - m[h] * (t - s).clamp(min=0)

        def capped(score, b, h, t, s):
            return cap * torch.tanh(score / cap)
        score_mod = alibi if mask.alibi else capped if cap else None
        function = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: function(q, k, v, score_mod=score_mod, block_mask=block,
                                        enable_gqa=q.shape[1] != k.shape[1])
    return make


def attention_rows() -> list[Row]:
    mha, gqa = Shape(4, 32, 32, 2048, 128), Shape(2, 32, 8, 4096, 128)
    small = Shape(8, 32, 32, 1024, 64)
    wanted = [("prefix", mha, True), ("alibi", mha, True), ("docs", gqa, True), ("causal", gqa, True),
              ("causal", gqa, False), ("prefix", mha, False), ("alibi", mha, False), ("docs", gqa, False),
              ("prefix+alibi", gqa, True), ("softcap", gqa, True), ("causal", small, True), ("prefix", small, True),
              ("softcap", Shape(2, 16, 8, 2048, 256), True)]
    out = []
    for name, shape, train in wanted:
        mask, shape = MASKS[name], shape._replace(T=shape.T // DIVIDE)
        makers = {"ours": ours_attention, "flex": flex(mask)}
        if not mask.softcap and name != "causal":
            makers["sdpa+mask"] = sdpa_mask
        if name == "causal":
            makers |= {"sdpa": sdpa(""), "sdpa-flash": sdpa("FLASH_ATTENTION"), "sdpa-cudnn": sdpa("CUDNN_ATTENTION")}
        providers = {n: (lambda data, m=m, train=train: attention_step(m(data), data, train))
                     for n, m in makers.items()}
        B, H, K, T, D = shape
        moved = (4 if train else 1) * B * T * D * (2 * H + 2 * K) * 2
        out.append(Row(f"attention {name} B{B} H{H}/{K} T{T} D{D} {'train' if train else 'forward'}",
                       pairs(shape, name) * H * D * (14 if train else 4), moved,
                       lambda shape=shape, mask=mask: attention_data(shape, mask),
                       lambda data, train=train: exact_attention(data, train), providers))
    return out


def pairs(shape: Shape, name: str) -> float:
    """Pairs (query, key) that the mask shows, counted without a card."""
    B, _, _, T, _ = shape
    if name == "docs":
        ends = [0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.8, 0.85, 1]
        return B * sum(n * (n + 1) / 2 for n in (int(b * T) - int(a * T) for a, b in zip(ends, ends[1:])))
    extra = 0.0
    if name.startswith("prefix"):
        lengths = [int((0.2 + (0.4 * i / (B - 1) if B > 1 else 0)) * T) for i in range(B)]
        extra = sum(p * (p - 1) / 2 for p in lengths)
    return B * T * (T + 1) / 2 + extra


# ---------------------------------------------------------------- decode

def decode_data(B: int, H: int, K: int, S: int, D: int) -> dict:
    q = random(B, H, D, seed=0, grad=False)
    k, v = (random(B, K, S, D, seed=i, grad=False) for i in (1, 2))
    hi = torch.linspace(S // 4, S, B, device=DEVICE).int()
    return {"q": q, "k": k, "v": v, "lo": torch.zeros_like(hi), "hi": hi}


def sdpa_decode(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    keys = torch.arange(k.shape[2], device=q.device)
    mask = ((keys >= lo[:, None]) & (keys < hi[:, None]))[:, None, None]
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=gqa)[:, :, 0]


def flex_decode(data: dict) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    lo, hi = data["lo"], data["hi"]
    block = create_block_mask(lambda b, h, t, s: (s >= lo[b]) & (s < hi[b]), len(lo), None, 1, data["k"].shape[2],
                              device=DEVICE)
    function = torch.compile(flex_attention, dynamic=False)

    def step() -> tuple:
        with torch.no_grad():
            out = function(data["q"][:, :, None], data["k"], data["v"], block_mask=block,
                           enable_gqa=data["q"].shape[1] != data["k"].shape[1])
        return (out[:, :, 0],)
    return step


def decode_rows() -> list[Row]:
    out, names = [], ("q", "k", "v", "lo", "hi")
    for B, H, K, S, D in ((64, 32, 8, 1024, 128), (64, 32, 8, 4096, 128), (32, 32, 32, 1024, 128),
                          (4, 32, 8, 8192, 128)):
        S = S // DIVIDE
        seen = sum(int(S // 4 + (S - S // 4) * i / (B - 1)) for i in range(B))
        out.append(Row(f"decode B{B} H{H}/{K} S{S} D{D} ragged", 4.0 * seen * H * D, 4 * seen * K * D,
                       lambda a=(B, H, K, S, D): decode_data(*a),
                       lambda d: (decode.ref_decode(*(d[n].float() for n in "qkv"), d["lo"], d["hi"]),),
                       {"ours": forward(decode.decode, *names), "sdpa+mask": forward(sdpa_decode, *names),
                        "eager": forward(decode.ref_decode, *names), "flex": flex_decode}))
    return out


# ---------------------------------------------------------------- norm, rope, glu

def eager_rms(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


def liger_rms(x: Tensor, w: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    return LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", True, None)


def eager_add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x + r
    return F.rms_norm(s, s.shape[-1:], w, 1e-6), s


def liger_add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    return LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6, 0.0, "llama", True)


def norm_data(M: int, C: int) -> dict:
    return {"x": random(M, C, seed=0), "r": random(M, C, seed=1), "w": random(C, seed=2), "dy":
            random(M, C, seed=3, grad=False), "ds": random(M, C, seed=4, grad=False)}


def exact_norm(residual: bool, train: bool) -> Callable:
    def function(data: dict) -> tuple:
        x, r, w = (data[n].detach().float().requires_grad_() for n in "xrw")
        s = x + r if residual else x
        s = s + (s.detach().bfloat16().float() - s.detach())                 # the stream is kept in bf16
        y = norm.ref_norm(s, w, None, 1e-6, False)
        if not train:
            return (y,)
        out, given = ((y, s), (data["dy"], data["ds"])) if residual else ((y,), (data["dy"],))
        leaves = (x, r, w) if residual else (x, w)
        return *out, *torch.autograd.grad(out, leaves, [g.float() for g in given])
    return function


def norm_rows() -> list[Row]:
    out = []
    for M, C, train in ((16384, 4096, True), (16384, 4096, False), (2048, 4096, True)):
        M, C = M // DIVIDE, C // DIVIDE
        plain = {"ours": lambda x, w: norm.rms_norm(x, w, 1e-6), "eager": eager_rms, "liger": liger_rms,
                 "F.rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)}
        args = (training, ("x w", "x w", "dy")) if train else (forward, ("x", "w"))
        providers = {n: args[0](f, *args[1]) for n, f in plain.items()}
        providers["compile"] = compiled(args[0], eager_rms, *args[1])
        out.append(Row(f"norm rms {M}x{C} {'train' if train else 'forward'}", 0,
                       norm.traffic(M, C) + (norm.traffic(M, C, backward=True) if train else 0),
                       lambda M=M, C=C: norm_data(M, C), exact_norm(False, train), providers))
    for M, C in ((16384, 4096), (2048, 4096)):
        M, C = M // DIVIDE, C // DIVIDE
        plain = {"ours": lambda x, r, w: norm.rms_norm(x, w, 1e-6, residual=r), "eager": eager_add_rms,
                 "liger": liger_add_rms}
        names = ("x r w", "x r w", "dy ds")
        providers = {n: training(f, *names) for n, f in plain.items()}
        providers["compile"] = compiled(training, eager_add_rms, *names)
        out.append(Row(f"norm add+rms {M}x{C} train", 0,
                       norm.traffic(M, C, residual=True) + norm.traffic(M, C, residual=True, backward=True),
                       lambda M=M, C=C: norm_data(M, C), exact_norm(True, True), providers))
    return out


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x):
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-x2, x1), dim=-1) * sin
    return turn(q), turn(k)


def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction
    return LigerRopeFunction.apply(q, k, cos[0], sin[0], None, 1)


def rope_data(B: int, H: int, K: int, T: int, D: int) -> dict:
    angle = torch.arange(T, device=DEVICE)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, device=DEVICE) / D)
    angle = torch.cat((angle, angle), -1)[None, None]
    q, k, dq, dk = (random(B, T, heads, D, seed=i, grad=False).transpose(1, 2) for i, heads in enumerate((H, K, H, K)))
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "dq": dq, "dk": dk, "cos": angle.cos().bfloat16(),
            "sin": angle.sin().bfloat16()}


def exact_rope(data: dict) -> tuple:
    q, k = (data[n].detach().float().requires_grad_() for n in "qk")
    out = tuple(rope.ref_rope(x, data["cos"].float(), data["sin"].float()) for x in (q, k))
    return *out, *torch.autograd.grad(out, (q, k), (data["dq"].float(), data["dk"].float()))


def rope_rows() -> list[Row]:
    out, names = [], ("q k cos sin", "q k", "dq dk")
    for B, H, K, T, D in ((8, 32, 8, 2048, 128), (1, 32, 32, 2048, 128)):
        T = T // DIVIDE
        providers = {n: training(f, *names) for n, f in
                     (("ours", rope.rope), ("eager", eager_rope), ("liger", liger_rope))}
        providers["compile"] = compiled(training, eager_rope, *names)
        out.append(Row(f"rope B{B} H{H}/{K} T{T} D{D} train", 0, 2 * 4 * B * T * D * (H + K),
                       lambda a=(B, H, K, T, D): rope_data(*a), exact_rope, providers))
    return out


def liger_silu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    return LigerSiLUMulFunction.apply(gate, up)


def liger_gelu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    return LigerGELUMulFunction.apply(gate, up)


def exact_glu(kind: str) -> Callable:
    def function(data: dict) -> tuple:
        gate, up = (data[n].detach().float().requires_grad_() for n in ("gate", "up"))
        h = glu.ref_glu(gate, up, kind)
        return h, *torch.autograd.grad(h, (gate, up), data["dh"].float())
    return function


def glu_rows() -> list[Row]:
    out, names = [], ("gate up", "gate up", "dh")
    for M, I, kind, liger in ((16384, 11008, "silu", liger_silu), (2048, 11008, "silu", liger_silu),  # noqa: E741
                              (16384, 11008, "gelu_tanh", liger_gelu)):
        M, I = M // DIVIDE, I // DIVIDE  # noqa: E741

        def eager(gate, up, kind=kind):
            return glu.FUNCTIONS[kind](gate) * up
        providers = {"ours": training(lambda g, u, kind=kind: glu.glu(g, u, kind), *names),
                     "eager": training(eager, *names), "liger": training(liger, *names),
                     "compile": compiled(training, eager, *names)}
        out.append(Row(f"glu {kind} {M}x{I} train", 0, glu.traffic(M * I) + glu.traffic(M * I, backward=True),
                       lambda M=M, I=I: {"gate": random(M, I, seed=0), "up": random(M, I, seed=1),  # noqa: E741
                                         "dh": random(M, I, seed=2, grad=False)}, exact_glu(kind), providers))
    return out


def rows() -> list[Row]:
    """In order of value: when the time ends, the last ones are missing."""
    heads, attentions = head_rows(), attention_rows()
    return [*heads[:2], *attentions[:5], *decode_rows()[:2], *norm_rows()[:4], *glu_rows()[:2], *rope_rows()[:1],
            *heads[2:], *attentions[5:], *decode_rows()[2:], *norm_rows()[4:], *glu_rows()[2:], *rope_rows()[1:]]


# ---------------------------------------------------------------- tile sizes

CANDIDATES = {"FORWARD": [(128, 64, 3, 8), (64, 64, 3, 4), (128, 128, 2, 8), (128, 64, 2, 8)],
              "DQ": [(64, 32, 3, 4), (64, 64, 3, 4), (64, 64, 2, 4), (128, 64, 3, 8), (128, 64, 2, 8)],
              "DKV": [(32, 64, 3, 4, 1), (32, 64, 3, 4, 0), (32, 64, 2, 4, 1), (64, 128, 3, 8, 0), (32, 128, 3, 8, 1),
                      (64, 64, 2, 4, 0), (64, 128, 2, 8, 1)]}


def tune_attention(deadline: float, timer: Callable, distance: Callable) -> list[dict]:
    """Each table's candidates, one table at a time; the fastest is kept for the tables after it."""
    flush, found = torch.empty(2 ** 28, dtype=torch.int8, device=DEVICE), []
    for shape in (Shape(4, 32, 32, 2048, 128), Shape(8, 32, 32, 1024, 64)):
        data = attention_data(shape, MASKS["prefix"])
        for name, candidates in CANDIDATES.items():
            table, steps = getattr(attention, name)[attention.architecture(data["q"])], {}
            step = attention_step(ours_attention(data), data, name != "FORWARD")
            expected = step()                                                # of the table's present entry
            for tile in candidates:
                def run(tile=tile, table=table, step=step, D=shape.D):
                    table[D] = tile
                    return step()
                if time.time() > deadline:
                    break
                try:
                    error = distance(run(), expected)
                    if not error < 5e-3:
                        raise ValueError(f"differs by {error:.1e}")
                    steps[tile] = run
                except Exception as e:                                       # does not fit this card
                    print(f"{name} D{shape.D} {tile}: {type(e).__name__} {str(e)[:100]}", flush=True)
            ms = timer(steps, flush)
            for tile, t in sorted(ms.items(), key=lambda item: item[1]["ms"]):
                found.append({"table": name, "D": shape.D, "tile": tile, **t})
                print(f"{name} D{shape.D} {tile} {t['ms']:.3f} ms", flush=True)
            if ms:
                table[shape.D] = min(ms, key=lambda tile: ms[tile]["ms"])
    return found
