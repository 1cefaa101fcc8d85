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

    python demo.py                            # everything into out/demo, ten to twenty minutes on two cores
    python demo.py --bands                    # seven seeds; their spread becomes the bands of the gates
"""
import dataclasses
import json
import math
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import bands
import checkpoints
import common
import ppo
import report
import reward
import sft
from bands import rows_of
from data import batch as data_batch
from data import formats

HERE = Path(__file__).parent
DATA = HERE / "data" / "demo"
BANDS = HERE / "course" / "expected" / "demo.json"
SHARPNESS = 4.0  # how sure the judge is: two answers half a point apart are ranked right 88 % of the time
ANSWERS = 4                            # ranked answers per prompt
ANSWER_LEN = 40                        # tokens
TEMPERATURE = 0.7  # of the answers that are ranked, and of PPO: the reward model judges what it has seen

# The three command lines of the recipe. What a reader would change for a real model is --init, --data and the sizes.
SFT = """sft.py --init smollm2-135m --template chatml --data data/demo/sft.jsonl --valid data/demo/sft_heldout.jsonl
    --epochs 3 --batch_size 16 --micro_batch 8 --no_packing --max_len 192 --lr 1e-3
    --eval_every 25 --answer_len 60""".split()
REWARD = """reward.py --epochs 1 --batch_size 8 --micro_batch 8 --lr 3e-4 --max_len 128
    --valid_share 0.15 --eval_every 22""".split()
PPO = f"""ppo.py --data data/demo/prompts.jsonl --valid data/demo/prompts_heldout.jsonl --eval_prompts 96
    --steps 12 --batch_size 64 --micro_batch 16 --ppo_epochs 2 --response_len 48 --temperature {TEMPERATURE}
    --lr 4e-4 --value_lr 4e-4 --kl_coef 0.05""".split()


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
    answers = sft.answer(model, encoded, tokenizer, ANSWER_LEN, temperature=TEMPERATURE, seed=seed, rows=64)
    ended = [bool(a) and a[-1] in tokenizer.eos_ids for a in answers]
    texts = [tokenizer.decode(a[:-1] if end else a).strip() for a, end in zip(answers, ended)]
    scores, dice, lines = gold(texts), random.Random(seed), []
    for i, prompt in enumerate(prompts):
        group = range(i * ANSWERS, (i + 1) * ANSWERS)
        order = [group[k] for k in rank([scores[j] for j in group], dice)]
        row = {"prompt": prompt["prompt"], "answers": [texts[j] for j in order], "gold": [scores[j] for j in order]}
        lines.append(json.dumps(row, ensure_ascii=False))
    common.atomic_write(out, "\n".join(lines) + "\n")
    gaps = [abs(scores[i + a] - scores[i + b])
            for i in range(0, len(scores), ANSWERS) for a in range(ANSWERS) for b in range(a)]
    figures = {"answers": len(texts), "gold_mean": statistics.mean(scores), "gold_std": statistics.stdev(scores),
               "ended": sum(ended) / len(ended),
               "ceiling": statistics.mean(1 / (1 + math.exp(-SHARPNESS * g)) for g in gaps)}
    print(f"{len(lines)} prompts, {len(texts)} answers: gold {figures['gold_mean']:+.2f} +- {figures['gold_std']:.2f}, "
          f"{figures['ended']:.0%} ended, the noise leaves an accuracy of at most {figures['ceiling']:.1%}. -> {out}")
    return figures


# ---------------------------------------------------------------- running and reading the stages

def stage(command: list[str], out_dir: Path, seed: int, **flags) -> float:
    """Runs one script as a user would and returns its seconds; a failed gate goes on, a crash does not."""
    flags = {"out_dir": out_dir, "seed": seed, **flags}
    command = [*command, *[str(x) for name, value in flags.items() for x in (f"--{name}", value)], "--overwrite"]
    print(f"\n$ python {' '.join(command)}", flush=True)
    start = time.time()
    done = subprocess.run([sys.executable, *command], cwd=HERE)
    if not (out_dir / "gate.json").exists():
        raise common.UserError(f"{command[0]} stopped with exit code {done.returncode} before its gate; see above")
    return time.time() - start


def last(rows: list[dict], name: str) -> float:
    return next(row[name] for row in reversed(rows) if name in row)


def judge_ppo(out: Path) -> tuple[list[dict], list[dict]]:
    """Asks the gold judge about every answer that PPO sampled -> held-out answers before and after; the mean of each
    update goes to gold.jsonl beside metrics.jsonl, for the report."""
    samples = rows_of(out / "samples.jsonl")
    for row, g in zip(samples, gold([row["answer"] for row in samples])):
        row["gold"] = g
    lines = []
    for step in sorted({row["step"] for row in samples if row["split"] == "train"}):
        scores = [row["gold"] for row in samples if row["split"] == "train" and row["step"] == step]
        lines.append(json.dumps({"step": step, "gold/score": statistics.mean(scores)}))
    common.atomic_write(out / "gold.jsonl", "\n".join(lines) + "\n")
    steps = sorted({row["step"] for row in samples if row["split"] == "eval"})
    return tuple([row for row in samples if row["split"] == "eval" and row["step"] == s] for s in (steps[0], steps[-1]))


def answers_of(model_name: str, prompts: list[str], seed: int) -> list[str]:
    """Greedy answers of one model to the panel; loaded alone, so that memory stays that of one."""
    world = common.setup("auto", "auto", seed, quiet=True)
    model, tokenizer = checkpoints.load(model_name, world.device, world.dtype)
    ids = [tokenizer.render([{"role": "user", "content": p}], add_generation_prompt=True)[0] for p in prompts]
    answers = sft.answer(model, ids, tokenizer, ANSWER_LEN)
    return [tokenizer.decode([t for t in a if t not in tokenizer.eos_ids]).strip() for a in answers]


def difference(before: list[dict], after: list[dict], name: str) -> tuple[float, float]:
    """Mean of after - before over the same prompts, and its standard error."""
    d = [b[name] - a[name] for a, b in zip(before, after)]
    return statistics.mean(d), statistics.stdev(d) / math.sqrt(len(d))


def peak_memory() -> float:
    """GB of the largest process so far, this one or a stage. Windows has no such counter: nan."""
    try:
        import resource
    except ImportError:
        return math.nan
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (1e9 if sys.platform == "darwin" else 1e6)                   # bytes on a Mac, KiB on Linux


# ---------------------------------------------------------------- gates over the whole chain

def measure(out: Path, labels: dict, before: list[dict], after: list[dict]) -> dict[str, float]:
    """The figures that bands are made of."""
    log = {name: rows_of(out / name / "metrics.jsonl") for name in ("sft", "reward", "ppo")}
    return {"sft/eval_loss": last(log["sft"], "eval/loss"), "sft/eos_rate": last(log["sft"], "eval/eos_rate"),
            "reward/accuracy": last(log["reward"], "eval/accuracy"), "reward/ceiling": labels["ceiling"],
            "reward/longer_wins": last(log["reward"], "eval/longer_wins"),
            "ppo/proxy_rise": difference(before, after, "score")[0],
            "ppo/gold_rise": difference(before, after, "gold")[0],
            "ppo/gold_before": statistics.mean(r["gold"] for r in before),
            "ppo/gold_after": statistics.mean(r["gold"] for r in after),
            "ppo/kl": last(log["ppo"], "eval/kl"), "ppo/eos_rate": last(log["ppo"], "eval/eos_rate")}


GATED = ("sft/eval_loss", "reward/accuracy", "ppo/proxy_rise", "ppo/gold_rise", "ppo/kl")     # these have bands


def gate(out: Path, figures: dict, before: list[dict], after: list[dict], expected: dict) -> bool:
    """What no stage can say by itself: did the judge's opinion rise with the learned reward, as it usually does?"""
    (proxy, proxy_error), (rise, error) = (difference(before, after, name) for name in ("score", "gold"))
    inside = [(f"{name} in its band", low <= figures[name] <= high, f"{figures[name]:.3f} in [{low:.3f}, {high:.3f}]")
              for name, (low, high) in expected.items()]
    return common.gate("demo", [
        ("learned reward rose", proxy > max(0.3, 2 * proxy_error),
         f"{proxy:+.2f} +- {proxy_error:.2f} on {len(before)} held-out prompts"),
        ("gold reward rose", rise > max(0.1, 2 * error),
         f"{rise:+.2f} +- {error:.2f}: {figures['ppo/gold_before']:+.2f} -> {figures['ppo/gold_after']:+.2f}"),
        ("end tokens kept", figures["ppo/eos_rate"] >= 0.95, f"{figures['ppo/eos_rate']:.0%}"), *inside],
        advice="open the report. Learned reward up and gold flat is over-optimisation (raise --kl_coef); both flat is "
               "too little training; a figure outside its band: compare the curves with the bands behind them",
        run_dir=out)


# ---------------------------------------------------------------- the demo

@dataclass
class Config:
    # --- demo ---
    seed: int = 0                      # everything random hangs on it: two runs with one seed give one report
    out_dir: str = "out/demo"          # runs of the three stages, the labels and report.html
    # --- bands ---
    bands: bool = False                # run all seeds and write course/expected/demo.json (hours on a laptop)
    seeds: tuple[int, ...] = tuple(range(7))   # of the bands; finished ones are kept when it is started again


def run(seed: int, out: Path) -> tuple[bool, dict]:
    """All stages with one seed -> every gate passed, the record of the run."""
    out.mkdir(parents=True, exist_ok=True)
    model = {name: out / name / "model" for name in ("sft", "reward", "ppo")}
    seconds: dict[str, float] = {"sft": stage(SFT, out / "sft", seed)}
    start = time.time()
    print("\n# preferences: four sampled answers per prompt, ranked by the gold judge with noise", flush=True)
    labels = prefer(model["sft"], out / "preferences.jsonl", seed)
    seconds["preferences"] = time.time() - start
    seconds["reward"] = stage(REWARD, out / "reward", seed, init=model["sft"], data=out / "preferences.jsonl")
    seconds["ppo"] = stage(PPO, out / "ppo", seed, init=model["sft"], reward=model["reward"])

    # ---- the question that the learned reward cannot answer
    start = time.time()
    before, after = judge_ppo(out / "ppo")
    figures = measure(out, labels, before, after)
    made = json.loads(BANDS.read_text(encoding="utf-8")) if BANDS.exists() else {}
    expected = {name: bands.beside(bands.about(out / name), made)[0] for name in model}
    print()
    gates = {name: json.loads((out / name / "gate.json").read_text(encoding="utf-8"))["passed"] for name in model}
    gates["demo"] = gate(out, figures, before, after, made["bands"] if all(expected.values()) else {})

    # ---- the same prompts answered by all three, and the report
    panels = side_by_side({"base": "smollm2-135m", "sft": str(model["sft"]), "ppo": str(model["ppo"])}, seed)
    seconds["answers"] = time.time() - start
    split_ppo(seconds, rows_of(out / "ppo" / "metrics.jsonl"))
    record = {"seed": seed, "passed": all(gates.values()), "gates": gates, "figures": figures, "labels": labels,
              "seconds": seconds, "peak_gb": peak_memory(), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "expected": BANDS.relative_to(HERE).as_posix()}
    runs = {name: out / name for name in model} | {"demo": out}
    report.write(out / "report.html", f"ChatPiXiu demo, seed {seed}", runs, panels, seconds, record["peak_gb"],
                 expected)
    common.atomic_write(out / "demo.json", json.dumps(record, indent=1))
    print("\ntime: " + ", ".join(f"{name} {common.duration(s)}" for name, s in seconds.items()) +
          f"; total {common.duration(sum(seconds.values()))}; peak memory {record['peak_gb']:.1f} GB")
    print(f"report: {out / 'report.html'}\ntalk to it: python chat.py {model['ppo']}   or side by side: "
          f"python chat.py --compare smollm2-135m {model['sft']} {model['ppo']}")
    return record["passed"], record


def side_by_side(models: dict[str, str], seed: int) -> list[dict]:
    """The panel's prompts answered by every model, printed, with the gold judge's opinion of each answer."""
    prompts = [row["prompt"] for row in rows_of(DATA / "panel.jsonl")]
    answers = {name: answers_of(where, prompts, seed) for name, where in models.items()}
    judged = {name: gold(texts) for name, texts in answers.items()}
    for i, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for name in models:
            print(f"  {name:>4} {judged[name][i]:+.2f}  {' '.join(answers[name][i].split())}")
    return [{"prompt": prompt, "answers": {name: answers[name][i] for name in models},
             "gold": {name: judged[name][i] for name in models}} for i, prompt in enumerate(prompts)]


def split_ppo(seconds: dict[str, float], updates: list[dict]) -> None:
    """Where PPO's time went: sampling, scoring, training, and the rest (loading, held-out answers, saving)."""
    rest = seconds.pop("ppo")
    for what in ("generate", "score", "train"):
        seconds[f"ppo: {what}"] = sum(row.get(f"time/{what}", 0.0) for row in updates)
        rest -= seconds[f"ppo: {what}"]
    seconds["ppo: rest"] = rest


def settings() -> dict[str, dict]:
    """What the three command lines ask for, stage by stage."""
    stages = {"sft": (sft.Config, SFT), "ppo": (ppo.Config, PPO),
              "reward": (reward.Config, [*REWARD, "--data", "out/preferences.jsonl", "--out_dir", "out/reward"])}
    return {name: bands.settings(dataclasses.asdict(common.parse(kind, command[1:])))
            for name, (kind, command) in stages.items()}


def make_bands(cfg: Config) -> bool:
    """Runs every seed that has not been run with these settings, then writes course/expected/demo.json."""
    folders, wanted = [Path(cfg.out_dir) / f"seed_{seed}" for seed in cfg.seeds], settings()
    for seed, folder in zip(cfg.seeds, folders):
        if not ((folder / "demo.json").exists() and all(bands.finished(folder / n, x) for n, x in wanted.items())):
            run(seed, folder)
    records = [json.loads((folder / "demo.json").read_text(encoding="utf-8")) for folder in folders]
    figures = {name: [r["figures"][name] for r in records] for name in records[0]["figures"]}
    bands.write(BANDS, {name: [f / name for f in folders] for name in wanted}, cfg.seeds, figures, GATED,
                threads=records[0]["threads"], gates=[r["gates"] for r in records],
                minutes=[sum(r["seconds"].values()) / 60 for r in records], peak_gb=[r["peak_gb"] for r in records])
    return all(r["passed"] for r in records)


def main(cfg: Config) -> bool:
    if cfg.bands:
        return make_bands(cfg)
    return run(cfg.seed, Path(cfg.out_dir))[0]


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
