"""How fast is it beside what a reader would install instead? Same weights, same adapter, same batch, same run, in turn.

    python bench.py                                             # sampling and LoRA training beside transformers + peft
    python bench.py --repeats 7 --out docs/results/bench_cpu.json

Both sides have the model in the same dtype, a rank-16 adapter on all seven linears, the same prompts (left-padded) and
the same training rows (right-padded). Sampling draws exactly `new_tokens` tokens a row on both sides: no end token
stops it. transformers + peft run in a process of their own, as they do for their users: what we tell the allocator
(common.keep_memory) would make them faster. The two processes take turns, and one waits while the other computes.
"""
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoints
import common
import lora
import sft
from data import batch as data_batch
from data import chat, formats


@dataclass
class Config:
    init: str = "smollm2-135m"         # the model on both sides
    rows: int = 32                     # answers sampled at once
    new_tokens: int = 48               # tokens per answer
    train_rows: int = 16               # rows of a training step
    lora_r: int = 16
    repeats: int = 5                   # counted repeats of each side, in turn: A B A B ...
    seed: int = 0
    device: str = "auto"
    dtype: str = "bf16"
    out: str = ""                      # write the figures there as JSON
    peer: str = ""                     # set by bench.py itself: the folder of the other process


# ---------------------------------------------------------------- their side: a process of its own

def peer(folder: Path, cfg: Config) -> None:
    """Loads the model and adapter from `folder` with transformers + peft, then does what each line of stdin says and
    answers with the seconds it took."""
    try:
        import peft
        import transformers
    except ImportError as missing:
        raise common.UserError(f"{missing.name} is not installed: pip install -r requirements-test.txt") from None
    transformers.logging.set_verbosity_error()
    work = torch.load(folder / "work.pt", weights_only=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=common.DTYPES[cfg.dtype])
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).to(work["device"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def logits() -> None:
        with torch.no_grad():
            torch.save(model(work["ids"], attention_mask=work["mask"]).logits[:, -1].float(), folder / "logits.pt")

    def sample() -> None:
        model.eval()
        with torch.no_grad():
            out = model.generate(input_ids=work["ids"], attention_mask=work["mask"], do_sample=True, top_k=0, top_p=1.0,
                                 temperature=1.0, pad_token_id=0, min_new_tokens=cfg.new_tokens,
                                 max_new_tokens=cfg.new_tokens)
        assert out.shape[1] == work["ids"].shape[1] + cfg.new_tokens

    def train() -> None:
        model.train()
        model(input_ids=work["t_ids"], attention_mask=work["attention"], labels=work["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(transformers.__version__, peft.__version__, flush=True)
    for line in sys.stdin:
        print(timed({"logits": logits, "sample": sample, "train": train}[line.strip()]), flush=True)


class Peer:
    """The other process; ask("sample") waits for it and returns its seconds."""
    def __init__(self, folder: Path, cfg: Config):
        command = [sys.executable, __file__, "--peer", str(folder)]
        for name in ("new_tokens", "lora_r", "dtype"):
            command += [f"--{name}", str(getattr(cfg, name))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        encoding="utf-8")
        self.versions = self.line()

    def line(self) -> str:
        if not (text := self.process.stdout.readline()):
            raise common.UserError(f"the process of transformers + peft ended with {self.process.wait()}, see above")
        return text.strip()

    def ask(self, what: str) -> float:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.line())


# ---------------------------------------------------------------- turns and tables

def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, one uncounted turn first."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, call in sides.items():
            spent = call()
            seconds[name] += [spent] if i else []
    return seconds


def table(title: str, tokens: int, seconds: dict[str, list[float]], against: str) -> dict:
    print(f"\n{title}")
    result = {}
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(times, seconds[against]))
        speed = tokens / statistics.median(times)
        result[name] = {"tokens_per_sec": speed, "ratio_to_peer": ratio, "seconds": times}
        print(f"  {name:34s} {speed:8.0f} tok/s   {ratio:5.2f}x   (median of {len(times)}, "
              f"{min(times):.2f} .. {max(times):.2f} s)")
    return result


# ---------------------------------------------------------------- our side

def main(cfg: Config) -> None:
    if cfg.peer:
        return peer(Path(cfg.peer), cfg)
    world = common.setup(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = checkpoints.load(cfg.init, world.device, world.dtype)
    chat.use_format(tokenizer)
    lora.apply(model, cfg.lora_r, 32.0, name="bench")
    for _, p in lora.parameters(model, "bench"):
        torch.nn.init.normal_(p.data, std=0.02)                                # an adapter that is not zero
    prompts = data_batch.encode_prompts(formats.read_prompts("data/demo/prompts.jsonl"), tokenizer, 128)[:cfg.rows]
    ids, mask = (x.to(world.device) for x in data_batch.pad([p["ids"] for p in prompts], tokenizer.pad_id, side="left"))
    samples = data_batch.encode_sft(formats.read_sft("data/demo/sft.jsonl")[:cfg.train_rows], tokenizer, 256)
    t_ids, _, t_mask = sft.collate(samples, tokenizer.pad_id, world.device)
    attention = data_batch.pad([[1] * len(s["ids"]) for s in samples], 0)[0].to(world.device)
    optimizer = torch.optim.AdamW([p for _, p in lora.parameters(model, "bench")], lr=1e-5)

    def sample(how: Callable) -> float:
        def call() -> None:
            with how(model, "bench"):
                assert model.generate(ids, cfg.new_tokens, mask).shape[1] == cfg.new_tokens
        return timed(call)

    def train() -> None:
        with lora.use(model, "bench"):
            sft.batch_loss(model, t_ids, None, t_mask).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lora.save(model, "bench", folder / "adapter", base=str(folder / "model"))
        plain, _ = checkpoints.load(cfg.init, "cpu", world.dtype)
        checkpoints.save(plain, tokenizer, folder / "model")
        torch.save({"ids": ids, "mask": mask, "t_ids": t_ids, "attention": attention, "device": str(world.device),
                    "labels": t_ids.masked_fill(t_mask == 0, -100)}, folder / "work.pt")
        them = Peer(folder, cfg)
        them.ask("logits")
        with torch.no_grad(), lora.use(model, "bench"):
            ours, theirs = model(ids, mask)[:, -1].float(), torch.load(folder / "logits.pt", weights_only=True)
        print(f"largest difference of the logits: {float((ours - theirs).abs().max()):.3f} (logits up to "
              f"{float(ours.abs().max()):.1f}, {cfg.dtype}; mean difference {float((ours - theirs).abs().mean()):.4f})")
        figures = {"sample": table(
            f"sampling {cfg.rows} answers of {cfg.new_tokens} tokens with a LoRA policy", cfg.rows * cfg.new_tokens,
            interleave({"ours (lora.packed)": lambda: sample(lora.packed),
                        "ours (lora.merged)": lambda: sample(lora.merged),
                        "transformers + peft": lambda: them.ask("sample")}, cfg.repeats), "transformers + peft")}
        figures["sft"] = table(
            f"LoRA SFT step, {cfg.train_rows} rows, {int(attention.sum())} real tokens of {t_ids.numel()}",
            int(attention.sum()), interleave({"ours": lambda: timed(train), "transformers + peft":
                                              lambda: them.ask("train")}, cfg.repeats), "transformers + peft")
        them.process.stdin.close()
        them.process.wait()
    if cfg.out:
        figures["about"] = {
            "command": "python " + " ".join(sys.argv), "device": str(world.device), "dtype": cfg.dtype,
            "machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers and peft": them.versions, "date": time.strftime("%Y-%m-%d")}
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        common.atomic_write(cfg.out, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
