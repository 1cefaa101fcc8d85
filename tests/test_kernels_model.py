"""The model, the SFT loss, PPO's log-probabilities and sampling on the kernels: the same numbers as without them."""
import pytest
import torch
from conftest import tiny_model
from kernel_cases import DEVICE, check

import sft
from kernels import attention

GLM = {"positions": "rope_2d", "prefix_ids": (90, 91), "num_kv_heads": 4}
CASES = {"llama": {}, "bloom": {"positions": "alibi", "norm": "layer", "glu": False, "embed_norm": True},
         "gemma 2": {"attention_softcap": 5.0, "final_softcap": 8.0, "window": 6, "full_layers": (1,),
                     "activation": "gelu_tanh", "block": "sandwich"},
         "chatglm": GLM, "qwen 3": {"qk_norm": "head", "rope_dim": 6, "head_bias": True}}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16: a row of 24 tokens is several of them."""
    plan = {"BM": 16, "BN": 16, "num_stages": 1, "num_warps": 4}
    monkeypatch.setattr(attention, "launch", lambda table, x: {
        "D": x.shape[-1], "BD": max(16, attention.power_of_two(x.shape[-1])), **plan,
        **({"SPLIT": True} if table is attention.DKV else {})})


def batch():
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 5], ids[0, 7], ids[1, 14], ids[1, 18] = 91, 90, 91, 90      # GLM's hole and <sop>
    docs = torch.tensor([[1] * 12 + [2] * 10 + [0] * 2, [0] * 3 + [1] * 9 + [2] * 12])
    keep = torch.zeros_like(ids)
    keep[:, 8:12] = keep[:, 18:22] = 1
    return ids.to(DEVICE), docs.to(DEVICE), keep.to(DEVICE)


def measure(model):
    """Logits, the SFT loss and all its gradients."""
    ids, docs, keep = batch()
    model.zero_grad()
    loss = sft.batch_loss(model, ids, docs, keep, n_tokens=10)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": model(ids, docs)[docs > 0].detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_with_and_without_kernels(name, monkeypatch):
    model = tiny_model(**CASES[name]).to(DEVICE)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    expected = measure(model)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "triton")
    got = measure(model)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if float(value.abs().max()) > 1e-6:                            # k_proj's bias has no gradient
            check(got[key], value, 2e-5, key)


@pytest.mark.parametrize("name", CASES)
def test_generation_is_the_same_with_and_without_kernels(name, monkeypatch):
    model = tiny_model(**CASES[name]).to(DEVICE)
    ids, docs, _ = batch()
    if name == "chatglm":
        ids[:, 10], ids[:, 11] = 91, 90
    out = {}
    for kind, graph in (("torch", False), ("triton", False), ("triton", True)):
        monkeypatch.setenv("CHATPIXIU_KERNELS", kind)
        how = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "generator": torch.Generator(DEVICE).manual_seed(1)}
        logprobs = []
        new = model.generate(ids[:, :12], 4, (docs[:, :12] > 0).long(), logprobs=logprobs, graph=graph, **how)
        out[kind, graph] = new, torch.stack(logprobs)
    plain = out.pop(("torch", False))
    for new, logprobs in out.values():
        assert torch.equal(new, plain[0])
        check(logprobs, plain[1], 1e-4)


@pytest.mark.parametrize("capped", [False, True])
def test_ppos_log_probabilities_are_the_same_bits_with_and_without_gradient(capped, monkeypatch):
    """Else the first ratio would not be 1. Against the plain path to rounding."""
    import ppo
    model = tiny_model(final_softcap=4.0 if capped else None).to(DEVICE)
    model.requires_grad_(False)
    h = torch.randn(37, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = torch.randint(0, 97, (37,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "torch")
    expected = ppo.head_logprobs(model.lm_head, h, targets, 0.7, True)
    monkeypatch.setenv("CHATPIXIU_KERNELS", "triton")
    logp, entropy = ppo.head_logprobs(model.lm_head, h.clone().requires_grad_(), targets, 0.7, True)
    with torch.no_grad():
        again, _ = ppo.head_logprobs(model.lm_head, h, targets, 0.7, True)
    assert torch.equal(logp, again) and logp.requires_grad
    check(logp, expected[0], 1e-5)
    check(entropy, expected[1], 1e-5)
