"""More rows of kernels/bench.py: the LoRA linear, sampling, GAE and NF4. See bench_rows.py for what a row is."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sampling
from kernels import bench_rows, gae, lora, nf4, sample
from kernels.bench_rows import DEVICE, Row, compiled, forward, random, training

SCALE = 2.0


# ---------------------------------------------------------------- LoRA

def ours_lora(x: Tensor, w: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return lora.lora_linear(x, w, None, [lora.Adapter(A, B, SCALE)])


def eager_lora(x: Tensor, w: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """As peft computes it."""
    return F.linear(x, w) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * SCALE


def addmm_lora(x: Tensor, w: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """As lora.py computes it with plain autograd."""
    return torch.addmm(F.linear(x, w), F.linear(x, A.to(x.dtype)), B.to(x.dtype).t(), alpha=SCALE)


def frozen(data: dict) -> object:
    """The base alone, without any adapter: the bound. Its y is another one, so it is marked as wrong."""
    def step() -> tuple:
        y = F.linear(data["x"], data["w"])
        return y, *torch.autograd.grad(y, [data["x"]], [data["dy"]])
    return step


def lora_data(N: int, n_in: int, n_out: int, r: int) -> dict:
    return {"x": random(N, n_in, seed=0), "w": random(n_out, n_in, seed=1, scale=0.02, grad=False),
            "A": random(r, n_in, seed=2, scale=0.02).detach().float().requires_grad_(),
            "B": random(n_out, r, seed=3, scale=0.02).detach().float().requires_grad_(),
            "dy": random(N, n_out, seed=4, grad=False)}


def exact_lora(data: dict) -> tuple:
    leaves = [data[n].detach().float().requires_grad_() for n in ("x", "A", "B")]
    y = eager_lora(leaves[0], data["w"].float(), *leaves[1:])
    return y, *torch.autograd.grad(y, leaves, [data["dy"].float()])


def lora_rows() -> list[Row]:
    out, names = [], ("x w A B", "x A B", "dy")
    for N, n_in, n_out in ((8192, 4096, 4096), (8192, 4096, 11008), (1024, 4096, 4096)):
        N, n_in, n_out = (n // bench_rows.DIVIDE for n in (N, n_in, n_out))
        providers = {"ours": training(ours_lora, *names), "eager": training(eager_lora, *names),
                     "addmm": training(addmm_lora, *names), "compile": compiled(training, eager_lora, *names),
                     "frozen": frozen}
        work = lora.flops(N, n_in, n_out, 16) + lora.flops(N, n_in, n_out, 16, backward=True)
        out.append(Row(f"lora {N}x{n_in}x{n_out} r16 train", work - 2 * N * n_in * n_out, 0,   # dx only: W is frozen
                       lambda a=(N, n_in, n_out, 16): lora_data(*a), exact_lora, providers))
    return out


# ---------------------------------------------------------------- sampling, GAE, NF4

def with_sort(logits: Tensor, noise: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """sampling.sample without its kernel."""
    z = logits.float() / 0.8
    if top_k:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], float("-inf"))
    probs = z.softmax(-1)
    if top_p:
        order, index = probs.sort(descending=True)
        drop = order.cumsum(-1) - order >= top_p
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), 0.0)
    new, total = sampling.pick(probs, noise)[0], probs.sum(-1)
    return new, (probs.gather(1, new[:, None])[:, 0] / total).log()


def sample_rows() -> list[Row]:
    out = []
    for B, V, top_k, top_p in ((64, 128256, None, 0.9), (64, 128256, 50, None), (64, 128256, None, None),
                               (8, 32000, 50, 0.9)):
        V = V // bench_rows.DIVIDE

        def data(B=B, V=V) -> dict:
            noise = torch.rand(B, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
            return {"logits": random(B, V, seed=0, scale=2.0, grad=False), "noise": noise}
        providers = {
            "ours": forward(lambda z, u, k=top_k, p=top_p: sample.sample(z, u, 0.8, k, p), "logits", "noise"),
            "sort": forward(lambda z, u, k=top_k, p=top_p: with_sort(z, u, k, p), "logits", "noise")}
        out.append(Row(f"sample {B}x{V} top_k {top_k} top_p {top_p}", 0, sample.traffic(B, V), data, None, providers))
    return out


def gae_data(B: int, R: int) -> dict:
    mask = (torch.arange(R, device=DEVICE) < torch.linspace(R // 4, R, B, device=DEVICE)[:, None]).long()
    return {"r": random(B, R, seed=0, grad=False).float(), "v": random(B, R, seed=1, grad=False).float(), "mask": mask}


def gae_rows() -> list[Row]:
    B, R = 512, 1024 // bench_rows.DIVIDE
    return [Row(f"gae {B}x{R}", 0, gae.traffic(B, R), lambda: gae_data(B, R),
                lambda d: gae.ref_gae(d["r"].double(), d["v"].double(), d["mask"]),
                {"ours": forward(gae.gae, "r", "v", "mask"), "eager": forward(gae.ref_gae, "r", "v", "mask")})]


def nf4_rows() -> list[Row]:
    n_out, n_in = 11008 // bench_rows.DIVIDE, 4096 // bench_rows.DIVIDE
    names = [f"q{i}" for i in range(5)]

    def data() -> dict:
        q = nf4.quantise(random(n_out, n_in, seed=0, scale=0.02, grad=False))
        return dict(zip(names, q[:5]))

    def matrix(tensors: tuple) -> nf4.NF4:
        return nf4.NF4(*tensors, (n_out, n_in), torch.bfloat16)
    return [Row(f"nf4 unpack {n_out}x{n_in}", 0, nf4.traffic(n_out * n_in), data,
                lambda d: (nf4.ref_dequantise(matrix([d[n] for n in names])).float(),),
                {"ours": forward(lambda *t: nf4.dequantise(matrix(t)), *names),
                 "eager": forward(lambda *t: nf4.ref_dequantise(matrix(t)), *names),
                 "compile": lambda d: forward(torch.compile(lambda *t: nf4.ref_dequantise(matrix(t)), dynamic=False),
                                              *names)(d)})]


def rows() -> list[Row]:
    return [*lora_rows()[:2], *sample_rows()[:3], *gae_rows(), *nf4_rows(), *lora_rows()[2:], *sample_rows()[3:]]
