"""Randomwalks, the small benchmark that trlx made known: a model of random paths in a graph learns the shortest ones.

21 nodes; node 0 is the goal and, for us, the end token. 1000 random walks teach the model what a path looks like, then
PPO is paid by optimality, without a price of KL:

    optimality = (10 - L) / (10 - L*)      L nodes of the path, L* of the shortest; 10 for one that does not arrive

It is a demonstration more than a proof: five of the eight classic mistakes that can be made here pass it (the zoo's
certificates do not let them). The graph is that of seed 1000, as in the original.

    python course/randomwalks.py               # one seed, a line every ten updates
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import common  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from data import batch as data_batch  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from reward import RewardModel  # noqa: E402

NODES, ROOM, GOAL = 21, 9, 0                                   # ROOM: steps behind the first node
WORLD = common.World(torch.device("cpu"), torch.float32)
TOKENIZER = SimpleNamespace(eos_ids=[GOAL], pad_id=GOAL, decode=lambda ids: " ".join(map(str, ids)))


class Graph:
    """Edges, 1000 random walks and the shortest path from every node."""
    def __init__(self, seed: int = 1000):
        random = np.random.RandomState(seed)
        while True:
            self.edges = random.rand(NODES, NODES) > 0.9
            np.fill_diagonal(self.edges, False)
            if self.edges.any(1).all():
                break
        self.edges[GOAL] = False
        self.edges[GOAL, GOAL] = True                          # whoever has arrived stays
        self.walks = []
        for _ in range(1000):
            walk = [random.randint(1, NODES)]
            while len(walk) < ROOM + 1 and walk[-1] != GOAL:
                walk.append(random.choice(self.edges[walk[-1]].nonzero()[0]))
            self.walks.append([int(node) for node in walk])
        length, reached = {GOAL: 1}, [GOAL]                    # breadth first, from the goal backwards
        for node in reached:
            for before in self.edges[:, node].nonzero()[0].tolist():
                if before not in length:
                    length[before] = length[node] + 1
                    reached.append(before)
        self.shortest = [min(ROOM + 1, length.get(node, ROOM + 1)) for node in range(NODES)]
        self.starts = [n for n in range(1, NODES) if self.shortest[n] < ROOM + 1]

    def optimality(self, path: list[int]) -> float:
        """Of a path from its first node; what is behind the goal does not count."""
        path = path[:path.index(GOAL) + 1] if GOAL in path else path
        arrives = path[-1] == GOAL and all(self.edges[a, b] for a, b in zip(path, path[1:]))
        nodes = len(path) if arrives else ROOM + 1
        return (ROOM + 1 - nodes) / (ROOM + 1 - self.shortest[path[0]])

    def judge(self, ids: Tensor, mask: Tensor, response: Tensor) -> Tensor:
        return torch.tensor([self.optimality(i[m == 1].tolist()) for i, m in zip(ids, mask)])


def fine_tune(graph: Graph, seed: int, epochs: int = 40) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=NODES, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4,
                                    max_positions=32))
    rows = [{"ids": walk, "mask": [0, *[1] * (len(walk) - 1)]} for walk in graph.walks]
    batches, optimizer = data_batch.Batches(rows, 100, seed), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs * len(rows) // 100):
        sft.batch_loss(model, *sft.collate(batches.next(), GOAL, "cpu")).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def copy(model: Transformer) -> Transformer:
    other = Transformer(model.config)
    other.load_state_dict(model.state_dict())
    return other


def train(seed: int, steps: int = 100, show: bool = False, **changes) -> list[float]:
    """Mean optimality of the fine-tuned model's answers, then of each update's, all sampled at temperature 1."""
    graph = Graph()
    cfg = ppo.Config(**{"steps": steps, "batch_size": 128, "micro_batch": 128, "response_len": ROOM, "kl_coef": 0.0,
                        "missing_eos": None, "lr": 3e-4, "value_lr": 1e-3, "schedule": "constant", "lora_r": 0,
                        "seed": seed, **changes})
    model = fine_tune(graph, seed)
    value = RewardModel(copy(model))
    ppo.start_value(value, None)
    value.model.lm_head.requires_grad_(False)
    roles = ppo.Roles(model, copy(model).requires_grad_(False), graph.judge, value, None)
    learner, draw = ppo.start(roles, cfg, WORLD), torch.Generator().manual_seed(seed)
    curve = []
    for step in range(steps):
        starts = torch.randint(len(graph.starts), (cfg.batch_size,), generator=draw).tolist()
        _, figures = ppo.improve(roles, learner, [{"ids": [graph.starts[i]]} for i in starts], TOKENIZER, cfg, WORLD,
                                 step)
        curve.append(figures["objective/scores"])
        if show and step % 10 == 0:
            print(f"{step:4}  optimality {curve[-1]:.3f}  length {figures['val/response_length']:.2f}", flush=True)
    return curve


if __name__ == "__main__":
    train(0, show=True)
