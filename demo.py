"""The whole ChatGPT recipe on a laptop, with a gate after each stage:  make demo

    1. SFT           SmolLM2-135M-Instruct learns to be Pixiu: a name, a manner, brief answers         -> sft.py
    2. preferences   the SFT model answers every prompt four times; a gold judge ranks the answers, with noise
    3. reward model  learns the judge's taste from the rankings alone                                  -> reward.py
    4. PPO           the SFT model learns to please the reward model                                   -> ppo.py
    5. report        the same prompts answered before, after SFT and after PPO; proxy, gold and KL over the updates

The gold judge is VADER (Hutto & Gilbert 2014), a sentiment lexicon that knows nothing of our code, as in the first
RLHF paper on language models (Ziegler et al. 2019), whose task was also positive sentiment. PPO never sees it: it sees
the reward model, and afterwards we ask the judge whether pleasing the one has pleased the other.

The rankings are noisy like people: a Plackett-Luce draw, so that for any two answers
P(a above b) = sigmoid(SHARPNESS * (gold(a) - gold(b))), which is the Bradley-Terry coin.

    python demo.py                     # everything into out/demo, about ten minutes
    python demo.py --bands 0 1 2 3 4   # five seeds; their spread becomes the bands of the gates
"""
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import common
import report
import sft
from data import batch as data_batch
from data import formats

HERE = Path(__file__).parent
DATA = HERE / "data" / "demo"
BANDS = HERE / "course" / "expected" / "demo.json"
SHARPNESS = 4.0                        # how sure the judge is: two answers half a point apart are ranked right 88 % of the time
ANSWERS = 4                            # ranked answers per prompt
ANSWER_LEN = 40                        # tokens

# The three command lines of the recipe. What a reader would change for a real model is --init, --data and the sizes.
SFT = ["sft.py", "--init", "smollm2-135m", "--template", "chatml", "--data", "data/demo/sft.jsonl", "--valid", "data/demo/sft_heldout.jsonl",
       "--epochs", "3", "--batch_size", "16", "--micro_batch", "16", "--no_packing", "--max_len", "192", "--lr", "5e-4", "--eval_every", "20", "--answer_len", "60"]
REWARD = ["reward.py", "--epochs", "1", "--batch_size", "8", "--micro_batch", "8", "--lr", "3e-4", "--max_len", "128", "--valid_share", "0.15", "--eval_every", "20"]
PPO = ["ppo.py", "--data", "data/demo/prompts.jsonl", "--valid", "data/demo/prompts_heldout.jsonl", "--eval_prompts", "96", "--steps", "14", "--batch_size", "64",
       "--micro_batch", "16", "--ppo_epochs", "2", "--response_len", str(ANSWER_LEN), "--lr", "4e-4", "--value_lr", "4e-4", "--kl_coef", "0.03"]


# ---------------------------------------------------------------- the gold judge

def gold(texts: list[str]) -> list[float]:
    """VADER's compound sentiment of each text, in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    judge = SentimentIntensityAnalyzer()
    return [judge.polarity_scores(text)["compound"] for text in texts]


def rank(scores: list[float], dice: random.Random) -> list[int]:
    """Indices, best first, drawn from Plackett-Luce: sort by SHARPNESS * score + Gumbel noise."""
    noisy = [SHARPNESS * s - math.log(-math.log(dice.random())) for s in scores]
    return sorted(range(len(scores)), key=lambda i: -noisy[i])


def prefer(model_dir: Path, out: Path, seed: int) -> dict[str, float]:
    """Samples ANSWERS answers per prompt from the SFT model and writes them ranked, best first."""
    world = common.setup("auto", "auto", seed)
    model, tokenizer = checkpoints.load(model_dir, world.device, world.dtype)
    prompts = formats.read_prompts(DATA / "prompts.jsonl")
    encoded = [p["ids"] for p in data_batch.encode_prompts(prompts, tokenizer, 128) for _ in range(ANSWERS)]
    answers = sft.answer(model, encoded, tokenizer, ANSWER_LEN, temperature=1.0, seed=seed, rows=64)
    ended = [bool(a) and a[-1] in tokenizer.eos_ids for a in answers]
    texts = [tokenizer.decode(a[:-1] if end else a).strip() for a, end in zip(answers, ended)]
    scores, dice, lines = gold(texts), random.Random(seed), []
    for i, prompt in enumerate(prompts):
        group = range(i * ANSWERS, (i + 1) * ANSWERS)
        order = [group[k] for k in rank([scores[j] for j in group], dice)]
        lines.append(json.dumps({"prompt": prompt["prompt"], "answers": [texts[j] for j in order], "gold": [scores[j] for j in order]}, ensure_ascii=False))
    common.atomic_write(out, "\n".join(lines) + "\n")
    pairs = [(scores[i * ANSWERS + a], scores[i * ANSWERS + b]) for i in range(len(prompts)) for a in range(ANSWERS) for b in range(a)]
    ceiling = statistics.mean(1 / (1 + math.exp(-SHARPNESS * abs(a - b))) for a, b in pairs)
    figures = {"answers": len(texts), "gold_mean": statistics.mean(scores), "gold_std": statistics.stdev(scores), "ended": sum(ended) / len(ended), "ceiling": ceiling}
    print(f"{len(lines)} prompts, {len(texts)} answers: gold {figures['gold_mean']:+.2f} +- {figures['gold_std']:.2f}, {figures['ended']:.0%} ended, "
          f"the noise leaves an accuracy of at most {ceiling:.1%}. Written to {out}")
    return figures


# ---------------------------------------------------------------- running and reading the stages

def stage(command: list[str], out_dir: Path, seed: int, **flags) -> float:
    """Runs one script as a user would, prints its command line, returns its minutes; a failed gate goes on, a crash does not."""
    command = [*command, "--out_dir", str(out_dir), "--seed", str(seed), "--overwrite", *[str(x) for name, value in flags.items() for x in (f"--{name}", value)]]
    print(f"\n$ python {' '.join(command)}", flush=True)
    start = time.time()
    done = subprocess.run([sys.executable, *command], cwd=HERE)
    if not (out_dir / "gate.json").exists():
        raise common.UserError(f"{command[0]} stopped with exit code {done.returncode} before its gate; its last lines are above")
    return (time.time() - start) / 60


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judge_ppo(out: Path) -> dict[str, list]:
    """Asks the gold judge about every answer that PPO sampled: held-out before and after, and per update."""
    samples = rows_of(out / "samples.jsonl")
    for row, g in zip(samples, gold([row["answer"] for row in samples])):
        row["gold"] = g
    steps = sorted({row["step"] for row in samples if row["split"] == "train"})
    per_step = [statistics.mean(row["gold"] for row in samples if row["split"] == "train" and row["step"] == s) for s in steps]
    held = [[row for row in samples if row["split"] == "eval" and row["step"] == s] for s in (0, max(row["step"] for row in samples))]
    return {"steps": steps, "gold": per_step, "before": held[0], "after": held[1]}


def answers_of(model_name: str, prompts: list[str], seed: int) -> list[str]:
    """Greedy answers of one model to the panel; loaded alone, so that memory stays that of one."""
    world = common.setup("auto", "auto", seed, quiet=True)
    model, tokenizer = checkpoints.load(model_name, world.device, world.dtype)
    ids = [tokenizer.render([{"role": "user", "content": p}], add_generation_prompt=True)[0] for p in prompts]
    return [tokenizer.decode([t for t in a if t not in tokenizer.eos_ids]).strip() for a in sft.answer(model, ids, tokenizer, ANSWER_LEN)]


def difference(before: list[dict], after: list[dict], name: str) -> tuple[float, float]:
    """Mean of after - before over the same prompts, and its standard error."""
    d = [b[name] - a[name] for a, b in zip(before, after)]
    return statistics.mean(d), statistics.stdev(d) / math.sqrt(len(d))


# ---------------------------------------------------------------- the demo

def run(seed: int, out: Path) -> tuple[bool, dict[str, float]]:
    """All stages with one seed -> every gate passed, the figures that the bands are made of."""
    out.mkdir(parents=True, exist_ok=True)
    minutes: dict[str, float] = {}
    minutes["sft"] = stage(SFT, out / "sft", seed)
    start = time.time()
    print("\n# preferences: four sampled answers per prompt, ranked by the gold judge with noise")
    labels = prefer(out / "sft" / "model", out / "preferences.jsonl", seed)
    minutes["preferences"] = (time.time() - start) / 60
    minutes["reward"] = stage(REWARD, out / "reward", seed, init=out / "sft" / "model", data=out / "preferences.jsonl")
    minutes["ppo"] = stage(PPO, out / "ppo", seed, init=out / "sft" / "model", reward=out / "reward" / "model")

    # ---- the question that the learned reward cannot answer: did the gold judge's opinion rise as well?
    start = time.time()
    judged = judge_ppo(out / "ppo")
    rise, error = difference(judged["before"], judged["after"], "gold")
    proxy, proxy_error = difference(judged["before"], judged["after"], "score")
    sft_log, reward_log, ppo_log = (rows_of(out / name / "metrics.jsonl") for name in ("sft", "reward", "ppo"))
    last = {name: value for log in (sft_log, reward_log, ppo_log) for row in log for name, value in row.items() if name.startswith("eval/")}
    figures = {"sft/eval_loss": next(r["eval/loss"] for r in reversed(sft_log) if "eval/loss" in r), "sft/eos_rate": next(r["eval/eos_rate"] for r in reversed(sft_log) if "eval/eos_rate" in r),
               "reward/accuracy": last["eval/accuracy"], "reward/longer_wins": last["eval/longer_wins"], "reward/ceiling": labels["ceiling"], "ppo/proxy_rise": proxy, "ppo/gold_rise": rise,
               "ppo/gold_before": statistics.mean(r["gold"] for r in judged["before"]), "ppo/gold_after": statistics.mean(r["gold"] for r in judged["after"]),
               "ppo/kl": last["eval/kl"], "ppo/eos_rate": last["eval/eos_rate"]}
    expected = json.loads(BANDS.read_text(encoding="utf-8"))["bands"] if BANDS.exists() else {}

    def inside(name: str) -> tuple[str, bool, str]:
        low, high = expected.get(name, (-math.inf, math.inf))
        return f"{name} in its band", low <= figures[name] <= high, f"{figures[name]:.3f} in [{low:.3f}, {high:.3f}]"

    gates = {name: json.loads((out / name / "gate.json").read_text(encoding="utf-8")) for name in ("sft", "reward", "ppo")}
    passed = all(gate["passed"] for gate in gates.values())
    print()
    passed &= common.gate("demo", [
        ("learned reward rose", proxy > 2 * proxy_error and proxy > 0.3, f"{proxy:+.2f} +- {proxy_error:.2f} on {len(judged['before'])} held-out prompts"),
        ("gold reward rose", rise > 2 * error and rise > 0.1, f"{rise:+.2f} +- {error:.2f}: {figures['ppo/gold_before']:+.2f} -> {figures['ppo/gold_after']:+.2f}"),
        *[inside(name) for name in ("sft/eval_loss", "reward/accuracy", "ppo/kl", "ppo/gold_rise")],
    ], advice="open the report: proxy up and gold flat is over-optimisation (raise --kl_coef), both flat is too little training", run_dir=out)
    prompts = [row["prompt"] for row in rows_of(DATA / "panel.jsonl")]
    models = {"base": "smollm2-135m", "SFT": out / "sft" / "model", "PPO": out / "ppo" / "model"}
    panel = {name: answers_of(str(where), prompts, seed) for name, where in models.items()}
    for i, prompt in enumerate(prompts):
        print("\n> " + prompt + "".join(f"\n  {name:>4}: {texts[i]}" for name, texts in panel.items()))
    minutes["answers and report"] = (time.time() - start) / 60
    write_report(out, gates, panel, prompts, judged, ppo_log, minutes, expected)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nminutes: {', '.join(f'{name} {m:.1f}' for name, m in minutes.items())}; total {sum(minutes.values()):.1f}; peak memory {memory:.1f} GB")
    print(f"report: {out / 'report.html'}\nchat:   python chat.py {out / 'ppo' / 'model'}   or   python chat.py --compare smollm2-135m {out / 'sft' / 'model'} {out / 'ppo' / 'model'}")
    common.atomic_write(out / "figures.json", json.dumps({"seed": seed, "passed": passed, "figures": figures, "minutes": minutes, "peak_gb": memory}, indent=1))
    return passed, figures
