"""One PPO update, a part of kernels.e2e: ppo.improve with four roles on one base, beside the same with transformers.

The peer is what a user of these libraries writes: three LoRA adapters on one LlamaForCausalLM (policy, value, reward),
the reference is the model with adapters disabled, `generate` samples, log-probabilities come from the logits of the
answer, a linear layer on the last hidden state is the value head. Losses, advantages, the number of micro-batches and
epochs are ours: what differs is the model, its heads and its loop of generation.
"""
from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import common
import lora
import ppo
from model import Transformer
from reward import RewardModel

TOKENIZER = SimpleNamespace(eos_ids=(-1,), pad_id=0)       # no end token: every answer has its full length


def settings(tiny: bool, **changes) -> ppo.Config:
    """DeepSpeed-Chat's shape: prompts and answers of 256 tokens, 64 of them."""
    n, rows, micro = (16, 8, 4) if tiny else (256, 64, 8)
    return ppo.Config(**{"max_prompt": n, "response_len": n, "batch_size": rows, "micro_batch": micro, "ppo_epochs": 4,
                         "missing_eos": None, "kl_coef": 0.05, "steps": 100, **changes})


def ppo_step(table, shape: dict) -> None:
    from kernels import e2e
    cfg = settings(table.tiny)
    prompts = torch.randint(5, shape["vocab_size"], (cfg.batch_size, cfg.max_prompt),
                            generator=torch.Generator().manual_seed(0))

    def report(who: str, update, warm_up) -> None:
        """A small update first: kernels compile, libraries choose. Then one that counts."""
        warm_up()
        table.clear()
        start = table.wait()
        parts = update()
        seconds = table.wait() - start
        table.put(what="PPO step", who=who, answers=cfg.batch_size, tokens=prompts.numel() + cfg.batch_size *
                  cfg.response_len, epochs=cfg.ppo_epochs, s=seconds, samples_per_s=cfg.batch_size / seconds,
                  peak_gib=table.peak(), **parts)

    def ours() -> None:
        model, _ = e2e.our_model(table, shape)
        world = common.World(torch.device(table.args.device), torch.bfloat16)
        roles = four_roles(model)
        for graph, one_pass in ((False, False), (True, False), (True, True)):
            changes = {"graph": graph, "one_pass": one_pass}
            name = "ours" + ", graph" * graph + ", one_pass" * one_pass

            def update(cfg: ppo.Config) -> dict:
                rows = prompts[:cfg.batch_size].tolist()
                _, figures = ppo.improve(roles, ppo.start(roles, cfg, world), [{"ids": row} for row in rows], TOKENIZER,
                                         cfg, world, 0)
                return {k.replace("time/", "s_"): v for k, v in figures.items() if k.startswith("time/")}
            small = settings(table.tiny, batch_size=cfg.micro_batch, response_len=20, ppo_epochs=1, **changes)
            both = functools.partial(update, settings(table.tiny, **changes)), functools.partial(update, small)
            table.run(name, functools.partial(report, name, *both))

    def theirs() -> None:
        peer = Peer(e2e.their_model(table, shape)[0], table)
        small = settings(table.tiny, batch_size=cfg.micro_batch, response_len=20, ppo_epochs=1)
        report("transformers + peft", lambda: peer.update(prompts, cfg), lambda: peer.update(prompts, small))
    table.run("PPO step, ours", ours)
    if e2e.installed("peft"):
        table.run("PPO step, transformers + peft", theirs)


def four_roles(model: Transformer) -> ppo.Roles:
    for name in ("policy", "value", "reward"):
        lora.apply(model, 16, 32.0, name=name)
    value, reward = RewardModel(model, "value"), RewardModel(model, "reward")
    ppo.start_value(value, reward)
    ppo.freeze(reward)
    return ppo.Roles(model, model, reward, value, "policy")


class Peer:
    """The update on transformers + peft."""
    def __init__(self, model: nn.Module, table):
        from peft import LoraConfig, get_peft_model
        how = LoraConfig(r=16, lora_alpha=32, target_modules=[*lora.ALL_LINEAR])
        self.table, self.model = table, get_peft_model(model, how, adapter_name="policy")
        for name in ("value", "reward"):
            self.model.add_adapter(name, how)
        C, device = model.config.hidden_size, table.args.device
        self.heads = {name: nn.Linear(C, 1, device=device) for name in ("value", "reward")}
        trained = [p for n, p in self.model.named_parameters() if "lora_" in n and ".reward." not in n]
        self.groups = trained, list(self.heads["value"].parameters())
        self.optimizer = torch.optim.AdamW([*trained, *self.groups[1]], lr=1e-4, betas=(0.9, 0.999), eps=1e-5,
                                           fused=table.gpu)

    def logprobs(self, ids: Tensor, R: int) -> tuple[Tensor, Tensor]:
        """Of the last R tokens of each row, and the entropies."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, -R - 1:-1].float()
        logp = logits.log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(2, ids[:, -R:, None])[:, :, 0], entropy

    def values(self, name: str, ids: Tensor) -> Tensor:
        self.model.set_adapter(name)
        h = self.model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.heads[name](h.float())[:, :, 0]

    @torch.no_grad()
    def score(self, ids: Tensor, R: int) -> tuple[Tensor, ...]:
        self.model.set_adapter("policy")
        logp, _ = self.logprobs(ids, R)
        with self.model.disable_adapter():
            ref_logp, _ = self.logprobs(ids, R)
        return logp, ref_logp, self.values("value", ids)[:, -R - 1:-1], self.values("reward", ids)[:, -1]

    def update(self, prompts: Tensor, cfg: ppo.Config) -> dict:
        prompts, R, table = prompts[:cfg.batch_size].to(self.table.args.device), cfg.response_len, self.table
        times = [table.wait()]
        self.model.set_adapter("policy")
        self.model.eval()
        with torch.no_grad():
            ids = self.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=R,
                                      min_new_tokens=R, do_sample=True, top_k=0, pad_token_id=0)
        times.append(table.wait())
        scored = [self.score(part, R) for part in ids.split(cfg.micro_batch)]
        logp, ref_logp, values, scores = (torch.cat(x) for x in zip(*scored))
        mask = torch.ones_like(ids[:, -R:])
        rewards = ppo.token_rewards(scores, logp - ref_logp, mask, cfg.kl_coef)
        advantages, returns = ppo.gae(rewards, values, mask, cfg.gamma, cfg.lam)
        advantages = ppo.whiten(advantages, mask)
        times.append(table.wait())
        for _ in range(cfg.ppo_epochs):
            for rows in torch.randperm(len(ids)).to(ids.device).split(cfg.micro_batch):
                n = mask.sum()
                self.model.set_adapter("policy")
                new, _ = self.logprobs(ids[rows], R)
                ppo.policy_loss(new, logp[rows], advantages[rows], mask[rows], cfg.clip, n)[0].backward()
                v = self.values("value", ids[rows])[:, -R - 1:-1]
                ppo.value_loss(v, values[rows], returns[rows], mask[rows], cfg.value_clip, n)[0].backward()
            for group in self.groups:
                torch.nn.utils.clip_grad_norm_(group, cfg.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        times.append(table.wait())
        return dict(zip(("s_generate", "s_score", "s_train"), (b - a for a, b in zip(times, times[1:]))))
