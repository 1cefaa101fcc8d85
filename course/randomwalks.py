"""Randomwalks, the small benchmark that trlx made known: a model of random paths in a graph learns the shortest ones.

21 nodes; node 0 is the goal and, for us, the end token. 1000 random walks teach the model what a path looks like, then
PPO is paid by optimality, without a price of KL:

    optimality = (10 - L) / (10 - L*)      L nodes of the path, L* of the shortest; 10 for one that does not arrive

It is a demonstration more than a proof: several classic mistakes pass it (the zoo's certificates do not let
them). The graph is that of seed 1000, as in the original.

    python course/randomwalks.py               # -> out/randomwalks, a run folder for report.py and check.py
    python course/randomwalks.py --bands       # ten seeds -> course/expected/randomwalks.json
"""
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import bands  # noqa: E402
import common  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from data import batch as data_batch  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from reward import RewardModel  # noqa: E402

NODES, ROOM, GOAL = 21, 9, 0                                   # ROOM: steps behind the first node
PATHS = 20000                                                  # that the fine-tuned model is measured by
WORLD = common.World(torch.device("cpu"), torch.float32)
TOKENIZER = SimpleNamespace(eos_ids=[GOAL], pad_id=GOAL, decode=lambda ids: " ".join(map(str, ids)))


@dataclass
class Config(ppo.Config):
    # --- randomwalks ---
    steps: int = 100
    batch_size: int = 128
    micro_batch: int = 128
    response_len: int = ROOM
    kl_coef: float = 0.0
    missing_eos: float | None = None
    ppo_epochs: int = 2                # with four, one seed of sixteen stayed with a second-best path of one node
    lr: float = 3e-4
    value_lr: float = 1e-3
    schedule: str = "constant"
    lora_r: int = 0
    out_dir: str = "out/randomwalks"
    # --- expected curves ---
    expected: str = "course/expected/randomwalks.json" # drawn behind this run's, where the settings are the same
    bands: bool = False                # run all seeds and write that file
    seeds: tuple[int, ...] = tuple(range(10))


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
    cfg = sft.Config(micro_batch=100, lora_r=0, grad_clip=0.0)
    for step in range(epochs * len(rows) // 100):
        sft.improve(model, batches.next(), optimizer, TOKENIZER, cfg, WORLD, step)
    return model


def measure(seed: int) -> float:
    """Mean optimality of the fine-tuned model, to 0.003: of PATHS paths, as many from every first node."""
    graph = Graph()
    first = torch.tensor(graph.starts).repeat(PATHS // len(graph.starts))[:, None]
    rest = fine_tune(graph, seed).generate(first, ROOM, eos_ids=(GOAL,), pad_id=GOAL,
                                           generator=torch.Generator().manual_seed(seed))
    return statistics.mean(graph.optimality(path) for path in torch.cat((first, rest), 1).tolist())


def copy(model: Transformer) -> Transformer:
    other = Transformer(model.config)
    other.load_state_dict(model.state_dict())
    return other


def train(seed: int, steps: int = 100, **changes) -> list[float]:
    """Mean optimality of the fine-tuned model's answers, then of each update's, all sampled at temperature 1."""
    return walk(Config(seed=seed, steps=steps, **changes))


def walk(cfg: Config, run: common.Run | None = None) -> list[float]:
    graph, seed = Graph(), cfg.seed
    model = fine_tune(graph, seed)
    value = RewardModel(copy(model))
    ppo.start_value(value, None)
    value.model.lm_head.requires_grad_(False)
    roles = ppo.Roles(model, copy(model).requires_grad_(False), graph.judge, value, None)
    learner, draw = ppo.start(roles, cfg, WORLD), torch.Generator().manual_seed(seed)
    curve = []
    for step in range(cfg.steps):
        starts = torch.randint(len(graph.starts), (cfg.batch_size,), generator=draw).tolist()
        _, figures = ppo.improve(roles, learner, [{"ids": [graph.starts[i]]} for i in starts], TOKENIZER, cfg, WORLD,
                                 step)
        curve.append(figures["objective/scores"])
        if run:
            run.log(step + 1, figures, show=("objective/scores", "val/response_length", "val/eos_rate"))
    return curve


def main(cfg: Config) -> bool:
    if cfg.bands:
        return bands.make(cfg.expected, {"randomwalks": cfg}, main, cfg.seeds)
    torch.set_num_threads(1)                                   # the models are tiny: a second thread would only wait
    run = common.Run(cfg.out_dir, "ppo", cfg, WORLD)
    run.total = cfg.steps
    curve = walk(cfg, run)
    best = max(statistics.mean(curve[max(0, i - 5):i]) for i in range(1, len(curve) + 1))
    return common.gate("randomwalks", [("optimality at least 0.98", best >= 0.98, f"{best:.3f} over five updates")],
                       advice="the demonstration is known to work: python course/check.py RUN_DIR", run=run)


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
