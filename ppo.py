"""Stage 3, PPO: let the model write, let the learned reward model judge, and make what was judged well more likely,
without letting it drift far from the model it started as.

    per token:    r_t = -beta * (log p_policy - log p_reference) + [t = last token] * reward(prompt + answer)
    advantage:    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t    GAE, eq. 16
    policy loss:  mean over answer tokens of max(-A rho, -A clip(rho, 1-e, 1+e)),  rho = p_new / p_old       PPO, eq. 7
    value loss:   mean of 1/2 max((V - R)^2, (clip(V, V_old-e, V_old+e) - R)^2),   R = A + V_old

GAE: Schulman et al. 2016, arXiv 1506.02438; PPO: 2017, arXiv 1707.06347, whose text clips the policy only: the value's
clip is from its authors' code.

Four roles, one base: the reference is the frozen base itself; policy, value and reward are adapters on it with their
heads. A 7B model then needs 15 GB instead of 54 (four copies). --lora_r 0 trains whole, separate models instead.

One update = rollout (sample answers) -> score (four roles read them) -> advantages -> several epochs of minibatches.
Indices, P = prompt tokens (padded on the left), R = response tokens:

    ids        [pad pad  p1  p2 | a1  a2 end pad]        everything per token is (B, R), for a1, a2, end, pad
    mask         0   0   1   1  |  1   1   1   0         `response` = the right half: 1 = the policy chose this token
    log p(a1) and V before a1 are read at p2:            slice [P-1 : P+R-1], one to the left of the tokens themselves

    python ppo.py --init out/sft/model --reward out/reward/model --data prompts.jsonl --out_dir out/ppo
    torchrun --nproc_per_node 8 ppo.py --init DIR --reward DIR --data FILE
"""
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoints
import common
import lora
import memory
import reward as reward_stage
from data import batch as data_batch
from data import chat, formats
from kernels import gae as kernel_gae
from kernels.backend import use_triton
from kernels.head import linear_logprobs
from lora import fingerprint
from model import Transformer, linear_head
from reward import RewardModel
from sft import autocast, check_quant, keep_apart, widen


@dataclass
class Config:
    # --- models and data ---
    init: str = "smollm2-135m"         # the policy starts here and the reference stays here: --init out/sft/model
    reward: str = "out/reward/model"   # the reward model, trained with reward.py --init of the same SFT model
    data: str = "data/demo/prompts.jsonl"   # prompts; answers in the file are ignored
    valid: str = ""                    # held-out prompts; empty: the last eval_prompts of data are held out
    format: str = "auto"               # name the format of data when sniffing guesses wrong
    template: str = ""                 # a chat format, say chatml (help: a list); empty: the model's own
    skip_bad: bool = False             # go on past rows that cannot be read (they are counted) instead of stopping
    max_prompt: int = 256              # prompt tokens; longer prompts lose their beginning and are counted
    out_dir: str = "out/ppo"
    overwrite: bool = False            # replace a finished run in out_dir
    # --- rollout ---
    steps: int = 100                   # updates; each samples batch_size new answers
    batch_size: int = 64               # answers per update, over all ranks; 512 on big machines
    response_len: int = 48             # tokens an answer may take
    temperature: float = 1.0           # of the sampler, and of every log-probability: they must be one distribution
    missing_eos: float | None = -1.0   # score of an answer that did not end by itself; none: judge it as it is
    merge: bool = False                # sample with the adapter merged in: faster, but bf16 rounds W + BA
    graph: bool = False                # steps of one shape, on a GPU from a CUDA graph: the same but for rounding
    # --- reward and KL ---
    kl_coef: float = 0.05              # beta: the price of a nat away from the reference
    kl_target: float | None = None     # nats per answer: beta then adapts to hold this KL (6 in Ziegler et al. 2019)
    kl_horizon: int = 10000            # answers over which beta adapts
    reward_clip: float = 0.0           # scores are cut to +- this; 0: off
    whiten_rewards: bool = False       # scale rewards to std 1 (their mean is kept)
    # --- PPO ---
    ppo_epochs: int = 4                # passes over each rollout
    minibatches: int = 1               # optimiser steps per pass
    micro_batch: int = 16              # answers per forward: lower it when memory runs out, the gradient stays the same
    one_pass: bool = False             # all roles score in one forward; in bf16 the first ratio then rounds
    lr: float = 1e-4                   # of the policy; LoRA. Full fine-tuning 1e-6 .. 1e-5
    value_lr: float = 1e-4             # of the value; Adam ignores the loss's scale, so this replaces the usual vf_coef
    value_warmup: int = 0              # updates in which only the value learns
    schedule: str = "linear"           # linear (to zero) | cosine | constant
    warmup: int = 0                    # updates of linear warm-up
    clip: float = 0.2                  # the ratio may gain from moving this far from 1
    value_clip: float = 0.2            # and the value this far from its old estimate
    gamma: float = 1.0                 # no discount: the score comes once, at the end
    lam: float = 0.95                  # GAE: 1 = unbiased and noisy, 0 = trusts the value
    whiten: bool = True                # advantages to mean 0 and std 1 over the real tokens of the update
    grad_clip: float = 1.0             # norm of each role's gradient at most; 0: off
    checkpointing: bool = False        # recompute activations in backward
    # --- LoRA ---
    lora_r: int = 16                   # rank of the policy's adapter; 0: train whole, separate models
    lora_alpha: float = 32.0           # the correction is scaled by alpha / r
    lora_targets: tuple[str, ...] = lora.ALL_LINEAR
    quant: str = ""                    # nf4: the frozen linears in four bits (QLoRA), a quarter of the memory of bf16
    # --- run ---
    seed: int = 0
    device: str = "auto"               # auto | cpu | cuda | mps
    dtype: str = "auto"                # of the frozen weights: auto | bf16 | fp32
    eval_every: int = 0                # updates between measurements on held-out prompts; 0: first and last only
    eval_prompts: int = 64             # held-out prompts
    save_every: int = 10               # updates between states that --resume can continue from
    resume: bool = False               # go on from the newest state in out_dir
    dry_run: bool = False              # print parameters and memory per role, allocate nothing


# ---------------------------------------------------------------- the maths

def logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, T, V), (B, T) -> (B, T-1): log p(ids[t+1] | ids[..t]) of the distribution that sampling at `temperature`
    draws from."""
    return token_logprobs(logits[:, :-1], ids[:, 1:], temperature)


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., V), (...) -> (...) log-probabilities in fp32: bf16 would lose a hundredth of a nat per token."""
    logits = (widen(logits) / temperature).flatten(0, -2)
    return -F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def kl(logp: Tensor, ref_logp: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimates of KL(policy || reference) for tokens sampled from the policy (Schulman 2020, "Approximating
    KL divergence").
    k1 = log p - log q: unbiased, noisy, may be negative. It is the one that belongs in the reward.
    k3 = q/p - 1 - log(q/p): unbiased, never negative, less noise. For the log only: as a reward its gradient is
    wrong."""
    if kind == "k1":
        return logp - ref_logp
    if kind == "k3":
        return torch.expm1(ref_logp - logp) - (ref_logp - logp)
    raise ValueError(f"unknown KL estimator {kind!r}; known: k1, k3")


class AdaptiveKL:
    """beta <- beta (1 + clip(KL / target - 1, +-0.2) n / horizon) (Ziegler et al. 2019, arXiv 1909.08593, eq. 3); no
    target: fixed. KL is in nats per answer: summed over its tokens, averaged over answers."""
    def __init__(self, coef: float, target: float | None = None, horizon: int = 10000):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, measured: float, n: int) -> None:
        if self.target:
            error = min(max(measured / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * n / self.horizon


def response_mask(new: Tensor, eos_ids) -> Tensor:
    """(B, R) sampled ids -> 1 up to and including the first end token: ending is an action, and it is trained.
    [[7, 8, END, pad], [7, END, END, 9], [7, 8, 9, 9]] -> [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]"""
    is_end = torch.isin(new, torch.tensor(sorted(eos_ids), device=new.device)).long()
    return (is_end.cumsum(1) - is_end == 0).long()                             # no end token before this one


def final_scores(scores: Tensor, ended: Tensor, missing_eos: float | None, clip: float = 0.0) -> Tensor:
    """(B,) what the reward model said, with a fixed low score for answers that did not end (Ziegler et al. 2019)."""
    if clip:
        scores = scores.clamp(-clip, clip)
    return scores if missing_eos is None else torch.where(ended, scores, missing_eos)


def token_rewards(scores: Tensor, kls: Tensor, mask: Tensor, coef: float) -> Tensor:
    """(B,) scores, (B, R) per-token KL -> (B, R): every token pays for its KL, the last one also earns the score.
    The KL is a number here, not a path for gradients: both inputs are detached."""
    rewards = -coef * kls * mask
    last = (mask.sum(1) - 1)[:, None]                          # the end token, or the last one that fitted
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """(B, R) rewards and values -> advantages, returns (B, R). V is 0 after the end: nothing is bootstrapped through
    padding.

        rewards 0, 0, 1   values 0.5, 0.6, 0.7   gamma 1, lambda 0.9        delta  0.1, 0.1, 0.3
        advantages 0.1 + 0.9 (0.1 + 0.9 * 0.3) = 0.433,  0.1 + 0.9 * 0.3 = 0.37,  0.3        returns 0.933, 0.97, 1.0"""
    values = values * mask
    advantages = torch.zeros_like(rewards)
    later = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t], next_value = later, values[:, t]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean 0 (or the old mean) and std 1 over the tokens under the mask, of all ranks; biased variance, as in Ziegler
    et al."""
    n = common.all_sum(mask.sum().to(x.dtype))
    mean = common.all_sum((x * mask).sum()) / n
    var = common.all_sum(((x - mean) ** 2 * mask).sum()) / n
    white = (x - mean) * torch.rsqrt(var + 1e-8)
    return (white if shift_mean else white + mean) * mask


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2,
                n_tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (PPO eq. 7, with the sign of a loss), mean over the tokens under the mask. The max takes
    the pessimist's side: a good action gains nothing beyond ratio 1 + clip, a bad one nothing below 1 - clip.
    n_tokens: the count of the whole minibatch when this is one micro-batch of several, and that of the stats."""
    n = mask.sum() if n_tokens is None else n_tokens
    ratio = torch.exp((logp - old_logp) * mask)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    with torch.no_grad():
        stats = {"ratio": ratio, "ratio_sq": ratio ** 2, "approxkl": 0.5 * (logp - old_logp) ** 2,
                 "clipfrac": ((ratio - 1).abs() > clip).float(), "surrogate": advantages * ratio}
        stats = {name: (x * mask).sum() / n for name, x in stats.items()}
    return (loss * mask).sum() / n, stats


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2,
               n_tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error, again the pessimist's: moving further than clip from the old estimate earns nothing."""
    n = mask.sum() if n_tokens is None else n_tokens
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * torch.maximum(plain, clipped)
    stats = {"clipfrac": ((clipped > plain).float() * mask).sum() / n, "error": (plain.detach() * mask).sum() / n}
    return (loss * mask).sum() / n, stats


# ---------------------------------------------------------------- four roles

@dataclass
class Roles:
    """Who computes with what. On one base `policy` and `reference` are the same model with and without an adapter."""
    policy: Transformer
    reference: Transformer
    reward: RewardModel | Callable     # or a function of (ids, mask, response), where the truth is known
    value: RewardModel
    adapter: str | None                # the policy's adapter; None: policy is a model of its own

    def judge(self, ids: Tensor, mask: Tensor, response: Tensor, h: Tensor | None = None) -> Tensor:
        learned = isinstance(self.reward, RewardModel)
        return self.reward(ids, mask, h) if learned else self.reward(ids, mask, response)

    def use(self, role: str) -> contextlib.AbstractContextManager[Transformer]:
        return lora.use(self.policy, self.adapter) if role == "policy" else lora.use(self.reference, None)

    def hidden(self, role: str, ids: Tensor, mask: Tensor) -> Tensor:
        with self.use(role) as model:
            return model.hidden(ids, mask)

    def hidden_of_all(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """{role: (B, T, C)} of all that live on the policy's base, from one forward pass: a copy of the rows for each,
        each copy under its own adapter, and every product with the base once."""
        adapters = {"policy": self.adapter, "reference": None}
        adapters |= {role: judge.adapter for role, judge in (("value", self.value), ("reward", self.reward))
                     if isinstance(judge, RewardModel) and judge.model is self.policy}
        n = len(adapters)
        with lora.use(self.policy, *adapters.values()):
            h = self.policy.hidden(ids.repeat(n, 1), mask.repeat(n, 1))
        return dict(zip(adapters, h.chunk(n)))

    def head(self, role: str) -> torch.nn.Module:
        return (self.policy if role == "policy" else self.reference).lm_head

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What learns and what may not, each once: the reward model's too where it is on the same base."""
        models = {"policy": self.policy, "reference": self.reference, "value": self.value}
        return list(torch.nn.ModuleDict(models).named_parameters())

    def trainable(self, role: str) -> list[tuple[str, torch.nn.Parameter]]:
        if role == "policy":
            return lora.parameters(self.policy, self.adapter) if self.adapter else list(self.policy.named_parameters())
        body = lora.parameters(self.value.model, "value") if self.adapter else list(self.value.model.named_parameters())
        head = [("head." + n, p) for n, p in self.value.head.named_parameters()]
        return [(n, p) for n, p in body if p.requires_grad] + head


def one_base(cfg: Config, model: Transformer, world: common.World) -> Roles:
    """Policy, value and reward as adapters on one frozen base. The value starts as a copy of the reward model, the
    policy with B = 0: at the first step it is the reference bit for bit, and V at the end token is the score."""
    path = Path(cfg.reward)
    shared = reward_stage.same_base(path, cfg.init)
    reward = reward_stage.load(path, base=model if shared else None, device=world.device, dtype=world.dtype,
                               quant=cfg.quant)
    common.seed_all(cfg.seed)
    lora.apply(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, "policy")
    if shared:
        lora.copy(model, "reward", "value")
    else:
        lora.apply(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, "value")
    value = RewardModel(model, "value")
    start_value(value, reward if shared else None)
    freeze(reward)
    return Roles(model, model, reward, value, "policy")


def separate(cfg: Config, model: Transformer, world: common.World) -> Roles:
    """Four models: policy and value are trained whole, reference and reward are frozen."""
    reference, _ = checkpoints.load(cfg.init, world.device, torch.float32)
    reward = reward_stage.load(cfg.reward, device=world.device, dtype=torch.float32)
    value = reward_stage.load(cfg.reward, device=world.device, dtype=torch.float32)
    if value.adapter:
        lora.merge(value.model, value.adapter, keep_original=False)
        lora.strip(value.model)
        value.adapter = None
    value.model.requires_grad_(True)
    if not value.model.config.tie_embeddings:
        value.model.lm_head.requires_grad_(False)                              # a value function writes no words
    start_value(value, reward)
    freeze(reward)
    reference.requires_grad_(False)
    return Roles(model, reference, reward, value, None)


def start_value(value: RewardModel, reward: RewardModel | None) -> None:
    """The value's head: the reward model's, or zero (Ziegler et al.) where the two share nothing."""
    with torch.no_grad():
        for name, mine in value.head.named_parameters():
            mine.copy_(reward.head.get_parameter(name)) if reward else mine.zero_()
    value.head.requires_grad_(True)


def freeze(reward: RewardModel) -> None:
    reward.head.requires_grad_(False)
    for _, p in lora.parameters(reward.model, reward.adapter) if reward.adapter else reward.model.named_parameters():
        p.requires_grad_(False)


# ---------------------------------------------------------------- rollout and score

@dataclass
class Rollout:
    """Answers and what the four roles say of them. ids, mask (B, P + R); response and all per-token tensors (B, R)."""
    ids: Tensor
    mask: Tensor
    response: Tensor                   # 1 = the policy chose this token
    ended: Tensor                      # (B,) bool
    sampler_logp: Tensor               # as the sampler saw it, for diagnosis only
    logp: Tensor = None                # of the policy that sampled, from the training path
    ref_logp: Tensor = None
    entropy: Tensor = None
    values: Tensor = None
    scores: Tensor = None              # (B,) of the reward model

    @property
    def R(self) -> int:
        return self.response.shape[1]


@torch.no_grad()
def rollout(roles: Roles, prompts: list[list[int]], tokenizer, cfg: Config, generator: torch.Generator) -> Rollout:
    """Samples one answer per prompt. No top-k, no top-p: what is sampled must be what is scored. The sampled ids are
    kept as they are; decoding and encoding them again would not give the same tokens back."""
    device = roles.policy.embed_tokens.weight.device
    ids, mask = (x.to(device) for x in data_batch.pad(prompts, tokenizer.pad_id, side="left"))
    how = lora.merged if roles.adapter and cfg.merge else lora.packed
    sampler: list[Tensor] = []
    with how(roles.policy, roles.adapter):
        new = roles.policy.generate(ids, cfg.response_len, mask, cfg.temperature, eos_ids=tokenizer.eos_ids,
                                    generator=generator, pad_id=tokenizer.pad_id, logprobs=sampler, graph=cfg.graph)
    response = response_mask(new, tokenizer.eos_ids)
    ended = torch.isin(new, torch.tensor(sorted(tokenizer.eos_ids), device=device)).any(1)
    return Rollout(torch.cat((ids, new), 1), torch.cat((mask, response), 1), response, ended, torch.stack(sampler, 1))


def policy_logprobs(roles: Roles, role: str, ids: Tensor, mask: Tensor, response: Tensor, temperature: float,
                    entropy: bool = False, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(B, R) log-probabilities of the response tokens; the head runs only where there is one. This one function gives
    old, new and reference log-probabilities: were they computed in different ways, the first ratio would not be 1."""
    R, keep = response.shape[1], response == 1
    h = roles.hidden(role, ids, mask) if h is None else h                      # (B, P + R, C)
    h = h[:, -R - 1:-1][keep]                                                  # (N, C), one to the left of the tokens
    with roles.use(role):                                                      # --lora_targets may name the head
        logp, H = head_logprobs(roles.head(role), h, ids[:, -R:][keep], temperature, entropy)
    logp = logp.new_zeros(response.shape).masked_scatter(keep, logp)
    return logp, torch.zeros_like(logp).masked_scatter(keep, H) if entropy else None


def head_logprobs(head: torch.nn.Module, h: Tensor, targets: Tensor, temperature: float,
                  entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(N, C), (N,) -> log-probabilities and entropies (N,) of softmax(head(h) / temperature)."""
    if (parts := linear_head(head)) is not None:                               # on a GPU the logits never exist at once
        weight, bias, cap = parts
        return linear_logprobs(h, weight, targets, bias, temperature, cap)
    logits = head(h)
    logp = token_logprobs(logits, targets, temperature)
    if not entropy:
        return logp, None
    log_p = (widen(logits) / temperature).log_softmax(-1)
    return logp, -(log_p.exp() * log_p).sum(-1)


def response_values(roles: Roles, ids: Tensor, mask: Tensor, response: Tensor, h: Tensor | None = None) -> Tensor:
    """(B, R): V of the state before each response token. Read at the token itself, V would know the action it
    judges."""
    return roles.value.values(ids, mask, h)[:, -response.shape[1] - 1:-1] * response


def plan(r: Rollout, order: Tensor, cfg: Config) -> list[list[Tensor]]:
    """Minibatches of micro-batches of row numbers. Within a minibatch rows of similar length stand together: their
    padding is cut off, which halves the work, and a sum of gradients does not depend on the order."""
    size = math.ceil(len(order) / cfg.minibatches / cfg.micro_batch) * cfg.micro_batch
    lengths = r.mask.sum(1).cpu()
    return [list(rows[lengths[rows].argsort(stable=True)].split(cfg.micro_batch)) for rows in order.split(size)]


def cut(r: Rollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, response of these rows without the columns in which all of them are padding.
    mask [[0, 0, 1 | 1, 0, 0], [0, 1, 1 | 1, 1, 0]] -> [[0, 1 | 1, 0], [1, 1 | 1, 1]]"""
    ids, mask, response = r.ids[rows], r.mask[rows], r.response[rows]
    used = mask.any(0).nonzero()
    first, last, R = int(used[0]), int(used[-1]) + 1, int(response.any(0).sum())
    return ids[:, first:last], mask[:, first:last], response[:, :R]


@torch.no_grad()
def score(roles: Roles, r: Rollout, cfg: Config, world: common.World) -> Rollout:
    """All four roles read the same ids, in the micro-batches of the update that follows: equal shapes, equal rounding
    (with one_pass all but the rounding: see one_by_one)."""
    like = widen(roles.policy.embed_tokens.weight[:0])
    for name in ("logp", "entropy", "ref_logp", "values"):
        setattr(r, name, like.new_zeros(r.response.shape))
    r.scores = like.new_zeros(len(r.ids))
    for rows in (rows.to(r.ids.device) for minibatch in plan(r, torch.arange(len(r.ids)), cfg) for rows in minibatch):
        ids, mask, response = cut(r, rows)
        with autocast(world, roles.adapter is None):
            h = roles.hidden_of_all(ids, mask) if cfg.one_pass else {}
            T, own, other = cfg.temperature, h.get("policy"), h.get("reference")
            logp, entropy = policy_logprobs(roles, "policy", ids, mask, response, T, entropy=True, h=own)
            ref_logp, _ = policy_logprobs(roles, "reference", ids, mask, response, T, h=other)
            values = response_values(roles, ids, mask, response, h.get("value"))
            scores = roles.judge(ids, mask, response, h.get("reward"))
        r.scores[rows] = scores.to(like.dtype)
        for to, x in ((r.logp, logp), (r.entropy, entropy), (r.ref_logp, ref_logp), (r.values, values)):
            to[rows, :x.shape[1]] = x
    return r


def one_by_one(roles: Roles, r: Rollout, cfg: Config, world: common.World) -> Rollout:
    """The first update's `score`, also with one_pass: then its ratio must be 1. One pass multiplies other shapes, which
    in bf16 moves a log-probability by a few hundredths; here it may move them by that and no more."""
    score(roles, r, replace(cfg, one_pass=False), world)
    if cfg.one_pass:
        once, most = score(roles, replace(r), cfg, world), 1e-4 if world.dtype == torch.float32 else 0.15
        for role, a, b in (("policy", r.logp, once.logp), ("reference", r.ref_logp, once.ref_logp)):
            rms = float(((a - b) ** 2 * r.response).sum() / r.response.sum()) ** 0.5
            if not rms <= most:
                raise common.UserError(f"--one_pass gives the {role} other log-probabilities than a pass of its own, "
                                       f"by {rms:.2e} (root mean square; rounding gives at most {most}): drop it")
    return r


def describe(r: Rollout, tokenizer, split: str) -> list[dict]:
    """One record per answer for samples.jsonl: text, score, KL, length, whether it ended."""
    P = r.ids.shape[1] - r.R
    kls = (kl(r.logp, r.ref_logp) * r.response).sum(1)
    rows = []
    for ids, mask, response, ended, s, k in zip(r.ids, r.mask, r.response, r.ended, r.scores, kls):
        tokens = ids[P:][response == 1].tolist()
        rows.append({"split": split, "prompt": tokenizer.decode(ids[:P][mask[:P] == 1].tolist()),
                     "answer": tokenizer.decode(tokens[:-1] if ended else tokens),
                     "score": float(s), "kl": float(k), "tokens": len(tokens), "ended": bool(ended)})
    return rows


# ---------------------------------------------------------------- update

def credit(r: Rollout, cfg: Config, coef: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What there is to learn from a scored rollout: (B,) scores, (B, R) KL, advantages and returns."""
    kls = kl(r.logp, r.ref_logp) * r.response
    scores = final_scores(r.scores, r.ended, cfg.missing_eos, cfg.reward_clip)
    rewards = token_rewards(scores, kls, r.response, coef)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, r.response, shift_mean=False)
    backwards = kernel_gae.gae if use_triton(rewards) else gae   # a loop over tokens launches thousands of kernels
    advantages, returns = backwards(rewards, r.values, r.response, cfg.gamma, cfg.lam)
    if cfg.whiten:
        advantages = whiten(advantages, r.response)            # after the returns: V must learn real rewards
    return scores, kls, advantages, returns


def update(roles: Roles, r: Rollout, advantages: Tensor, returns: Tensor, optimizer, cfg: Config, world: common.World,
           step: int, shuffle: torch.Generator, places: list[str], run=None, state=None) -> dict[str, float]:
    """ppo_epochs passes over the rollout. Gradients of a minibatch are summed over micro-batches and ranks and divided
    by its number of response tokens, counted first. The first pass keeps the order of `score`, so its first ratio is
    exactly 1."""
    B = len(r.ids)
    policy, value = roles.trainable("policy"), roles.trainable("value")
    history: list[dict[str, float]] = []
    for epoch in range(cfg.ppo_epochs):
        order = torch.arange(B) if epoch == 0 else torch.randperm(B, generator=shuffle)
        for minibatch in plan(r, order, cfg):
            n = common.all_sum(float(r.response[torch.cat(minibatch)].sum()))
            stats: dict[str, float] = {}
            for rows in minibatch:
                part = rows.to(r.ids.device)
                ids, mask, response = cut(r, part)
                old_logp, old_values, adv, ret = (
                    x[part, :response.shape[1]] for x in (r.logp, r.values, advantages, returns))
                with autocast(world, roles.adapter is None):
                    logp, _ = policy_logprobs(roles, "policy", ids, mask, response, cfg.temperature)
                    p_loss, p_stats = policy_loss(logp, old_logp, adv, response, cfg.clip, n)
                p_loss.backward()
                with autocast(world, roles.adapter is None):
                    values = response_values(roles, ids, mask, response)
                    v_loss, v_stats = value_loss(values, old_values, ret, response, cfg.value_clip, n)
                v_loss.backward()
                for name, x in {"policy_loss": p_loss, "value_loss": v_loss, **p_stats,
                                **{"value_" + k: x for k, x in v_stats.items()}}.items():
                    stats[name] = stats.get(name, 0.0) + float(x.detach())
                gap = float(((logp.detach() - old_logp).abs() * response).max())
                stats["first_gap"] = max(stats.get("first_gap", 0.0), gap)
            if step == 0 and not history:
                common.check_gradients(roles.parameters())
            stats = {name: x if name == "first_gap" else common.all_sum(x) for name, x in stats.items()}
            common.sync_gradients([p for _, p in policy + value])
            norms = {"policy_norm": common.clip([p for _, p in policy], cfg.grad_clip),
                     "value_norm": common.clip([p for _, p in value], cfg.grad_clip)}
            common.check_finite({"policy loss": stats["policy_loss"], "value loss": stats["value_loss"], **norms}, step,
                                places, run, state)
            if step < cfg.value_warmup:
                for _, p in policy:
                    p.grad = None  # the value is right at end tokens only: let it learn first
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.append({**stats, **norms})
    return {"first_gap": history[0]["first_gap"], **{"first_" + k: history[0][k] for k in ("ratio",)},
            **{k: sum(h[k] for h in history) / len(history) for k in history[0] if k != "first_gap"}}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 = perfect, 0 = no better than a constant."""
    keep = mask == 1
    return float(1 - (returns - values)[keep].var() / returns[keep].var().clamp(min=1e-8))


@dataclass
class Learner:
    """What an update changes besides the weights: a state that lacks one of these would not resume."""
    optimizer: torch.optim.Optimizer
    controller: AdaptiveKL
    sampler: torch.Generator           # draws the answers, on every rank others
    shuffle: torch.Generator           # orders the minibatches


def start(roles: Roles, cfg: Config, world: common.World) -> Learner:
    policy, value = roles.trainable("policy"), roles.trainable("value")
    optimizer = common.optimizer([*policy, *value], [{"name": "policy", "params": policy, "lr": 1.0},
                                                     {"name": "value", "params": value, "lr": cfg.value_lr / cfg.lr}],
                                 betas=(0.9, 0.999), eps=1e-5)
    return Learner(optimizer, AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon),
                   torch.Generator(world.device).manual_seed(cfg.seed + 100003 * world.rank + 1),
                   torch.Generator().manual_seed(cfg.seed + 2))


def improve(roles: Roles, learner: Learner, batch: list[dict], tokenizer, cfg: Config, world: common.World, step: int,
            run=None, state=None) -> tuple[Rollout, dict[str, float]]:
    """One update: sample an answer per prompt, score, assign credit, several epochs of minibatches. -> the rollout and
    the figures of the log. Whoever trains with PPO calls this: main, and every experiment with a known answer."""
    t0 = time.perf_counter()
    r = rollout(roles, [p["ids"] for p in batch], tokenizer, cfg, learner.sampler)
    t1 = time.perf_counter()
    (score if step else one_by_one)(roles, r, cfg, world)
    coef = learner.controller.coef
    scores, kls, advantages, returns = credit(r, cfg, coef)
    t2 = time.perf_counter()
    lr = common.lr_at(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    places = [str(p.get("where", "?")) for p in batch]
    stats = update(roles, r, advantages, returns, learner.optimizer, cfg, world, step, learner.shuffle, places, run,
                   state)
    t3 = time.perf_counter()

    n, tokens = common.all_sum(len(batch)), common.all_sum(float(r.response.sum()))
    rewards, last = token_rewards(scores, kls, r.response, coef) * r.response, (r.response.sum(1) - 1)[:, None]
    per_answer = {name: common.all_sum(float(x.sum())) / n for name, x in (
        ("objective/kl", kls), ("objective/kl_k3", kl(r.logp, r.ref_logp, "k3") * r.response),
        ("objective/entropy", r.entropy), ("objective/scores", scores), ("objective/raw_scores", r.scores),
        ("objective/rlhf_reward", rewards),
        ("val/eos_rate", r.ended.float()), ("val/response_length", r.response.float()))}
    sampler_gap = common.all_sum(float(((r.sampler_logp - r.logp).abs() * r.response).sum()))
    spread = common.all_sum(float(((scores - per_answer["objective/scores"]) ** 2).sum())) / n
    power = common.all_sum(float((advantages ** 2 * r.response).sum())) / tokens
    learner.controller.update(per_answer["objective/kl"], int(n))
    return r, {**per_answer, "objective/non_score_reward": -coef * per_answer["objective/kl"], "kl_coef": coef,
               "policy/approxkl_avg": stats["approxkl"], "policy/clipfrac_avg": stats["clipfrac"],
               "policy/entropy_avg": per_answer["objective/entropy"] * n / tokens,
               "loss/policy_avg": stats["policy_loss"], "loss/value_avg": stats["value_loss"],
               "policy/surrogate_avg": stats["surrogate"], "val/error_avg": stats["value_error"],
               "objective/scores_std": spread ** 0.5, "val/advantage_rms": power ** 0.5,
               "val/last_return_gap": float((returns - rewards).gather(1, last).abs().max()),
               "val/clipfrac_avg": stats["value_clipfrac"], "val/ratio": stats["ratio"],
               "val/ratio_var": max(0.0, stats["ratio_sq"] - stats["ratio"] ** 2),
               **({} if cfg.one_pass and step else {"val/first_ratio_gap": stats["first_gap"]}),
               "val/largest_kl": float(kls.abs().max()),
               "val/explained_variance": explained_variance(r.values, returns, r.response),
               "val/num_eos_tokens": common.all_sum(float(r.ended.sum())), "val/sampler_gap": sampler_gap / tokens,
               "policy/grad_norm": stats["policy_norm"], "value/grad_norm": stats["value_norm"], "lr": lr,
               "time/generate": t1 - t0, "time/score": t2 - t1, "time/train": t3 - t2,
               "tokens_per_sec": tokens / (t3 - t0)}


def check_start(figures: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """At the first minibatch nothing has moved yet: ratio 1 and KL 0, or the run stops here."""
    gap, largest = figures["val/first_ratio_gap"], figures["val/largest_kl"]
    if max(gap, largest) > (1e-4 if dtype == torch.float32 else 2e-2):
        raise common.UserError(f"before the first update the policy must be the reference and the ratio 1, found "
                               f"|log ratio| up to {gap:.2e} and KL up to {largest:.2e} per token: sampling, scoring "
                               "and training do not compute the same distribution")
    return {"gap": gap, "kl": largest}


@torch.no_grad()
def evaluate(roles: Roles, prompts: list[dict], tokenizer, cfg: Config, world: common.World, run: common.Run,
             step: int) -> dict:
    """Held-out prompts, answered with the same seed every time: mean score, KL, share that ended, length."""
    generator = torch.Generator(world.device).manual_seed(cfg.seed + 7)
    mine, rows = prompts[world.rank::world.size], []
    for i in range(0, len(mine), cfg.batch_size):
        r = rollout(roles, [p["ids"] for p in mine[i:i + cfg.batch_size]], tokenizer, cfg, generator)
        rows += describe(score(roles, r, cfg, world), tokenizer, "eval")
    for row, prompt in zip(rows, mine):
        row["prompt"] = prompt["prompt"][-1]["content"]
    run.sample(step, rows)
    n = common.all_sum(len(rows))
    mean = {name: common.all_sum(sum(row[name] for row in rows)) / n for name in ("score", "kl", "ended", "tokens")}
    return {"eval/scores": mean["score"], "eval/kl": mean["kl"], "eval/eos_rate": mean["ended"],
            "eval/response_length": mean["tokens"]}


# ---------------------------------------------------------------- training

def main(cfg: Config) -> bool:
    # ---- setup: device, base, roles
    chat.check_format(cfg.template)
    world = common.setup(cfg.device, cfg.dtype, cfg.seed)
    full = cfg.lora_r == 0
    check_quant(cfg)
    if full and cfg.one_pass:
        raise common.UserError("--one_pass needs the four roles on one base, --lora_r 0 makes four models: drop one")
    if cfg.dry_run:
        memory.print_table(memory.estimate(checkpoints.read_config(cfg.init), "ppo", batch=cfg.micro_batch,
                                           prompt=cfg.max_prompt, response=cfg.response_len, rollout=cfg.batch_size,
                                           lora_r=cfg.lora_r, dtype=world.dtype, quant=cfg.quant,
                                           targets=checkpoints.our_linears(cfg.init, cfg.lora_targets),
                                           checkpointing=cfg.checkpointing, separate_models=full, merge=cfg.merge,
                                           device=world.device.type))
        return True
    model, tokenizer = checkpoints.load(cfg.init, world.device, torch.float32 if full else world.dtype, quant=cfg.quant)
    chat.use_format(tokenizer, cfg.template)
    roles = separate(cfg, model, world) if full else one_base(cfg, model, world)
    roles.policy.checkpointing = roles.value.model.checkpointing = cfg.checkpointing
    before = fingerprint(roles.reference)

    # ---- prompts, optimiser, run folder
    rows = formats.read_prompts(cfg.data, cfg.format, cfg.skip_bad)
    rows.print_report()
    if cfg.valid:
        held = formats.read_prompts(cfg.valid, cfg.format, cfg.skip_bad)[:cfg.eval_prompts]
    else:
        if len(rows) <= cfg.eval_prompts:
            raise common.UserError(f"{cfg.data} has {len(rows)} prompts and {cfg.eval_prompts} are to be held out: "
                                   "lower --eval_prompts or give --valid FILE")
        held, rows = rows[-cfg.eval_prompts:], rows[:-cfg.eval_prompts]
    prompts = data_batch.encode_prompts(rows, tokenizer, cfg.max_prompt)
    held = data_batch.encode_prompts(held, tokenizer, cfg.max_prompt)
    batches = data_batch.Batches(prompts, cfg.batch_size, cfg.seed, rank=world.rank, world=world.size)
    learner = start(roles, cfg, world)
    run = common.Run(cfg.out_dir, "ppo", cfg, world, resume=cfg.resume)
    run.total = cfg.steps
    step, episodes, first, invariants = 0, 0, {}, {}
    trained = [(f"{role}.{n}", p) for role in ("policy", "value") for n, p in roles.trainable(role)]

    def state() -> dict:
        return {"step": step, "episodes": episodes, "first": first, "invariants": invariants,
                "batches": batches.state(),
                "optimizer": learner.optimizer.state_dict(), "kl_coef": learner.controller.coef,
                "shuffle": learner.shuffle.get_state(),
                "weights": {name: p.detach() for name, p in trained}}

    if cfg.resume and (saved := run.load_state()):
        step, episodes, learner.controller.coef = saved["step"], saved["episodes"], saved["kl_coef"]
        first, invariants = saved["first"], saved["invariants"]
        batches.load_state(saved["batches"])
        learner.optimizer.load_state_dict(saved["optimizer"])
        learner.sampler.set_state(saved["sampler"])
        learner.shuffle.set_state(saved["shuffle"])
        with torch.no_grad():
            for name, p in trained:
                p.copy_(saved["weights"][name])

    while True:
        # ---- measure on held-out prompts
        if step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0):
            measured = evaluate(roles, held, tokenizer, cfg, world, run, step)
            first = first or measured
            if step == cfg.steps:
                measured["eval/reference_moved"] = float(fingerprint(roles.reference) != before)
            run.log(step, measured, show=("eval/scores", "eval/kl", "eval/eos_rate"))
        if step == cfg.steps:
            break

        # ---- one update: rollout, score, credit, epochs of minibatches
        batch = batches.next()
        r, figures = improve(roles, learner, batch, tokenizer, cfg, world, step, run, state())
        if step == 0:
            invariants = check_start(figures, world.dtype)

        # ---- log
        step, episodes = step + 1, episodes + int(common.all_sum(len(batch)))
        run.sample(step, describe(r, tokenizer, "train"))
        run.log(step, {**figures, "episode": episodes},
                show=("objective/scores", "objective/kl", "val/eos_rate", "tokens_per_sec"))
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save_state(step, state(), per_rank={"sampler": learner.sampler.get_state()})

    # ---- keep the result
    assert not measured["eval/reference_moved"], "the reference's weights changed during training"
    if world.main:
        export(roles, tokenizer, cfg, Path(run.dir))
    common.barrier()
    return common.gate("ppo", [
        ("ratio 1 at the first minibatch", invariants["gap"] < 1e-3, f"|log ratio| <= {invariants['gap']:.1e}"),
        ("KL 0 at the start", invariants["kl"] < 1e-3, f"{invariants['kl']:.1e}"),
        ("learned reward rose", measured["eval/scores"] > first["eval/scores"],
         f"{first['eval/scores']:+.2f} -> {measured['eval/scores']:+.2f} on {len(held)} held-out prompts"),
        ("KL stayed in reach", 0 < measured["eval/kl"] < 50, f"{measured['eval/kl']:.1f} nats per answer"),
        ("answers end", measured["eval/eos_rate"] > first["eval/eos_rate"] - 0.1,
         f"{first['eval/eos_rate']:.0%} -> {measured['eval/eos_rate']:.0%}"),
    ], advice="reward flat: raise --lr or --ppo_epochs, lower --kl_coef. KL runs away: raise --kl_coef or set "
              "--kl_target. Read samples.jsonl.", run=run)


def export(roles: Roles, tokenizer, cfg: Config, out: Path) -> None:
    """policy/ and value/ as adapters, and unless the base is in four bits model/, a model that other tools load."""
    base = str(checkpoints.resolve(cfg.init))
    if roles.adapter:
        lora.save(roles.policy, "policy", out / "policy", base=base)
        reward_stage.save(roles.value, tokenizer, out / "value", base)
        if cfg.quant:
            return keep_apart(tokenizer, out / "policy", cfg.init)
        lora.merge(roles.policy, "policy", keep_original=False)
        lora.strip(roles.policy)
    checkpoints.save(roles.policy, tokenizer, out / "model")
    print(f"saved {out / 'model'}   compare: python chat.py --compare {cfg.init} {out / 'model'}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        common.main(lambda: main(common.parse(Config)))
