"""A reward model and its ceiling: no model can be right more often than the labels are consistent.

Strings over eight letters, 3 to 11 long, then the end. The true reward of a string is known, and labels are Bernoulli
draws from Bradley & Terry's probability (1952), so the best possible accuracy is known too:

    r = sum of w[letter] + number of adjacent pairs (x, next(x)),  next = a fixed permutation
    P(a before b) = sigmoid(r(a) - r(b))          ceiling = E sigmoid(|r(a) - r(b)|) = 0.83

reward.py's losses learn from 2,000 to 100,000 pairs, once each, and from rankings of four at equal forward passes.

    python course/ceiling.py                   # the whole table (minutes)
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import common  # noqa: E402
import reward as reward_stage  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from reward import RewardModel  # noqa: E402

LETTERS, END = 8, 8
TOKENIZER, WORLD = SimpleNamespace(pad_id=END), common.World(torch.device("cpu"), torch.float32)
RULE = torch.Generator().manual_seed(0)
WORTH = 0.6 * torch.randn(LETTERS, generator=RULE, dtype=torch.float64)
NEXT = torch.randperm(LETTERS, generator=RULE).tolist()


def strings(n: int, generator: torch.Generator) -> list[list[int]]:
    lengths = torch.randint(3, 12, (n,), generator=generator).tolist()
    letters = torch.randint(LETTERS, (n, 11), generator=generator).tolist()
    return [row[:k] for row, k in zip(letters, lengths)]


def truth(rows: list[list[int]]) -> Tensor:
    worth = WORTH.tolist()
    return torch.tensor([sum(worth[x] for x in row) + sum(NEXT[a] == b for a, b in zip(row, row[1:])) for row in rows])


def groups(n: int, k: int, seed: int) -> list[dict]:
    """n rankings of k strings, best first: reward plus Gumbel noise, whose order is Plackett & Luce's and whose pairs
    are Bradley & Terry's."""
    generator = torch.Generator().manual_seed(seed)
    rows = strings(n * k, generator)
    noise = -(-torch.rand(n, k, generator=generator, dtype=torch.float64).log()).log()
    order = (truth(rows).view(n, k) + noise).argsort(1, descending=True).tolist()
    return [{"sequences": [[*rows[g * k + i], END] for i in ranked]} for g, ranked in enumerate(order)]


def learn(data: list[dict], seed: int, sequences: int = 256) -> RewardModel:
    """One pass over the rankings, `sequences` forward passes a step, Adam with a rate that falls to 0."""
    torch.manual_seed(seed)
    judge = RewardModel(Transformer(ModelConfig(vocab_size=LETTERS + 1, hidden_size=64, intermediate_size=192,
                                                num_layers=2, num_heads=4, max_positions=32)))
    judge.model.lm_head.requires_grad_(False)
    size = sequences // len(data[0]["sequences"])
    cfg, steps = reward_stage.Config(micro_batch=size, lora_r=0, grad_clip=0.0), len(data) // size
    optimizer = torch.optim.Adam([p for p in judge.parameters() if p.requires_grad], lr=1.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = common.lr_at(step, steps, 2e-3, 20, "linear")
        reward_stage.improve(judge, data[step * size:(step + 1) * size], optimizer, TOKENIZER, cfg, WORLD, step)
    return judge


@torch.no_grad()
def measure(judge: RewardModel, pairs: int = 20000) -> dict[str, float]:
    """On new strings: accuracy on noisy labels beside the ceiling, correlation with the truth and the slope on it."""
    data = groups(pairs, 2, seed=123)
    rows = [row[:-1] for group in data for row in group["sequences"]]
    scores = torch.cat([judge(*reward_stage.collate(data[i:i + 2000], END, "cpu")[:2])
                        for i in range(0, pairs, 2000)]).double()
    true = truth(rows)
    s, t = scores - scores.mean(), true - true.mean()
    return {"accuracy": float((scores[::2] > scores[1::2]).float().mean()),
            "ceiling": float(torch.sigmoid((true[::2] - true[1::2]).abs()).mean()),
            "pearson": float((s * t).mean() / (s.std(correction=0) * t.std(correction=0))),
            "slope": float((s * t).mean() / (t * t).mean())}


def run(pairs: int, k: int = 2, seed: int = 0, held_out: int = 20000) -> dict[str, float]:
    """As many strings as in `pairs` pairs, in rankings of k."""
    return measure(learn(groups(2 * pairs // k, k, seed + 1), seed), held_out)


if __name__ == "__main__":
    for pairs, k in ((2000, 2), (10000, 2), (40000, 2), (100000, 2), (100000, 4)):
        print(f"{pairs:7} pairs, K = {k}:  " + "  ".join(f"{n} {x:.3f}" for n, x in run(pairs, k).items()), flush=True)
