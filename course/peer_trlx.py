"""Randomwalks with trlx's own loss, beside ours: what a user of the original would have got.

trlx (github.com/CarperAI/trlx, dormant since 2024) published its curve in a Weights & Biases project only, so it is run
here. Its `PPOConfig.loss`, `get_advantages_and_returns` and `whiten` are taken from a checkout at run time: nothing of
trlx is in this repository, and none of what it depends on is needed. Around them stands its recipe as its example and
trainer have it: one network with a value head (an MLP twice as wide) on the policy's last hidden states, one AdamW of
rate 3e-4 and betas 0.9, 0.95, value loss times 1.2, 128 rollouts, 4 epochs of batches of 100, whitening in each batch.
Graph, walks, network, fine-tuning and sampler are course/randomwalks.py's.

    git clone https://github.com/CarperAI/trlx
    python course/proof.py --only randomwalks,trlx --trlx trlx        # both curves into docs/results/proof.json
"""
import __future__

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import common  # noqa: E402
import ppo  # noqa: E402
from course import randomwalks  # noqa: E402

WANTED = {"trlx/models/modeling_ppo.py": ("get_advantages_and_returns", "loss"),
          "trlx/utils/modeling.py": ("whiten", "flatten_dict", "get_tensor_stats")}


def functions(checkout: Path) -> SimpleNamespace:
    """The functions of WANTED, compiled from the checkout's files without importing it."""
    names = {"torch": torch, "np": np, "dist": torch.distributed, "MutableMapping": dict}
    for file, wanted in WANTED.items():
        if not (checkout / file).exists():
            raise common.UserError(f"{checkout / file} does not exist: give the folder of a checkout of CarperAI/trlx")
        tree = ast.parse((checkout / file).read_text(encoding="utf-8"))
        found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in wanted]
        found = [n for n in found if n.name != "loss" or any(a.arg == "returns" for a in n.args.args)]
        module = ast.Module(found, type_ignores=[])                            # annotations are not evaluated:
        exec(compile(module, file, "exec", flags=__future__.annotations.compiler_flag), names)
    return SimpleNamespace(**{name: names[name] for wanted in WANTED.values() for name in wanted})


def train(checkout: str, seed: int, steps: int = 100) -> list[float]:
    """Mean optimality of each update's answers, as randomwalks.train returns it."""
    theirs, graph = functions(Path(checkout)), randomwalks.Graph()
    method = SimpleNamespace(gamma=1, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=1.2)
    policy = randomwalks.fine_tune(graph, seed)
    C = policy.config.hidden_size
    head = nn.Sequential(nn.Linear(C, 2 * C), nn.ReLU(), nn.Linear(2 * C, 1))
    optimizer = torch.optim.AdamW([*policy.parameters(), *head.parameters()], 3e-4, (0.9, 0.95), 1e-8, 1e-6)
    cfg = ppo.Config(response_len=randomwalks.ROOM, lora_r=0)
    roles = ppo.Roles(policy, policy, None, None, None)
    draw, curve = torch.Generator().manual_seed(seed), []

    def read(r: ppo.Rollout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = policy.hidden(r.ids[rows], r.mask[rows])[:, -r.R - 1:-1]
        logp = ppo.token_logprobs(policy.lm_head(h), r.ids[rows, -r.R:])
        return logp, head(h).squeeze(-1)

    for _ in range(steps):
        starts = torch.randint(len(graph.starts), (128,), generator=draw).tolist()
        r = ppo.rollout(roles, [[graph.starts[i]] for i in starts], randomwalks.TOKENIZER, cfg, draw)
        scores, last = graph.judge(r.ids, r.mask, r.response), r.response.sum(1, keepdim=True) - 1
        curve.append(float(scores.mean()))
        rewards = torch.zeros(r.response.shape).scatter(1, last, scores[:, None])
        with torch.no_grad():
            old_logp, old_values = (x * r.response for x in read(r, torch.arange(128)))
        for _ in range(4):
            for rows in torch.randperm(128, generator=draw).split(100):
                A, returns = theirs.get_advantages_and_returns(method, old_values[rows], rewards[rows], r.R)
                logp, values = read(r, rows)
                loss, _ = theirs.loss(method, logp, values, old_logp[rows], old_values[rows], A, returns,
                                      r.response[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return curve
