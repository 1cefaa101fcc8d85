"""The enumerable tree: a language with 121 answers, in which PPO's optimum and its gradient are known exactly.

Four tokens, three letters and the end; at most four tokens an answer: {a, b, c}^k end for k = 0..3, or four letters
without an end. Four ragged prompts. The end token is also the padding and the separator of the prompts, so a mask made
from ids instead of positions is wrong at once. The gold reward of an answer:

    R = number of "ab" + 1/2 [its first letter is the prompt's last] + 1/2 [exactly three letters];   -1 without an end

The KL-regularised objective and its optimum are sums over 121 terms (Korbak et al. 2022, arXiv 2205.11275):

    J(p)   = sum_y p(y) (R(y) - beta log p(y) / ref(y))
    p*(y)  ~ ref(y) exp(R(y) / beta),   J* = beta log sum_y ref(y) exp(R(y) / beta)
    regret = (J* - J) / (J* - J(ref))          0: the optimum is reached, 1: nothing was learned

Models, rollouts, scores and updates are those of ppo.py; what is computed here, from plain log-softmaxes, is the answer
they are compared with.

    python course/tree.py                      # whole models -> out/tree, a run folder for report.py and check.py
    python course/tree.py --lora_r 8 --lr 3e-3 --value_lr 3e-3 --out_dir out/adapters      # adapters on one base
    python course/tree.py --bands              # both, five seeds each -> course/expected/tree.json
"""
import dataclasses
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import bands  # noqa: E402
import checkpoints  # noqa: E402
import common  # noqa: E402
import lora  # noqa: E402
import ppo  # noqa: E402
import reward as reward_stage  # noqa: E402
from data import batch as data_batch  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from reward import RewardModel  # noqa: E402

END, A, B, C = 0, 1, 2, 3
R = 4                                                          # tokens an answer may take
PROMPTS = [[A, END], [B, END], [A, B, END], [C, C, END]]
MISSING_END = -1.0
TOKENIZER = SimpleNamespace(eos_ids=[END], pad_id=END, decode=lambda ids: "".join("|abc"[i] for i in ids))
WORLD = common.World(torch.device("cpu"), torch.float32)


@dataclass
class Config(ppo.Config):
    # --- as the thresholds were measured ---
    steps: int = 60
    batch_size: int = 256
    micro_batch: int = 256
    response_len: int = R
    temperature: float = 0.7
    kl_coef: float = 0.3
    lr: float = 1e-3
    value_lr: float = 1e-3
    lora_r: int = 0                    # 8, with rates of 3e-3: adapters on one base
    missing_eos: float | None = MISSING_END
    out_dir: str = "out/tree"
    # --- expected curves ---
    expected: str = "course/expected/tree.json"        # drawn behind this run's, where the settings are the same
    bands: bool = False                # run all seeds in both layouts and write that file
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


def config(**changes) -> Config:
    return Config(**changes)


# ---------------------------------------------------------------- the language

def answers() -> list[list[int]]:
    """All 121: 40 that end, 81 that do not."""
    ended = [[*y, END] for k in range(R) for y in itertools.product((A, B, C), repeat=k)]
    return ended + [list(y) for y in itertools.product((A, B, C), repeat=R)]


def true_reward(prompt: list[int], answer: list[int]) -> float:
    letters = answer[:-1] if answer[-1] == END else answer
    pairs = sum(letters[i:i + 2] == [A, B] for i in range(len(letters) - 1))
    return pairs + 0.5 * (letters[:1] == [prompt[-2]]) + 0.5 * (len(letters) == 3)


def gold(ids: Tensor, mask: Tensor, response: Tensor) -> Tensor:
    """The true reward as ppo.py's judge: (N, P + R) ids -> (N,)."""
    n = response.shape[1]
    rows = [(i[:-n][m[:-n] == 1].tolist(), i[-n:][r == 1].tolist()) for i, m, r in zip(ids, mask, response)]
    return torch.tensor([true_reward(p, y) for p, y in rows])


def everything() -> ppo.Rollout:
    """Every answer to every prompt as one rollout of 484 rows."""
    rows = [(p, y) for p in PROMPTS for y in answers()]
    prompt, prompt_mask = data_batch.pad([p for p, _ in rows], END, side="left")
    new, response = data_batch.pad([y for _, y in rows], END)
    ended = torch.tensor([y[-1] == END for _, y in rows])
    return ppo.Rollout(torch.cat((prompt, new), 1), torch.cat((prompt_mask, response), 1), response, ended,
                       torch.zeros(new.shape))


# ---------------------------------------------------------------- models

def network(seed: int, width: int = 64) -> Transformer:
    """A random transformer with small logits: every answer can be sampled, none is certain. Where rare answers are
    never drawn, what training cannot find would look like a bug. The head reads a quarter of the channels, which are
    quiet at first: large logits are within reach, also for adapters below a frozen head. Positions are learned: RoPE
    would forgive positions that count the padding."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=4, hidden_size=width, intermediate_size=2 * width, num_layers=2,
                                    num_heads=4, max_positions=32, positions="learned"))
    quiet = torch.where(torch.arange(width) < width * 3 // 4, 1.0, 0.15)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1]))
            if name.startswith("embed"):
                p.mul_(math.sqrt(width) * quiet)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_(quiet[:, None])
        model.lm_head.weight.mul_(2 * (quiet < 1))
    return model


def rankings(n: int, generator: torch.Generator) -> Iterator[list[dict]]:
    """Batches of n rankings of four answers, best first: gold plus Gumbel noise, which is Bradley & Terry's."""
    r = everything()
    truth = torch.where(r.ended, gold(r.ids, r.mask, r.response), MISSING_END)
    sequences = [ids[mask == 1].tolist() for ids, mask in zip(r.ids, r.mask)]
    while True:
        groups = []
        for k in range(n):
            rows = torch.randint(0, 121, (4,), generator=generator) + 121 * (k % 4)
            noise = -(-torch.rand(4, generator=generator).log()).log()
            best = (2 * truth[rows] + noise).argsort(descending=True)
            groups.append({"sequences": [sequences[i] for i in rows[best]]})
        yield groups


def teach(judge: RewardModel, seed: int, steps: int = 80, log: list[dict] | None = None) -> RewardModel:
    """reward.py on rankings; `log` gets what it logs of each step."""
    batches, r = rankings(32, torch.Generator().manual_seed(seed)), everything()
    cfg = reward_stage.Config(micro_batch=32, lora_r=0, grad_clip=0.0)
    judge.model.lm_head.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in judge.parameters() if p.requires_grad], lr=3e-3)
    for step, groups in zip(range(steps), batches):
        figures = reward_stage.improve(judge, groups, optimizer, TOKENIZER, cfg, WORLD, step)
        if log is not None:
            log.append({"step": step + 1, **figures})
    with torch.no_grad():
        judge.normalize(judge(r.ids, r.mask))
    return judge


def build(cfg: ppo.Config, learned: bool = False, lessons: int = 80) -> ppo.Roles:
    """The four roles as ppo.py builds them from files: whole models with lora_r 0, else adapters on one base. The judge
    is a learned reward model, or the true reward."""
    base = network(cfg.seed)
    torch.manual_seed(cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(cfg, init=f"{folder}/base", reward=f"{folder}/reward")
        checkpoints.save(base, None, Path(cfg.init))
        body = network(cfg.seed)
        if cfg.lora_r:
            lora.apply(body, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, "reward")
        judge = teach(RewardModel(body, "reward" if cfg.lora_r else None), cfg.seed, lessons if learned else 2)
        reward_stage.save(judge, None, Path(cfg.reward), base=cfg.init)
        roles = (ppo.one_base if cfg.lora_r else ppo.separate)(cfg, base, WORLD)
    if not learned:
        roles.reward = gold
    return roles


# ---------------------------------------------------------------- the exact answer

class Exact:
    """J, p* and the regret by enumeration, of the policy as it is now and the reference as it must be. Only `forward`
    is shared with the code under test: log-probabilities, sums and rewards are written out here."""
    def __init__(self, roles: ppo.Roles, cfg: ppo.Config):
        self.roles, self.r, self.beta, self.T = roles, everything(), cfg.kl_coef, cfg.temperature
        with torch.no_grad():
            self.ref = self.log_p(network(cfg.seed).to(roles.policy.norm.weight.dtype))
            true = gold(self.r.ids, self.r.mask, self.r.response)
            learned = isinstance(roles.reward, RewardModel)
            judged = roles.reward(self.r.ids, self.r.mask) if learned else true
        self.gold, self.reward = (torch.where(self.r.ended, x.to(self.ref.dtype), MISSING_END).view(4, 121)
                                  for x in (true, judged))

    def log_p(self, model: Transformer) -> Tensor:
        """(4, 121) log-probability of each answer."""
        log_p = (model(self.r.ids, self.r.mask) / self.T).log_softmax(-1)
        log_p = log_p[:, -R - 1:-1].gather(2, self.r.ids[:, -R:, None]).squeeze(2)
        return (log_p * self.r.response).sum(1).view(4, 121)

    def policy(self) -> Tensor:
        with lora.use(self.roles.policy, self.roles.adapter):
            return self.log_p(self.roles.policy)

    def J(self, log_p: Tensor) -> Tensor:
        return (log_p.exp() * (self.reward - self.beta * (log_p - self.ref))).sum(1).mean()

    def optimum(self) -> Tensor:
        if not self.beta:                                      # the limit: where KL costs nothing, the best answer
            return self.reward.max(1).values.mean()
        return self.beta * torch.logsumexp(self.ref + self.reward / self.beta, 1).mean()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        log_p, best = self.policy(), self.optimum()
        p = log_p.exp()
        return {"exact/regret": float((best - self.J(log_p)) / (best - self.J(self.ref))),
                "exact/kl": float((p * (log_p - self.ref)).sum(1).mean()),
                "exact/gold": float((p * self.gold).sum(1).mean())}


def train(roles: ppo.Roles, cfg: ppo.Config, every: int = 10, run: common.Run | None = None) -> list[dict[str, float]]:
    """cfg.steps updates with ppo.py; its figures of each update, with the exact regret and KL every few of them, and at
    the end whether the reference has moved."""
    exact, learner, history = Exact(roles, cfg), ppo.start(roles, cfg, WORLD), []
    before = ppo.fingerprint(roles.reference)
    batch = [{"ids": PROMPTS[i % 4]} for i in range(cfg.batch_size)]
    for step in range(cfg.steps):
        _, figures = ppo.improve(roles, learner, batch, TOKENIZER, cfg, WORLD, step)
        if (step + 1) % every == 0 or step + 1 == cfg.steps:
            figures |= exact.figures()
        if step + 1 == cfg.steps:
            figures["eval/reference_moved"] = float(ppo.fingerprint(roles.reference) != before)
        if run:
            run.log(step + 1, figures, show=("objective/scores", "objective/kl", "exact/kl", "exact/regret"))
        history.append({"step": step + 1, **figures})
    return history


def main(cfg: Config) -> bool:
    if cfg.bands:
        return bands.make(cfg.expected, {"whole models": cfg, "adapters": dataclasses.replace(
            cfg, lora_r=8, lr=3e-3, value_lr=3e-3)}, main, cfg.seeds)
    torch.set_num_threads(1)                                   # the models are tiny: a second thread would only wait
    run = common.Run(cfg.out_dir, "ppo", cfg, WORLD)
    run.total = cfg.steps
    regret = train(build(cfg), cfg, every=2, run=run)[-1]["exact/regret"]
    return common.gate("tree", [("regret at most 0.02", regret <= 0.02, f"{regret:.4f}")], run=run,
                       advice="the answer is known: python course/check.py RUN_DIR, then make proof and make zoo")


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
