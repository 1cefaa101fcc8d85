"""The head with its loss: the kernel against the definition, values and every gradient, and what the loop promises."""
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, DTYPES, TOLERANCE, check, kernels_only, leaf, names, random  # noqa: F401
from torch.autograd import gradcheck

from kernels import head

N, H, V = 67, 24, 201                 # odd on purpose; 67 rows are two chunks with the smallest budget


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "BUDGET", {"cuda": 1, "cpu": 1})
    monkeypatch.setattr(head, "row_launch", lambda V: {"BLOCK": 128, "num_warps": 4, "num_stages": 1})  # several a row


def inputs(dtype):
    h, weight = random(N, H, dtype=dtype), random(V, H, dtype=dtype, seed=1, scale=0.3)
    bias = random(V, dtype=dtype, seed=2)
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    targets[5], targets[0], targets[1] = -100, 0, V - 1
    return h, weight, bias, targets


def double(*tensors):
    return [leaf(t.double()) for t in tensors]


OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 5.0}, {"temperature": 1.3, "softcap": 4.0}]
CASES = [(dtype, options) for dtype in DTYPES for options in (OPTIONS if dtype == torch.float32 else OPTIONS[-1:])]


@pytest.mark.parametrize("dtype, options", CASES, ids=str)
def test_cross_entropy_is_the_definition_with_all_its_gradients(dtype, options):
    h, weight, bias, targets = inputs(dtype)
    w = random(N, seed=4).abs() / N
    h, weight, bias = leaf(h), leaf(weight), leaf(bias)
    loss = head.linear_cross_entropy(h, weight, targets, w, bias, **options)
    (3 * loss).backward()
    h64, W64, b64 = double(h, weight, bias)
    expected = -(head.ref_linear_logprobs(h64, W64, targets, b64, **options)[0] * w.double()).sum()
    (3 * expected).backward()
    tolerance = TOLERANCE[dtype]
    check(loss, expected, tolerance, "loss")
    for name, got, ref in (("dh", h, h64), ("dW", weight, W64), ("dbias", bias, b64)):
        check(got.grad, ref.grad, tolerance, name)
        assert got.grad.dtype == dtype


@pytest.mark.parametrize("dtype", **names)
def test_mean_loss_is_that_of_the_library(dtype):
    h, weight, _, targets = inputs(dtype)
    loss = head.linear_cross_entropy(h, weight, targets, torch.tensor(1 / (N - 1)))
    expected = F.cross_entropy(F.linear(h.double(), weight.double()), targets, ignore_index=-100)
    check(loss, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype, options", CASES, ids=str)
def test_log_probs_can_be_differentiated_through_any_loss(dtype, options, frozen):
    h, weight, _, targets = inputs(dtype)
    h, weight = leaf(h), weight if frozen else leaf(weight)
    logp, entropy = head.linear_logprobs(h, weight, targets, **options)
    (torch.sigmoid(logp) * random(N, seed=5)).sum().backward()
    h64, W64 = double(h, weight)
    logp64, entropy64 = head.ref_linear_logprobs(h64, W64, targets, **options)
    (torch.sigmoid(logp64) * random(N, seed=5).double()).sum().backward()
    tolerance = TOLERANCE[dtype]
    check(logp, logp64, tolerance, "log-prob")
    check(entropy, entropy64, tolerance, "entropy")
    check(h.grad, h64.grad, tolerance, "dh")
    if frozen:
        assert weight.grad is None
    else:
        check(weight.grad, W64.grad, tolerance, "dW")
    assert not entropy.requires_grad


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", **names)
def test_ppo_in_the_head_is_the_clipped_loss_differentiated(dtype, frozen):
    """Against autograd through the loss as ppo.py states it; ratios lie on both sides of both borders of the clip."""
    h, weight, _, targets = inputs(dtype)
    h, weight = leaf(h), weight if frozen else leaf(weight)
    h64, W64 = double(h, weight)
    logp64, _ = head.ref_linear_logprobs(h64, W64, targets, temperature=0.9)
    gap = 0.4 * random(N, seed=6).double()                     # log of the ratio; none so near a border that rounding
    for border in (-math.log(0.8), -math.log(1.2)):           # decides which side it is on
        gap = torch.where((gap - border).abs() < 0.05, border + 0.05, gap)
    old = (logp64.detach() + gap).float()
    advantages, mask = random(N, seed=7), (torch.arange(N, device=DEVICE) % 5 > 0).float()
    w = mask / mask.sum()
    loss, logp, _ = head.linear_ppo(h, weight, targets, old, advantages, w, clip=0.2, temperature=0.9)
    loss.backward()
    ratio = torch.exp(logp64 - old.double())
    pessimist = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    (pessimist * w.double()).sum().backward()
    outside = ((ratio - 1).abs() > 0.2)[mask == 1]
    assert 0.2 < outside.float().mean() < 0.8                  # else the clip is not tested
    tolerance = TOLERANCE[dtype]
    check(loss, (pessimist * w.double()).sum(), 5 * tolerance, "loss")       # terms of both signs cancel
    check(logp, logp64, tolerance, "log-prob")
    check(h.grad, h64.grad, tolerance, "dh")
    if not frozen:
        check(weight.grad, W64.grad, tolerance, "dW")


def test_small_weights_keep_their_gradient_in_half_precision():
    """1 / 2^20 tokens: weighted before the products, every gradient would be rounded to zero in fp16."""
    h, weight, _, targets = inputs(torch.float16)
    h, weight = leaf(h), leaf(weight)
    loss = head.linear_cross_entropy(h, weight, targets, torch.tensor(2.0 ** -20))
    (loss * 2 ** 20).backward()
    h64, W64 = double(h, weight)
    (-head.ref_linear_logprobs(h64, W64, targets)[0].sum()).backward()
    check(h.grad, h64.grad, 2e-3, "dh")
    check(weight.grad, W64.grad, 2e-3, "dW")


def test_one_token_impossible_tokens_and_extreme_logits():
    h = leaf(torch.ones(1, 2, device=DEVICE))
    weight = torch.tensor([[300.0, 300.0], [-300.0, -300.0], [0.0, 0.0]], device=DEVICE)
    logp, entropy = head.linear_logprobs(h, weight, torch.tensor([0], device=DEVICE))
    assert logp.item() == 0 and entropy.item() == 0
    logp.sum().backward()
    assert h.grad.abs().max() == 0
    barred = torch.tensor([0.0, -float("inf"), 0.0], device=DEVICE)          # a token that is never allowed
    logp, entropy = head.linear_logprobs(torch.zeros(1, 2, device=DEVICE), weight, torch.tensor([2], device=DEVICE),
                                         bias=barred)
    check(logp, torch.tensor([0.5], device=DEVICE).log(), 1e-6)
    check(entropy, torch.tensor([2.0], device=DEVICE).log(), 1e-6)
    assert head.linear_cross_entropy(torch.zeros(0, 2, device=DEVICE), weight,
                                     torch.zeros(0, dtype=torch.int64, device=DEVICE)).item() == 0


# ---------------------------------------------------------------- the PyTorch path, which a CPU takes

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_and_torch_rows_are_the_same_function(monkeypatch, dtype):
    """The row function alone, on logits that are given, with PPO, cap and temperature; bf16 on a GPU only."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("triton's interpreter computes garbage in bf16")
    targets, coef = inputs(dtype)[3], random(N, seed=8)
    ppo = head.PPO(random(N, seed=9) - 6, random(N, seed=10), 0.2)
    outs = []
    for rows in (head.rows_torch, head.rows_triton):
        logits = random(N, V, dtype=dtype, seed=11, scale=3.0)
        outs.append((*rows(logits, targets, coef, ppo, 0.8, 20.0, True), logits))
    for name, a, b in zip(("logp", "entropy", "dlogits"), *outs):
        check(b, a, TOLERANCE[dtype], name)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_gradients_of_the_torch_path_by_finite_differences(monkeypatch, frozen):
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    g = torch.Generator().manual_seed(0)
    h = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=g, dtype=torch.float64, requires_grad=not frozen)
    bias = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=not frozen)
    targets = torch.tensor([0, 6, -1, 3, 3])
    w, old = torch.rand(5, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64) - 2
    adv = torch.randn(5, generator=g, dtype=torch.float64)
    options = {"temperature": 0.7, "softcap": 3.0}
    assert gradcheck(lambda h, W, b: head.linear_cross_entropy(h, W, targets, w, b, **options), (h, weight, bias))
    assert gradcheck(lambda h, W, b: head.linear_logprobs(h, W, targets, b, **options)[0], (h, weight, bias))
    assert gradcheck(lambda h, W, b: head.linear_ppo(h, W, targets, old, adv, w, 0.2, b, **options)[0],
                     (h, weight, bias))


def test_bf16_sums_its_chunks_in_fp32(monkeypatch):
    """dW of many chunks may not be worse than one plain bf16 product over all rows: the sum is not kept in bf16."""
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    h, weight = torch.randn(64 * 40, 16).bfloat16(), torch.randn(50, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (len(h),))
    head.linear_cross_entropy(h, weight, targets).backward()
    W64 = weight.detach().double().requires_grad_()
    F.cross_entropy(h.double() @ W64.t(), targets, reduction="sum").backward()
    plain = weight.detach().requires_grad_()
    F.cross_entropy(F.linear(h, plain).float(), targets, reduction="sum").backward()
    ours, theirs = (float((x.grad.double() - W64.grad).norm()) for x in (weight, plain))
    assert ours <= 1.5 * theirs, (ours, theirs)


def test_never_more_logits_than_a_chunk(monkeypatch):
    """The largest tensor that is ever made has a chunk's size: 200 rows of 1,000 logits, chunks of 64."""
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    h, weight, sizes = torch.randn(200, 8, requires_grad=True), torch.randn(1000, 8), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: sizes.append(linear(*a).numel()) or linear(*a))
    head.linear_cross_entropy(h, weight, torch.zeros(200, dtype=torch.int64)).backward()
    assert max(sizes) == 64 * 1000 and len(sizes) == 4


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs(monkeypatch):
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    h, weight = torch.randn(9, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.linear_cross_entropy(h, weight, targets)
        rounded = -head.ref_linear_logprobs(h.bfloat16(), weight.bfloat16(), targets)[0].sum()
    loss.backward()
    assert loss.dtype == h.grad.dtype == weight.grad.dtype == torch.float32
    check(loss, rounded, 1e-5)
