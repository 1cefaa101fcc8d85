"""How fast is it beside what a reader would install instead? Same weights, same batch, same run, interleaved.

    python bench.py                        # sampling and LoRA training against transformers + peft, medians and ratios
    python bench.py --repeats 7 --out docs/results/bench_cpu.json

Both sides get the model in the same dtype, a rank-16 adapter on all seven linears, the same prompts (left-padded) and
the same training rows (right-padded). Sampling draws exactly `new_tokens` tokens a row on both sides: no end token
stops it.
"""
import json
import platform
import statistics
import sys
import tempfile
import time
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


def peers(model_dir: Path, cfg: Config, dtype: torch.dtype):
    """transformers + peft with random adapters, as its documentation shows; None if they are not installed."""
    try:
        import peft
        import transformers
    except ImportError as missing:
        raise common.UserError(f"{missing.name} is not installed: pip install -r requirements-test.txt") from None
    transformers.logging.set_verbosity_error()
    hf = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    hf = peft.get_peft_model(hf, peft.LoraConfig(r=cfg.lora_r, lora_alpha=32, target_modules=list(lora.ALL_LINEAR),
                                                 task_type="CAUSAL_LM"))
    return hf


def interleave(sides: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds per call of each side, one uncounted call first, then in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title: str, tokens: int, seconds: dict[str, list[float]], peer: str) -> dict:
    print(f"\n{title}")
    base = statistics.median(seconds[peer])
    result = {}
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(times, seconds[peer]))
        result[name] = {"tokens_per_sec": tokens / statistics.median(times), "ratio_to_peer": ratio, "seconds": times}
        print(f"  {name:34s} {tokens / statistics.median(times):8.0f} tok/s   {ratio:5.2f}x   (median of {len(times)}, "
              f"{min(times):.2f} .. {max(times):.2f} s)")
    assert base > 0
    return result


def main(cfg: Config) -> None:
    world = common.setup(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = checkpoints.load(cfg.init, world.device, world.dtype)
    chat.use_format(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(model, tokenizer, folder)
        hf = peers(Path(folder), cfg, world.dtype).to(world.device)
    lora.apply(model, cfg.lora_r, 32.0, name="bench")
    for (_, ours), (_, theirs) in zip(lora.parameters(model, "bench"), ((n, p) for n,
                                                                        p in hf.named_parameters() if "lora_" in n),
                                                                        strict=True):
        torch.nn.init.normal_(ours.data,
                              std=0.02)                             # the same adapter on both sides, and not zero
        theirs.data.copy_(ours.data)

    # ---- the two sides compute the same thing
    prompts = data_batch.encode_prompts(formats.read_prompts("data/demo/prompts.jsonl"), tokenizer, 128)
    ids, mask = (x.to(world.device) for x in data_batch.pad([p["ids"] for p in prompts[:cfg.rows]], tokenizer.pad_id,
                                                            side="left"))
    with torch.no_grad(), lora.use(model, "bench"):
        ours, theirs = model(ids, mask)[:, -1].float(), hf(ids, attention_mask=mask).logits[:, -1].float()
        print(f"largest difference of the logits: {float((ours - theirs).abs().max()):.3f} (logits up to "
              f"{float(ours.abs().max()):.1f}, {world.dtype})")

    # ---- sampling with a LoRA policy
    def sample_ours(merge: bool) -> None:
        with (lora.merged if merge else lora.use)(model, "bench"):
            assert model.generate(ids, cfg.new_tokens, mask).shape[1] == cfg.new_tokens

    def sample_theirs(**kind) -> None:
        with torch.no_grad():
            out = hf.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                              pad_token_id=tokenizer.pad_id,
                              min_new_tokens=cfg.new_tokens, max_new_tokens=cfg.new_tokens, **kind)
        assert out.shape[1] == ids.shape[1] + cfg.new_tokens

    hf.eval()
    figures = {"sample": table(f"sampling {cfg.rows} answers of {cfg.new_tokens} tokens with a LoRA policy",
                               cfg.rows * cfg.new_tokens, interleave({
        "ours, merged for the rollout": lambda: sample_ours(True), "ours, adapter live": lambda: sample_ours(False),
        "transformers + peft": sample_theirs}, cfg.repeats), "transformers + peft")}

    # ---- LoRA training
    samples = data_batch.encode_sft(formats.read_sft("data/demo/sft.jsonl")[:cfg.train_rows], tokenizer, 256)
    t_ids, _, t_mask = sft.collate(samples, tokenizer.pad_id, world.device)
    attention = torch.tensor([[1] * len(s["ids"]) + [0] * (t_ids.shape[1] - len(s["ids"])) for s in samples],
                             device=world.device)
    labels = t_ids.masked_fill(t_mask == 0, -100)
    mine = torch.optim.AdamW([p for _, p in lora.parameters(model, "bench")], lr=1e-5)
    other = torch.optim.AdamW([p for p in hf.parameters() if p.requires_grad], lr=1e-5)

    def train_ours() -> None:
        with lora.use(model, "bench"):
            sft.batch_loss(model, t_ids, None, t_mask).backward()
        mine.step()
        mine.zero_grad()

    def train_theirs() -> None:
        hf(input_ids=t_ids, attention_mask=attention, labels=labels).loss.backward()
        other.step()
        other.zero_grad()

    hf.train()
    real = int(attention.sum())
    figures["sft"] = table(f"LoRA SFT step, {cfg.train_rows} rows, {real} real tokens of {t_ids.numel()}", real,
                           interleave({"ours": train_ours, "transformers + peft": train_theirs}, cfg.repeats),
                           "transformers + peft")
    if cfg.out:
        import peft
        import transformers
        figures["about"] = {"command": "python " + " ".join(sys.argv), "device": str(world.device),
                            "dtype": str(world.dtype), "cpu": platform.processor() or platform.machine(),
                            "threads": torch.get_num_threads(), "torch": torch.__version__,
                            "transformers": transformers.__version__, "peft": peft.__version__,
                            "date": time.strftime("%Y-%m-%d")}
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        common.atomic_write(cfg.out, json.dumps(figures, indent=1))


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
