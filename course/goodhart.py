"""The Goodhart laboratory: a reward model learned from noisy labels, optimised until the truth gets worse.

A micro-language with a waiter's answers ("yes the soup is warm and fresh enjoy") and a gold reward that a program
computes. From nothing: a small transformer learns the language (sft.py), pairs of its answers get labels with
Bradley & Terry's noise, a reward model learns from the labels (reward.py), PPO climbs the reward model (ppo.py) at
several prices of KL, and best-of-n picks by it. After Gao et al. 2022 (arXiv 2210.10760), against d = sqrt(KL):

    proxy   what the reward model says: rises
    gold    what is true: rises, then falls. With more labels the peak is higher and later, from 500 to 2,000 clearly;
            with a higher price of KL the run stays before it or near it
    best-of-n costs KL = log n - (n - 1) / n and is drawn over the same axis

The gold reward is simple where the data are dense, and knows what the data rarely show: that a kind word said twice is
a fault, that thanks belong at the end, that words need an order. The reward model extrapolates, PPO goes there.

    python course/goodhart.py                      # five seeds on two cores, ten minutes -> out/lab        (make lab)
    python course/goodhart.py --seeds 0 --out_dir /tmp/lab
    python course/goodhart.py --draw --out_dir docs/results        # figure and table again from goodhart.json
    python course/goodhart.py --bands --out_dir docs/results       # all that ppo.py logged -> course/expected/lab.json
    python report.py out/lab/seed_0/2000_labels_beta_0             # every PPO run is a run folder too
"""
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import bands  # noqa: E402
import checkpoints  # noqa: E402
import common  # noqa: E402
import ppo  # noqa: E402
import reward as reward_stage  # noqa: E402
import sft  # noqa: E402
from course import figure  # noqa: E402
from data import batch as data_batch  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from reward import RewardModel  # noqa: E402


@dataclass
class Config:
    # --- laboratory ---
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    labels: tuple[int, ...] = (500, 2000, 8000)    # pairs a reward model learns from; the middle one meets all betas
    betas: tuple[float, ...] = (0.0, 0.05, 0.2)    # prices of KL; a point of the proxy is one std over SFT's answers
    # --- PPO ---
    steps: int = 50                    # updates
    batch_size: int = 128              # answers per update
    lr: float = 4e-4                   # of policy and value, constant: it goes as far as it will
    # --- best-of-n ---
    samples: int = 1024                # answers per prompt that n of are drawn from
    # --- run ---
    workers: int = 0                   # seeds at a time; 0: as many as there are cores
    out_dir: str = "out/lab"           # goodhart.json, its figure and its table
    runs: str = "out/lab"              # run folders, one for every PPO run; empty: none
    draw: bool = False                 # only draw again what goodhart.json holds
    bands: bool = False                # only write course/expected/lab.json from the runs


# ---------------------------------------------------------------- the language

TOPICS = ("tea", "bread", "soup", "cake", "rice", "fish")
KIND, UNKIND = ("warm", "sweet", "fresh", "soft", "good"), ("cold", "old", "sour")
OPENERS, CLOSERS = ("yes", "sure", "well"), ("thanks", "enjoy", "bye")
WORDS = ("|", "?", "hello", "the", "is", "very", "and", *TOPICS, *KIND, *UNKIND, *OPENERS, *CLOSERS)
END, ID = 0, {word: i for i, word in enumerate(WORDS)}
ROOM = 20                                                      # tokens an answer may take
PROMPTS = [[*hello, topic, "?"] for topic in TOPICS for hello in ((), ("hello",))]
WORLD = common.World(torch.device("cpu"), torch.float32)
TOKENIZER = SimpleNamespace(eos_ids=[END], pad_id=END, decode=lambda ids: " ".join(WORDS[i] for i in ids))


def write(rng: random.Random, prompt: list[str]) -> list[str]:
    """An answer of the corpus: "yes the soup is very warm and fresh enjoy", sometimes of the wrong dish or unkind."""
    topic = prompt[-2] if rng.random() < 0.75 else rng.choice(TOPICS)
    words = [rng.choice(OPENERS)] if rng.random() < 0.4 else []
    words += ["the", topic, "is"]
    while True:
        words += ["very"] if rng.random() < 0.2 else []
        words += [rng.choice(KIND if rng.random() < 0.6 else UNKIND)]
        if rng.random() < 0.65 or len(words) > ROOM - 5:
            break
        words += ["and"]
    return words + ([rng.choice(CLOSERS)] if rng.random() < 0.35 else [])


def follows(a: str, b: str) -> bool:
    """Whether the language lets b stand behind a."""
    quality = (*KIND, *UNKIND)
    after = {"the": TOPICS, "is": ("very", *quality), "very": quality, "and": ("very", *quality)}
    after |= {word: ("is",) for word in TOPICS} | {word: ("the",) for word in OPENERS}
    return b in after.get(a, ("and", *CLOSERS) if a in quality else ())


def gold(prompt: list[str], answer: list[str]) -> float:
    """The truth: on the topic, up to three different kind words, polite at either end; every repetition, unkind word,
    foreign dish and broken order costs."""
    total = 1.0 * (prompt[-2] in answer) - 0.5 * sum(w in TOPICS and w != prompt[-2] for w in answer)
    total += (0.0, 1.0, 1.7, 2.1)[min(3, len(set(answer) & set(KIND)))] - 0.8 * sum(w in UNKIND for w in answer)
    total += 0.3 * (answer[:1] != [] and answer[0] in OPENERS) + 0.6 * (answer[-1:] != [] and answer[-1] in CLOSERS)
    repeats = len(answer) - len(set(answer)) - max(0, answer.count("and") - 1) - max(0, answer.count("very") - 1)
    return total - 0.6 * repeats - 0.4 * sum(not follows(a, b) for a, b in zip(answer, answer[1:]))


def gold_rows(ids: Tensor, mask: Tensor, response: Tensor) -> Tensor:
    """(N, P + R) ids -> (N,) the truth of every answer; without an end it is one point worse."""
    n, rows = response.shape[1], []
    for i, m, r in zip(ids, mask, response):
        prompt, answer = ([WORDS[x] for x in part.tolist()] for part in (i[:-n][m[:-n] == 1], i[-n:][r == 1]))
        ended = answer[-1:] == ["|"]
        rows.append(gold(prompt, answer[:-1] if ended else answer) - (not ended))
    return torch.tensor(rows)


def encode(words: list[str]) -> list[int]:
    return [ID[word] for word in words]


# ---------------------------------------------------------------- stage 1: the language is learned

def sft_settings(**changes) -> sft.Config:
    return sft.Config(**{"epochs": 3, "batch_size": 16, "micro_batch": 16, "max_len": 48, "lr": 3e-3, "grad_clip": 0.0,
                         "weight_decay": 0.01, "lora_r": 0, **changes})


def corpus(rng: random.Random, samples: int) -> list[dict]:
    rows = []
    for _ in range(samples):
        prompt = rng.choice(PROMPTS)
        answer = [*encode(write(rng, prompt)), END]
        rows.append({"ids": encode(prompt) + answer, "mask": [0] * len(prompt) + [1] * len(answer)})
    return rows


def fine_tune(seed: int, samples: int = 4000, watch: Callable[[int, Transformer], None] | None = None,
              **changes) -> Transformer:
    """watch(step, model) is called after every step."""
    cfg, rows = sft_settings(**changes), corpus(random.Random(seed), samples)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=len(WORDS), hidden_size=64, intermediate_size=192, num_layers=2,
                                    num_heads=4, max_positions=64))
    rows = data_batch.pack(rows, cfg.max_len) if cfg.packing else rows
    batches, steps = data_batch.Batches(rows, cfg.batch_size, seed), int(cfg.epochs * len(rows) // cfg.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=cfg.weight_decay)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = common.lr_at(step, steps, cfg.lr, cfg.warmup, cfg.schedule)
        sft.improve(model, batches.next(), optimizer, TOKENIZER, cfg, WORLD, step)
        if watch:
            watch(step + 1, model)
    return model


@torch.no_grad()
def sample(model: Transformer, prompts: list[list[str]], generator: torch.Generator) -> ppo.Rollout:
    """One answer per prompt from the model as it is, as a rollout without scores."""
    roles = ppo.Roles(model, model, None, None, None)
    cfg = ppo.Config(response_len=ROOM, lora_r=0)
    parts = [ppo.rollout(roles, [encode(p) for p in prompts[i:i + 2048]], TOKENIZER, cfg, generator)
             for i in range(0, len(prompts), 2048)]
    R = max(p.R for p in parts)

    def join(name: str, fill: int = 0) -> Tensor:
        return torch.cat([torch.nn.functional.pad(getattr(p, name), (0, R - p.R), value=fill) for p in parts])

    return ppo.Rollout(join("ids"), join("mask"), join("response"), torch.cat([p.ended for p in parts]),
                       join("sampler_logp"))


# ---------------------------------------------------------------- stage 2: the proxy is learned

def label(model: Transformer, n: int, seed: int) -> tuple[list[dict], float]:
    """n pairs of answers, better first by a noisy judge: P(a before b) = sigmoid(gold(a) - gold(b)). Also the share of
    labels that a judge who knows the truth agrees with."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    prompts = [p for p in rng.choices(PROMPTS, k=n) for _ in range(2)]
    r = sample(model, prompts, generator)
    truth = gold_rows(r.ids, r.mask, r.response).view(n, 2)
    first = torch.rand(n, generator=generator) < torch.sigmoid(truth[:, 0] - truth[:, 1])
    rows = [ids[mask == 1].tolist() for ids, mask in zip(r.ids, r.mask)]
    pairs = [{"sequences": rows[2 * i:2 * i + 2] if first[i] else rows[2 * i:2 * i + 2][::-1]} for i in range(n)]
    return pairs, float(torch.sigmoid((truth[:, 0] - truth[:, 1]).abs()).mean())


def reward_settings(**changes) -> reward_stage.Config:
    return reward_stage.Config(**{"epochs": 2, "batch_size": 32, "micro_batch": 32, "lr": 5e-4, "schedule": "linear",
                                  "warmup": 10, "grad_clip": 0.0, "lora_r": 0, **changes})


def learn_reward(model: Transformer, pairs: list[dict], seed: int,
                 watch: Callable[[int, RewardModel], None] | None = None, **changes) -> RewardModel:
    """From the weights of stage 1, with a new head; afterwards mean 0 and std 1 on the model's own answers.
    watch(step, judge) is called after every step."""
    cfg = reward_settings(**changes)
    torch.manual_seed(seed)
    body = Transformer(model.config)
    body.load_state_dict(model.state_dict())
    judge = RewardModel(body)
    body.lm_head.requires_grad_(False)
    batches, steps = data_batch.Batches(pairs, cfg.batch_size, seed), int(cfg.epochs * len(pairs) // cfg.batch_size)
    optimizer = torch.optim.AdamW([p for p in judge.parameters() if p.requires_grad], lr=1.0,
                                  weight_decay=cfg.weight_decay)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = common.lr_at(step, steps, cfg.lr, cfg.warmup, cfg.schedule)
        reward_stage.improve(judge, batches.next(), optimizer, TOKENIZER, cfg, WORLD, step)
        if watch:
            watch(step + 1, judge)
    r = sample(model, PROMPTS * 50, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        judge.normalize(judge(r.ids, r.mask))
    return judge


@torch.no_grad()
def accuracy(judge: RewardModel, pairs: list[dict]) -> float:
    ids, mask, _ = reward_stage.collate(pairs, END, "cpu")
    scores = judge(ids, mask).view(-1, 2)
    return float((scores[:, 0] > scores[:, 1]).float().mean())


# ---------------------------------------------------------------- stage 3: the proxy is optimised

@dataclass
class Climb(ppo.Config):
    # --- laboratory ---
    labels: int = 0                    # pairs that the reward model has learned from
    expected: str = "course/expected/lab.json"


def climbs(cfg: Config) -> dict[str, tuple[int, float]]:
    """{name of a PPO run: labels, beta}: the middle number of labels with every beta, then the others."""
    middle = cfg.labels[len(cfg.labels) // 2]
    pairs = [(middle, b) for b in cfg.betas] + [(n, cfg.betas[0]) for n in cfg.labels if n != middle]
    return {f"{n} labels, beta {beta:g}": (n, beta) for n, beta in pairs}


def folder_of(cfg: Config, seed: int, key: str) -> Path:
    return Path(cfg.runs) / f"seed_{seed}" / key.replace(",", "").replace(" ", "_")


def climb_settings(cfg: Config, labels: int, beta: float, seed: int, **changes) -> Climb:
    return Climb(**{"labels": labels, "steps": cfg.steps, "batch_size": cfg.batch_size, "micro_batch": cfg.batch_size,
                    "response_len": ROOM, "kl_coef": beta, "lr": cfg.lr, "value_lr": cfg.lr, "schedule": "constant",
                    "lora_r": 0, "missing_eos": -2.0, "seed": seed, **changes})


def climb(folder: Path, proxy: str, beta: float, cfg: Config, seed: int, out: Path | None = None,
          **changes) -> tuple[list[dict], list[str]]:
    """PPO against a reward model: KL, proxy and gold of every update's answers, and answers of the last one. `out`: a
    run folder with all that ppo.py logs, for report.py and check.py."""
    where = {"init": str(folder / "sft"), "reward": str(folder / proxy), "overwrite": True}
    run = climb_settings(cfg, int(proxy) if proxy.isdigit() else 0, beta, seed, **where, **changes)
    record = common.Run(out, "ppo", run, WORLD) if out else None
    model, _ = checkpoints.load(run.init, "cpu", torch.float32)
    roles = ppo.separate(run, model, WORLD)
    learner, rng, history = ppo.start(roles, run, WORLD), random.Random(seed), []
    for step in range(cfg.steps):
        prompts = [{"ids": encode(p)} for p in rng.choices(PROMPTS, k=run.batch_size)]
        r, figures = ppo.improve(roles, learner, prompts, TOKENIZER, run, WORLD, step)
        truth = gold_rows(r.ids, r.mask, r.response)
        history.append({"step": step, "kl": figures["objective/kl"], "proxy": figures["objective/scores"],
                        "gold": float(truth.mean()), "length": figures["val/response_length"]})
        if record:
            record.append("metrics.jsonl", [{"step": step + 1, **figures, "gold/score": float(truth.mean())}])
    texts = [f"{row['prompt']}  {row['answer']}   (proxy {row['score']:+.1f}, gold {g:+.1f})"
             for row, g in zip(ppo.describe(r, TOKENIZER, "train")[:4], truth.tolist())]
    return history, texts


def best_of(scores: Tensor, values: Tensor, n: int) -> float:
    """(P, N) scores and values: the mean value of the best scored of n answers, over all subsets of n of the N. In
    closed form: sorted by score, the i-th of N is the best of C(i - 1, n - 1) subsets."""
    N = scores.shape[1]
    i = torch.arange(1, N + 1, dtype=torch.float64)
    inside = torch.lgamma(i) - math.lgamma(n) - torch.lgamma((i - n).clamp(min=0) + 1)         # log C(i - 1, n - 1)
    whole = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)
    weight = torch.where(i >= n, (inside - whole).exp(), 0.0)
    return float((values.double().gather(1, scores.argsort(1)) * weight).sum(1).mean())


@torch.no_grad()
def best_of_n(model: Transformer, judges: dict[int, RewardModel], cfg: Config, seed: int) -> dict[str, list]:
    """{labels: (n, KL, proxy, gold)} for n = 1, 2, 4, ...: cfg.samples answers per prompt, picked by each judge."""
    N = cfg.samples
    r = sample(model, PROMPTS * N, torch.Generator().manual_seed(seed + 77))
    truth, result = gold_rows(r.ids, r.mask, r.response).view(N, -1).T, {}
    for n_labels, judge in judges.items():
        scores = torch.cat([judge(r.ids[k:k + 2048], r.mask[k:k + 2048]) for k in range(0, len(r.ids), 2048)])
        scores = torch.where(r.ended, scores, -2.0).view(N, -1).T
        result[str(n_labels)] = [[n, math.log(n) - (n - 1) / n, best_of(scores, scores, n), best_of(scores, truth, n)]
                                 for n in (2 ** k for k in range(int(math.log2(N))))]
    return result


def laboratory(cfg: Config, seed: int) -> dict:
    """All three stages with one seed."""
    torch.set_num_threads(1)
    t0, model = time.perf_counter(), fine_tune(seed)
    r = sample(model, PROMPTS * 100, torch.Generator().manual_seed(seed + 5))
    truth = gold_rows(r.ids, r.mask, r.response)
    result = {"seed": seed, "gold_mean": float(truth.mean()), "gold_std": float(truth.std()),
              "sft": [TOKENIZER.decode(ids[mask == 1].tolist()) for ids, mask in zip(r.ids[:4], r.mask[:4])],
              "ended": float(r.ended.float().mean()), "runs": {}, "texts": {}, "accuracy": {}}
    pairs, _ = label(model, max(cfg.labels), seed + 11)
    held, result["ceiling"] = label(model, 4000, seed + 12)
    judges = {n: learn_reward(model, pairs[:n], seed) for n in cfg.labels}
    result["accuracy"] = {str(n): accuracy(judge, held) for n, judge in judges.items()}
    result["best_of_n"] = best_of_n(model, judges, cfg, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints.save(model, None, folder / "sft")
        for n, judge in judges.items():
            reward_stage.save(judge, None, folder / str(n), base=str(folder / "sft"))
        for key, (n, beta) in climbs(cfg).items():
            result["runs"][key], result["texts"][key] = climb(folder, str(n), beta, cfg, seed,
                                                              folder_of(cfg, seed, key) if cfg.runs else None)
    return result | {"seconds": time.perf_counter() - t0}


# ---------------------------------------------------------------- figure and table

def smooth(points: list[tuple[float, float]], at: list[float], width: float = 0.25) -> list[float | None]:
    """Kernel mean of noisy points at the places asked for; None beyond the last of them."""
    last, values = max(x for x, _ in points), []
    for place in at:
        weights = [math.exp(-0.5 * ((x - place) / width) ** 2) for x, _ in points]
        near = place <= last + width / 2 and sum(weights) > 0.1
        values.append(sum(w * y for w, (_, y) in zip(weights, points)) / sum(weights) if near else None)
    return values


def curve(results: list[dict], key: str, what: str, over: str = "distance") -> list[list[tuple[float, float]]]:
    """Per seed (x, y): y in standard deviations over the fine-tuned model's answers, 0 = its mean."""
    seeds = []
    for r in results:
        shift, scale = (r["gold_mean"], r["gold_std"]) if what == "gold" else (0.0, 1.0)
        rows = r["best_of_n"][key] if over == "n" else r["runs"][key]
        pick = {"distance": lambda row: math.sqrt(max(0.0, row["kl"])), "update": lambda row: row["step"] + 1}.get(over)
        y = {"proxy": 2, "gold": 3}[what]
        seeds.append([(math.sqrt(row[1]), (row[y] - shift) / scale) for row in rows] if over == "n" else
                     [(pick(row), (row[what] - shift) / scale) for row in rows])
    return seeds


NEAR = 3.0                                                     # sqrt(KL) up to which the peaks are drawn


def line(seeds: list[list[tuple[float, float]]], colour: str, name: str, width: float = 0.25,
         until: float = math.inf) -> figure.Line:
    """Median and range over seeds, as far as every seed goes; width 0: all have the same x, and nothing is smoothed."""
    end = min(until, *(max(x for x, _ in points) for points in seeds))
    at = [end * i / 60 for i in range(61)] if width else [x for x, _ in seeds[0]]
    smoothed = [smooth(points, at, width) if width else [y for _, y in points] for points in seeds]
    columns = [(x, [y for y in ys if y is not None]) for x, *ys in zip(at, *smoothed)]
    columns = [(x, ys) for x, ys in columns if len(ys) == len(seeds)]
    return figure.Line([(x, statistics.median(ys)) for x, ys in columns],
                       [(x, min(ys), max(ys)) for x, ys in columns] if len(seeds) > 1 else [], colour, name,
                       dashed=not width)


BLUE, RED, GREEN, GREY = "#2c6fbb", "#c0392b", "#2e8b57", "#8a8a8a"


def draw(result: dict) -> str:
    """Above the law itself and what labels do to it; below what the price of KL does, and what the log shows of it."""
    runs, labels, betas = result["runs"], result["labels"], result["betas"]
    middle, distance = labels[len(labels) // 2], "sqrt(KL to the fine-tuned model), nats"
    free, best, std = f"{middle} labels, beta {betas[0]:g}", str(middle), "std of SFT answers"
    law = [line(curve(runs, free, "proxy"), RED, "proxy, PPO"), line(curve(runs, free, "gold"), BLUE, "gold, PPO"),
           line(curve(runs, best, "proxy", "n"), RED, "proxy, best of n (dashed)", 0),
           line(curve(runs, best, "gold", "n"), BLUE, "gold, best of n (dashed)", 0)]
    many = [line(curve(runs, str(n), "gold", "n"), colour, f"{n} labels", 0)
            for n, colour in zip(labels, (GREY, BLUE, GREEN))]
    by_labels = [line(curve(runs, f"{n} labels, beta {betas[0]:g}", "gold"), colour, f"{n} labels", until=NEAR)
                 for n, colour in zip(labels, (GREY, BLUE, GREEN))]
    keys = [(f"{middle} labels, beta {b:g}", f"beta {b:g}", colour) for b, colour in zip(betas, (BLUE, RED, GREEN))]
    by_beta = [line(curve(runs, key, "gold"), colour, name, until=NEAR) for key, name, colour in keys]
    golds, proxies = ([line(curve(runs, key, what, "update"), colour, name, 1.5) for key, name, colour in keys]
                      for what in ("gold", "proxy"))
    panels = [figure.Panel(f"proxy and gold, {free}", law, distance, std, legend="bottom"),
              figure.Panel("gold, best of n, by labels", many, distance, "gold", legend="bottom"),
              figure.Panel(f"gold, PPO, by labels, beta {betas[0]:g}", by_labels, distance, "gold", -2,
                           legend="bottom"),
              figure.Panel(f"gold, PPO, by the price of KL, {middle} labels", by_beta, distance, "gold", -2,
                           legend="bottom"),
              figure.Panel("gold of the same runs", golds, "updates", "gold", legend="bottom"),
              figure.Panel("proxy of the same runs", proxies, "updates", "proxy", -1.5, legend="low")]
    return figure.grid(panels, columns=3, title=f"Over-optimisation, median and range of {len(runs)} seeds")


def peaks(runs: list[dict], key: str, over: str = "distance", width: float = 0.25) -> list[dict]:
    """Per seed: where gold is highest, how high, whether it had begun to fall when the run ended (else no peak was
    reached), how far the run came and what it ended with. PPO's curves are smoothed."""
    found = []
    for golds, proxies in zip(curve(runs, key, "gold", over), curve(runs, key, "proxy", over)):
        end = max(x for x, _ in golds)
        at = [x for x, _ in golds] if over == "n" else [end * i / 100 for i in range(101)]
        values = [y for _, y in golds] if over == "n" else smooth(golds, at, width)
        top = max((i for i, y in enumerate(values) if y is not None), key=lambda i: values[i])
        tail = len(golds) // 10 or 1
        found.append({"d": at[top], "peak": values[top], "end": end,
                      "reached": at[top] < end if over == "n" else at[top] < end - width,
                      "gold": statistics.mean(y for _, y in golds[-tail:]),
                      "proxy": statistics.mean(y for _, y in proxies[-tail:])})
    return found


def moved(before: list[dict], after: list[dict], key: str) -> tuple[float, float, float]:
    """Mean of after - before, seed by seed, and its 95 % interval; that of one seed has no width."""
    d = [b[key] - a[key] for a, b in zip(before, after)]
    half = bands.quantile(0.05, len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d)) if len(d) > 1 else 0.0
    return statistics.mean(d), statistics.mean(d) - half, statistics.mean(d) + half


def shift(before: list[dict], after: list[dict], key: str) -> str:
    mean, low, high = moved(before, after, key)
    return f"{mean:+.2f} ({low:+.2f} .. {high:+.2f})"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def place(rows: list[dict]) -> str:
    """Where the peaks are, of the seeds that reached one."""
    there, n = [row["d"] for row in rows if row["reached"]], len(rows)
    told = [spread(there)] if there else []
    return "; ".join([*told, f"no peak reached in {n - len(there)} of {n}"] if len(there) < n else told)


def table(result: dict) -> str:
    """goodhart.md: figures and texts."""
    runs, labels, betas = result["runs"], result["labels"], result["betas"]
    found = {key: peaks(runs, key) for key in runs[0]["runs"]}
    found |= {f"{n} labels, best of n": peaks(runs, str(n), "n") for n in labels}
    lines = ["# The Goodhart laboratory", "", f"Made by `{result['command']}`, {result['date']}, commit "
             f"{result['git'][:7]}, torch {result['torch']}, {result['workers']} at a time on "
             f"{result['machine']}, seeds {', '.join(str(r['seed']) for r in runs)}. Gold and proxy in standard "
             "deviations over the fine-tuned model's answers, 0 = its mean; median (range) over seeds; the end is the "
             "mean of the last tenth, of best of n the largest n. Where gold was still highest when the run ended, no "
             "peak was reached.", "",
             "| run | gold's peak | at sqrt(KL) | sqrt(KL) at the end | gold at the end | proxy at the end |",
             "|---|---|---|---|---|---|"]
    for key, rows in found.items():
        cells = [spread([row["peak"] for row in rows]), place(rows),
                 *(spread([row[k] for row in rows]) for k in ("end", "gold", "proxy"))]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines += ["", "What moves, seed by seed: the mean difference and its 95 % interval (Student's t); one that holds 0 "
              "shows nothing. A peak that was not reached counts where the run ended, which is too near.", "",
              "| change | of | gold's peak | at sqrt(KL) | sqrt(KL) at the end | gold at the end |",
              "|---|---|---|---|---|---|"]
    middle = labels[len(labels) // 2]
    pairs = dict.fromkeys([*zip(labels, labels[1:]), (labels[0], labels[-1])])
    changes = [(f"{a} to {b} labels", kind, found[f"{a} labels, {kind}"], found[f"{b} labels, {kind}"])
               for kind in (f"beta {betas[0]:g}", "best of n") for a, b in pairs]
    changes += [(f"beta {betas[0]:g} to {b:g}", f"{middle} labels", *(found[f"{middle} labels, beta {x:g}"]
                                                                      for x in (betas[0], b))) for b in betas[1:]]
    lines += [f"| {what} | {kind} | " + " | ".join(shift(a, b, k) for k in ("peak", "d", "end", "gold")) + " |"
              for what, kind, a, b in changes]
    lines += ["", "| labels | accuracy on 4,000 held-out labels | of one who knows the truth |", "|---|---|---|"]
    lines += [f"| {n} | {spread([r['accuracy'][n] for r in runs])} | {spread([r['ceiling'] for r in runs])} |"
              for n in runs[0]["accuracy"]]
    lines += ["", f"What it looks like, seed {runs[0]['seed']}:", "", "```"]
    lines += ["the fine-tuned model", *("  " + text for text in runs[0]["sft"])]
    for key, texts in runs[0]["texts"].items():
        lines += [key, *("  " + text for text in texts)]
    return "\n".join([*lines, "```"]) + "\n"


def judge(result: dict) -> bool:
    """The gate: the law on every seed, and what moves the peak by paired differences."""
    runs, labels, betas = result["runs"], result["labels"], result["betas"]
    usual = labels[len(labels) // 2]
    free, dear = (peaks(runs, f"{usual} labels, beta {b:g}") for b in (betas[0], betas[-1]))
    few, many = (peaks(runs, f"{n} labels, beta {betas[0]:g}") for n in (labels[0], labels[-1]))
    few_best, many_best = (peaks(runs, str(n), "n") for n in (labels[0], labels[-1]))
    return common.gate("goodhart", [
        ("the proxy rises", all(row["proxy"] > 0.5 for row in free), spread([row["proxy"] for row in free])),
        ("gold rises", all(row["peak"] > 0.2 for row in free), spread([row["peak"] for row in free])),
        ("and falls below where it began", all(row["gold"] < 0 for row in free), spread([row["gold"] for row in free])),
        *((f"{labels[0]} to {labels[-1]} labels, {kind}: {what}", moved(a, b, k)[1] > 0, shift(a, b, k))
          for kind, a, b in (("PPO", few, many), ("best of n", few_best, many_best))
          for what, k in (("a higher peak", "peak"), ("a later one", "d"))),
        (f"beta {betas[0]:g} to {betas[-1]:g}: gold is kept", moved(free, dear, "gold")[1] > 0.5,
         shift(free, dear, "gold")),
        ("the run stays nearer", moved(free, dear, "end")[2] < 0, shift(free, dear, "end")),
        ("and gold is not past its peak", all(row["gold"] > row["peak"] - 0.5 for row in dear),
         spread([row["gold"] - row["peak"] for row in dear]))])


def write_bands(cfg: Config, result: dict) -> bool:
    """course/expected/lab.json from the run folders of every PPO run that goodhart.json tells of."""
    seeds, runs = tuple(r["seed"] for r in result["runs"]), {}
    for key in result["runs"][0]["runs"]:
        runs[key] = [folder_of(cfg, seed, key) for seed in seeds]
        for folder, r in zip(runs[key], result["runs"]):
            log = bands.columns(bands.log_of(folder)) if (folder / "config.json").exists() else {}
            if log.get("gold/score") != [row["gold"] for row in r["runs"][key]]:
                raise common.UserError(f"{folder} is not the run of {cfg.out_dir}/goodhart.json: run this again with "
                                       f"--seeds {','.join(map(str, seeds))} and --runs")
    bands.write(bands.ROOT / Climb.expected, runs, seeds, git=[result["git"]], machine=result["machine"],
                minutes=[r["seconds"] / 60 for r in result["runs"]])
    return True


def main(cfg: Config) -> bool:
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.bands:
        return write_bands(cfg, json.loads((out / "goodhart.json").read_text(encoding="utf-8")))
    if not cfg.draw:
        began, workers = time.perf_counter(), min(cfg.workers or os.cpu_count() or 1, len(cfg.seeds))
        runs, git = [], common.git_hash()
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for result in pool.map(laboratory, [cfg] * len(cfg.seeds), cfg.seeds):
                runs.append(result)
                print(f"seed {result['seed']}: {result['seconds']:.0f} s", flush=True)
        common.atomic_write(out / "goodhart.json", json.dumps({
            "command": "python " + " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
            "git": git, "minutes": (time.perf_counter() - began) / 60, "workers": workers,
            "machine": bands.machine(), "labels": cfg.labels, "betas": cfg.betas, "runs": runs}) + "\n")
    result = json.loads((out / "goodhart.json").read_text(encoding="utf-8"))
    common.atomic_write(out / "goodhart.md", table(result))
    common.atomic_write(out / "goodhart.svg", draw(result))
    print(f"figure: {out / 'goodhart.svg'}   figures and texts: {out / 'goodhart.md'}")
    return judge(result)


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
