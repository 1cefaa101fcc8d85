"""sft.py, reward.py and ppo.py as a user runs them: subprocesses on a tiny model, asserting that they learned, that
they go on after a stop or a kill -9 with the same bits, and that bad input is a clear error that loses nothing.

The tiny world: bytes as tokens, one-letter questions, and answers that are "good" or "evil" at random. SFT learns to
say one of the two and to stop, the reward model learns that "good" is better, and PPO learns to say it.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, randomize

import checkpoints
from data import tokenizer as tokenizers
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--device", "cpu", "--dtype", "fp32")
SFT = ("--lora_r", "0", "--lr", "4e-3", "--batch_size", "16", "--micro_batch", "8", "--max_len", "64", "--answer_len",
       "8",
       "--eval_answers", "16", *TINY)
REWARD = ("--lr", "2e-3", "--batch_size", "8", "--lora_r", "4", "--valid_share", "0.25", *TINY)
PPO = ("--batch_size", "32", "--micro_batch", "16", "--response_len", "8", "--ppo_epochs", "2", "--lr", "5e-3",
       "--value_lr", "5e-3",
       "--lora_r", "4", "--eval_prompts", "32", "--kl_coef", "0.02", *TINY)


def run(script: str, *args, code: int = 0, threads: int = 1) -> str:
    """Output of the script, after checking its exit code."""
    done = subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8",
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    output = done.stdout + done.stderr
    assert done.returncode == code, f"{script} {args} -> {done.returncode}\n{output[-4000:]}"
    return output


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def figure(folder: Path, name: str, which: int) -> float:
    return [row[name] for row in metrics(folder) if name in row][which]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """base/ (a random tiny model), sft.jsonl, pairs.jsonl, prompts.jsonl."""
    where = tmp_path_factory.mktemp("tiny")
    byte_tokenizer(where / "tokenizer")
    tokenizer = tokenizers.load_tokenizer(where / "tokenizer")
    model = Transformer(ModelConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
                                    num_kv_heads=2,
                                    max_positions=256, tie_embeddings=True))
    checkpoints.save(randomize(model, std=0.05), tokenizer, where / "base")
    dice, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    rows = [{"messages": [{"role": "user", "content": dice.choice(letters)},
                          {"role": "assistant", "content": dice.choice(("good", "evil"))}]}
            for _ in range(160)]
    write_rows(where / "sft.jsonl", rows)
    write_rows(where / "pairs.jsonl",
               [{"prompt": dice.choice(letters), "chosen": "good", "rejected": "evil"} for _ in range(96)])
    write_rows(where / "prompts.jsonl", [{"prompt": dice.choice(letters)} for _ in range(128)])
    return where


@pytest.fixture(scope="module")
def trained(place) -> dict[str, str]:
    """The three stages, one after the other; their outputs."""
    out = {}
    out["sft"] = run("sft.py", "--init", place / "base", "--data", place / "sft.jsonl", "--out_dir", place / "sft",
                     "--steps", 60, *SFT)
    out["reward"] = run("reward.py", "--init", place / "sft/model", "--data", place / "pairs.jsonl", "--out_dir",
                        place / "reward",
                        "--steps", 12, *REWARD)
    out["ppo"] = run("ppo.py", "--init", place / "sft/model", "--reward", place / "reward/model", "--data",
                     place / "prompts.jsonl",
                     "--out_dir", place / "ppo", "--steps", 12, *PPO)
    return out


# ---------------------------------------------------------------- they learn

def test_sft_learns_the_answers_and_to_stop(trained, place):
    """The answer is a coin, so the loss per token of g-o-o-d-end / e-v-i-l-end cannot fall below log 2 / 5 = 0.139."""
    assert figure(place / "sft", "eval/loss", 0) > 3 and figure(place / "sft", "eval/loss", -1) < 0.4
    assert figure(place / "sft", "eval/eos_rate", -1) == 1.0
    assert "GATE sft PASS" in trained["sft"]
    assert json.loads((place / "sft/gate.json").read_text(encoding="utf-8"))["passed"]


def test_sft_leaves_a_directory_that_transformers_loads(trained, place):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoModelForCausalLM.from_pretrained(place / "sft/model", dtype=torch.float32)
    ours, tokenizer = checkpoints.load(place / "sft/model")
    ids = AutoTokenizer.from_pretrained(place / "sft/model").apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True)["input_ids"]
    assert ids.tolist() == [tokenizer.render([{"role": "user", "content": "q"}], add_generation_prompt=True)[0]]
    with torch.no_grad():
        assert float((theirs(ids).logits - ours(ids)).abs().max()) < 1e-4
    text = tokenizer.decode(ours.generate(ids, 8, temperature=0.0, eos_ids=tokenizer.eos_ids)[0].tolist())
    assert text in ("good<|im_end|>", "evil<|im_end|>"), text


def test_reward_learns_which_answer_is_better(trained, place):
    assert figure(place / "reward", "eval/accuracy", -1) == 1.0 and "GATE reward" in trained["reward"]
    import reward
    tokenizer = checkpoints.load(place / "sft/model")[1]
    model = reward.load(place / "reward/model")
    scores = []
    for answer in ("good", "evil"):
        # end token last
        ids = tokenizer.render([{"role": "user", "content": "z"}, {"role": "assistant", "content": answer}])[0][:-1]
        scores.append(float(model(torch.tensor([ids]))))
    assert scores[0] > scores[1] + 0.5, scores


def test_ppo_learns_what_the_reward_model_likes(trained, place):
    rows = [json.loads(line) for line in (place / "ppo/samples.jsonl").read_text(encoding="utf-8").splitlines()]
    share = [sum(r["answer"] == "good" for r in rows if r["split"] == "eval" and r["step"] == step) / 32
             for step in (0, 12)]
    assert share[1] > max(0.85, share[0] + 0.15), share
    assert figure(place / "ppo", "eval/scores", -1) > figure(place / "ppo", "eval/scores", 0) + 0.3
    assert "GATE ppo PASS" in trained["ppo"] and figure(place / "ppo", "val/first_ratio_gap", 0) < 1e-6
    assert figure(place / "ppo", "val/sampler_gap", -1) < 1e-5, "what is sampled is not what is scored"


def test_a_run_folder_has_all_its_parts(trained, place):
    for stage, parts in (("sft", ("model/config.json", "model/tokenizer.json", "samples.jsonl")),
                         ("reward", ("model/adapter_config.json", "model/adapter_model.safetensors",
                                     "model/reward.json", "samples.jsonl")),
                         ("ppo", ("model/config.json", "policy/adapter_config.json", "value/adapter_config.json",
                                  "samples.jsonl"))):
        for part in (*parts, "config.json", "metrics.jsonl", "gate.json"):
            assert (place / stage / part).exists(), f"{stage}/{part} is missing"
        about = json.loads((place / stage / "config.json").read_text(encoding="utf-8"))
        assert about["stage"] == stage and about["command"].startswith(f"{stage}.py")
        assert about["versions"]["torch"] == torch.__version__


def test_full_parameter_ppo_with_separate_models_runs_and_learns(trained, place):
    whole = {"--lora_r": "0", "--lr": "1e-3", "--value_lr": "1e-3"}
    args = [word for i, word in enumerate(PPO) if word not in whole and (i == 0 or PPO[i - 1] not in whole)]
    run("reward.py", "--init", place / "sft/model", "--data", place / "pairs.jsonl", "--out_dir", place / "reward_full",
        "--steps", 10,
        "--lora_r", 0, "--lr", "1e-3", "--valid_share", "0.25", "--batch_size", 8, *TINY)
    saved = json.loads((place / "reward_full/model/config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    out = run("ppo.py", "--init", place / "sft/model", "--reward", place / "reward_full/model", "--data",
              place / "prompts.jsonl",
              "--out_dir", place / "ppo_full", "--steps", 8, *args, *[w for pair in whole.items() for w in pair])
    assert "GATE ppo PASS" in out
    assert figure(place / "ppo_full", "eval/scores", -1) > figure(place / "ppo_full", "eval/scores", 0) + 0.2


def test_a_reward_model_of_another_base_keeps_its_own(trained, place):
    """On the policy's base its adapter would judge with weights it was not trained with, and nobody would notice. Also
    when the roles score in one pass: three then share it."""
    run("reward.py", "--init", place / "base", "--data", place / "pairs.jsonl", "--out_dir", place / "reward_other",
        "--steps", 2, *REWARD, code=AnyCode())
    out = run("ppo.py", "--init", place / "sft/model", "--reward", place / "reward_other/model", "--data",
              place / "prompts.jsonl", "--out_dir", place / "ppo_other", "--steps", 1, *PPO, code=AnyCode())
    assert "keeps a base of its own" in out and "GATE ppo" in out
    run("ppo.py", "--init", place / "sft/model", "--reward", place / "reward_other/model", "--data",
        place / "prompts.jsonl", "--out_dir", place / "ppo_once", "--steps", 1, "--one_pass", *PPO, code=AnyCode())
    for name in ("objective/scores", "objective/kl", "objective/entropy", "val/explained_variance", "loss/policy_avg"):
        once, four = (figure(place / folder, name, 0) for folder in ("ppo_once", "ppo_other"))
        assert once == pytest.approx(four, abs=1e-4), name


@pytest.mark.parametrize("family", ["a norm without weights", "no norm at the end"])
def test_reward_and_ppo_of_a_family_with_another_last_norm(place, tmp_path, family):
    """OLMo 1 and GPT-1: nothing may be asked of the last norm's weight, there is none."""
    import transformers
    sizes = {"vocab_size": 259, "bos_token_id": None, "eos_token_id": 258}
    if family == "a norm without weights":
        theirs = transformers.OlmoForCausalLM(transformers.OlmoConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=256,
            max_position_embeddings=256, **sizes))
    else:
        theirs = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4,
                                                                                n_positions=256, **sizes))
    theirs.save_pretrained(tmp_path / "base")
    byte_tokenizer(tmp_path / "base")
    model, _ = checkpoints.load(tmp_path / "base")
    assert getattr(model.norm, "weight", None) is None
    run("reward.py", "--init", tmp_path / "base", "--data", place / "pairs.jsonl", "--out_dir", tmp_path / "reward",
        "--steps", 2, *REWARD, code=AnyCode())
    run("ppo.py", "--init", tmp_path / "base", "--reward", tmp_path / "reward/model", "--data", place / "prompts.jsonl",
        "--out_dir", tmp_path / "ppo", "--steps", 1, *PPO, code=AnyCode())
    assert figure(tmp_path / "ppo", "val/largest_kl", 0) == 0 and figure(tmp_path / "ppo", "val/sampler_gap", 0) < 1e-5
    assert (tmp_path / "ppo/model/config.json").exists() and (tmp_path / "ppo/gate.json").exists()


def test_one_pass_is_for_one_base(trained, place):
    out = run("ppo.py", "--init", place / "sft/model", "--lora_r", 0, "--one_pass", "--dry_run", code=1)
    assert "--one_pass needs the four roles on one base" in out


# ---------------------------------------------------------------- they go on

def stage_command(place: Path, stage: str, out: Path) -> list:
    """A short run of each stage, a state after every step, a schedule that does not depend on --steps."""
    common = ["--out_dir", out, "--save_every", 1, "--schedule", "constant"]
    if stage == "sft":
        return ["sft.py", "--init", place / "sft/model", "--data", place / "sft.jsonl", *SFT, "--lora_r", 4, "--lr",
                "1e-3", *common]
    if stage == "reward":
        return ["reward.py", "--init", place / "sft/model", "--data", place / "pairs.jsonl", *REWARD, *common]
    return ["ppo.py", "--init", place / "sft/model", "--reward", place / "reward/model", "--data",
            place / "prompts.jsonl", *PPO,
            "--eval_prompts", 16, "--batch_size", 16, *common]


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """The last state's tensors, and the log without the clock."""
    state = torch.load(sorted(folder.glob("state/step_*.pt"))[-1], weights_only=True)["state"]
    clock = ("seconds", "tokens_per_sec", "time/generate", "time/score", "time/train")
    return state, [{k: v for k, v in row.items() if k not in clock} for row in metrics(folder)]


def assert_same(a, b, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where}: largest difference {float((a.float() - b.float()).abs().max())}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), (where, a.keys() ^ b.keys())
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), (where, len(a), len(b))
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, (where, a, b)


@pytest.fixture(scope="module")
def straight(trained, place) -> dict[str, tuple]:
    """Four steps without a stop, of each stage."""
    results = {}
    for stage in ("sft", "reward", "ppo"):
        out = place / f"straight_{stage}"
        command = stage_command(place, stage, out)
        run(*command, "--steps", 4, code=gate_code(stage))
        results[stage] = outcome(out)
    return results


def gate_code(stage: str):
    return AnyCode()


class AnyCode(int):
    """After four steps a gate may fail: 0 and 1 are both fine, anything else is a crash."""
    def __eq__(self, other):
        return other in (0, 1)

    __hash__ = int.__hash__


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_steps_and_two_resumed_are_four(straight, place, stage):
    out = place / f"resumed_{stage}"
    command = stage_command(place, stage, out)
    run(*command, "--steps", 2, code=AnyCode())
    run(*command, "--steps", 4, "--resume", code=AnyCode())
    state, log = outcome(out)
    assert_same(straight[stage][0], state, stage)
    middle = {row["step"]: row for row in log if "loss" in row or "objective/kl" in row}
    for row in straight[stage][1]:
        if "loss" in row or "objective/kl" in row:
            assert_same(row, middle[row["step"]], f"{stage} log of step {row['step']}")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_kill_9_then_resume_is_four_steps(straight, place, stage):
    out = place / f"killed_{stage}"
    command = [*stage_command(place, stage, out), "--steps", 4]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (out / "state/step_00000002.pt").exists():                       # dies somewhere in step 3
        assert process.poll() is None, f"{stage} ended with {process.returncode} before its second step"
        assert time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run(*command, "--resume", code=AnyCode())
    state, log = outcome(out)
    assert_same(straight[stage][0], state, stage)
    assert_same(straight[stage][1], log, f"{stage} log")


def test_two_ranks_give_the_gradients_of_one(trained, place):
    """torchrun with gloo: the same losses as one process, to rounding."""
    losses = []
    for n in (1, 2):
        out = place / f"ranks_{n}"
        script = ["-m", "torch.distributed.run", "--nproc_per_node", n, "--master_port", 29533,
                  "sft.py"] if n > 1 else ["sft.py"]
        run(script[0], *script[1:], *stage_command(place, "sft", out)[1:], "--steps", 3, code=AnyCode())
        losses.append([row["loss"] for row in metrics(out) if "loss" in row])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---------------------------------------------------------------- bad input

def test_a_finished_run_is_not_overwritten(trained, place):
    before = (place / "sft/metrics.jsonl").read_bytes()
    out = run("sft.py", "--init", place / "base", "--data", place / "sft.jsonl", "--out_dir", place / "sft", *SFT,
              code=1)
    assert "already holds a run" in out and "--resume" in out and (place / "sft/metrics.jsonl").read_bytes() == before


def test_a_bad_row_names_file_and_line_and_can_be_skipped(trained, place, tmp_path):
    rows = (place / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    rows[6] = json.dumps({"messages": [{"role": "robot", "content": "hi"}, {"role": "assistant", "content": "x"}]})
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(rows), encoding="utf-8")
    command = ["sft.py", "--init", place / "sft/model", "--data", bad, "--out_dir", tmp_path / "out", "--steps", 1,
               *SFT]
    out = run(*command, code=1)
    assert "bad.jsonl:7" in out and "robot" in out and "skip_bad" in out and "Traceback" not in out
    out = run(*command, "--skip_bad", code=AnyCode())
    assert "GATE sft" in out and "159" in out


def test_nan_stops_the_run_and_keeps_the_state(trained, place, tmp_path):
    """A learning rate of 1e30 makes the second loss infinite or NaN."""
    out = run("sft.py", "--init", place / "sft/model", "--data", place / "sft.jsonl", "--out_dir", tmp_path / "out",
              "--steps", 6, *SFT,
              "--lr", "1e30", "--warmup", 0, "--grad_clip", 0, code=1)
    assert "step 1" in out and ("nan" in out or "inf" in out) and "sft.jsonl:" in out and "Traceback" not in out
    kept = torch.load(tmp_path / "out/state/before_nan.pt", weights_only=True)["state"]
    assert kept["step"] == 1 and not (tmp_path / "out/model").exists()


@pytest.mark.parametrize("script", ["sft.py", "reward.py", "ppo.py"])
def test_dry_run_of_a_7b_model_needs_no_weights(script, tmp_path):
    out = run(script, "--init", "llama-7b", "--dry_run", "--dtype", "bf16", "--out_dir", tmp_path / "out")
    assert "6,738,415,616" in out and "Adam" in out and "activations" in out
    assert ("KV cache" in out) == (script == "ppo.py")
    assert not (tmp_path / "out").exists()


def test_a_known_name_without_files_says_what_to_do(tmp_path):
    out = run("sft.py", "--init", "llama-65b", "--out_dir", tmp_path / "out", code=1)
    assert "models/llama-65b" in out and "huggingface.co/huggyllama/llama-65b" in out and "Traceback" not in out


def test_an_unknown_flag_names_the_nearest():
    assert "--micro_batch" in run("ppo.py", "--micro-batchs", 4, code=2)


def test_ppo_refuses_a_language_model_as_reward(trained, place, tmp_path):
    out = run("ppo.py", "--init", place / "sft/model", "--reward", place / "sft/model", "--data",
              place / "prompts.jsonl", *PPO,
              "--out_dir", tmp_path / "out", code=1)
    assert "no reward head" in out and "Traceback" not in out
