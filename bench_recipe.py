"""The recipe on a CPU beside plain transformers: `python bench.py --what recipe`. See bench.py for how turns are taken.

    generate   `rows` answers of `new_tokens` tokens to the demo's prompts, no adapter, bf16 on both sides. Theirs: the
               default cache, and cache_implementation="static". Without torch.compile, as transformers leaves it on a
               CPU: it compiles by itself on accelerators only, and here compiling takes longer than many a run.
    full       one optimiser step that trains every weight, rows of random ids without padding, all supervised. Ours is
               what `sft.py --lora_r 0` does: fp32 weights, bf16 arithmetic. Theirs in fp32, what a CPU user gets, and
               with all weights in bf16, where AdamW rounds most of its updates away: faster, not the same training.
    data       one step on real conversations, in batches as they come. Ours: LoRA, packed into rows of `packed_len`.
               Theirs: padded to the longest of each batch; every weight in bf16, or peft's LoRA. Real tokens/s.

Both sides read the same weights; the first losses have to agree before anything is timed.
"""
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import bench
import checkpoints
import common
import lora
import sft
from data import batch as data_batch
from data import chat, formats

Batch = tuple[Tensor, Tensor, Tensor]      # ids, attention mask, labels


@dataclass
class Work:
    """What both sides do."""
    prompts: Tensor                        # (B, P), padded on the left, and their mask
    mask: Tensor
    whole: Tensor                          # (B, T), no padding, all supervised
    padded: list[Batch]                    # the conversations as a collator makes them
    packed: list[tuple[Tensor, Tensor | None, Tensor]]     # the same, as sft.collate makes them


def make_work(cfg, tokenizer, vocab: int) -> Work:
    prompts = data_batch.encode_prompts(formats.read_prompts("data/demo/prompts.jsonl"), tokenizer, 128)[:cfg.rows]
    ids, mask = data_batch.pad([p["ids"] for p in prompts], tokenizer.pad_id, side="left")
    whole = torch.randint(0, vocab, (cfg.full_rows, cfg.full_len), generator=torch.Generator().manual_seed(cfg.seed))
    samples = data_batch.encode_sft(formats.read_sft("data/demo/sft.jsonl"), tokenizer, cfg.packed_len)
    samples = samples[:cfg.train_rows * cfg.data_batches]
    padded = []
    for start in range(0, len(samples), cfg.train_rows):
        part = samples[start:start + cfg.train_rows]
        row_ids, seen = data_batch.pad([s["ids"] for s in part], tokenizer.pad_id)
        supervised = data_batch.pad([s["mask"] for s in part], 0)[0]
        padded.append((row_ids, seen, row_ids.masked_fill(supervised == 0, -100)))
    rows = data_batch.pack(samples, cfg.packed_len)
    packed = [sft.collate(rows[i:i + 4], tokenizer.pad_id, "cpu") for i in range(0, len(rows), 4)]
    return Work(ids, mask, whole, padded, packed)


def count_supervised(masks: list[Tensor]) -> int:
    return sum(int((mask[:, 1:] == 1).sum()) for mask in masks)


# ---------------------------------------------------------------- their side

def theirs(folder: Path, cfg) -> dict[str, Callable[[], None]]:
    """What the other process can be asked for. A model is made when it is first needed and never before its side's
    uncounted turn."""
    import peft
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work, made = Work(**torch.load(folder / "recipe.pt", weights_only=True)), {}

    def model(kind: str):
        if kind not in made:
            dtype = torch.float32 if kind == "fp32" else torch.bfloat16
            base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
            if kind == "lora":
                base = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
            trained = [p for p in base.parameters() if p.requires_grad]
            made[kind] = base, torch.optim.AdamW(trained, lr=1e-5, fused=True)
        return made[kind]

    def generate(**more) -> None:
        net = model("bf16")[0].eval()
        with torch.no_grad():
            out = net.generate(input_ids=work.prompts, attention_mask=work.mask, do_sample=True, top_k=0, top_p=1.0,
                               temperature=1.0, pad_token_id=0, min_new_tokens=cfg.new_tokens,
                               max_new_tokens=cfg.new_tokens, **more)
        assert out.shape[1] == work.prompts.shape[1] + cfg.new_tokens

    def step(kind: str, batches: list[Batch]) -> None:
        net, optimizer = model(kind)
        net.train()
        count = count_supervised([(labels != -100).long() for _, _, labels in batches])
        total = 0.0
        for ids, mask, labels in batches:
            part = net(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
            part.backward()
            total += float(part.detach())
        optimizer.step()
        optimizer.zero_grad()
        (folder / "loss").write_text(str(total), encoding="utf-8")

    whole = [(work.whole, torch.ones_like(work.whole), work.whole)]
    return {"default": generate, "static": lambda: generate(cache_implementation="static", disable_compile=True),
            "full fp32": lambda: step("fp32", whole), "full bf16": lambda: step("bf16", whole),
            "padded bf16": lambda: step("bf16", work.padded), "padded lora": lambda: step("lora", work.padded)}


# ---------------------------------------------------------------- our side

def ours(cfg, folder: Path, work: Work) -> dict[str, Callable[[], float]]:
    """The same, as sft.py and generate do it; a step returns its loss."""
    world = common.World(torch.device("cpu"), torch.bfloat16)
    plain, _ = checkpoints.load(folder / "model", "cpu", torch.bfloat16)
    full, _ = checkpoints.load(folder / "model", "cpu", torch.float32)
    small, _ = checkpoints.load(folder / "model", "cpu", torch.bfloat16)
    lora.load(small, folder / "adapter", "sft")
    groups = {id(full): list(full.named_parameters()), id(small): lora.parameters(small, "sft")}
    optimizers = {}
    for net in (full, small):
        optimizers[id(net)] = common.optimizer(net, [{"name": "model", "params": groups[id(net)], "lr": 1.0}])
        for group in optimizers[id(net)].param_groups:
            group["lr"] = 1e-5

    def generate() -> None:
        assert plain.generate(work.prompts, cfg.new_tokens, work.mask).shape[1] == cfg.new_tokens

    def step(net, batches) -> float:
        count, total = count_supervised([mask for _, _, mask in batches]), 0.0
        for ids, docs, mask in batches:
            with lora.use(net, None if net is full else "sft"), sft.autocast(world, net is full):
                part = sft.batch_loss(net, ids, docs, mask, count)
            part.backward()
            total += float(part.detach())
        optimizers[id(net)].step()
        optimizers[id(net)].zero_grad(set_to_none=True)
        return total

    whole = [(work.whole, None, torch.ones_like(work.whole))]
    return {"generate": generate, "full": lambda: step(full, whole), "packed": lambda: step(small, work.packed)}


def same_loss(names: list[str], mine: float, them: "bench.Peer", folder: Path, tolerance: float) -> None:
    for name in names:
        them.ask(name)
        other = float((folder / "loss").read_text(encoding="utf-8"))
        print(f"first loss: ours {mine:.4f}, transformers' ({name}) {other:.4f}")
        if not math.isclose(mine, other, rel_tol=tolerance):
            raise common.UserError(f"the first losses differ, ours {mine} and {other} ({name}): not the same work")


def run(cfg, folder: Path) -> tuple[dict, str]:
    """All three tables, and whom they are about."""
    common.setup("cpu", "bf16", cfg.seed)
    model, tokenizer = checkpoints.load(cfg.init, "cpu", torch.bfloat16)
    chat.use_format(tokenizer)
    checkpoints.save(model, tokenizer, folder / "model")
    lora.apply(model, cfg.lora_r, 32.0, name="bench")
    for _, p in lora.parameters(model, "bench"):
        torch.nn.init.normal_(p.data, std=0.02)                                # an adapter that is not zero
    lora.save(model, "bench", folder / "adapter", base=str(folder / "model"))
    work = make_work(cfg, tokenizer, model.config.vocab_size)
    torch.save(vars(work), folder / "recipe.pt")
    them, we = bench.Peer(folder, cfg), ours(cfg, folder, work)
    same_loss(["full fp32", "full bf16"], we["full"](), them, folder, 0.01)
    same_loss(["padded lora"], we["packed"](), them, folder, 0.01)
    real = sum(int(seen.sum()) for _, seen, _ in work.padded)
    cells = sum(ids.numel() for ids, _, _ in work.padded)
    plans = {
        "generate": (f"{cfg.rows} answers of {cfg.new_tokens} tokens, no adapter, bf16", cfg.rows * cfg.new_tokens,
                     "generate", {"transformers": "default", "transformers, static cache": "static"}),
        "full": (f"SFT step of every weight, {cfg.full_rows} x {cfg.full_len} tokens, no padding", work.whole.numel(),
                 "full", {"transformers fp32": "full fp32", "transformers, weights in bf16": "full bf16"}),
        "data": (f"SFT step on {len(work.padded)} x {cfg.train_rows} conversations, {real} real tokens of {cells}",
                 real, "packed", {"transformers, weights in bf16": "padded bf16",
                                  "transformers + peft": "padded lora"})}
    figures = {}
    for key, (title, tokens, mine, others) in plans.items():
        sides = {"ours": lambda mine=mine: bench.timed(we[mine])}
        sides |= {name: lambda what=what: them.ask(what) for name, what in others.items()}
        seconds = bench.interleave(sides, cfg.repeats)
        figures[key] = {f"ratio to {name}": bench.table(f"{title}; beside {name}", tokens,
                                                        {"ours": seconds["ours"], name: seconds[name]}, name)
                        for name in others}
    them.process.stdin.close()
    them.process.wait()
    return figures, them.versions


def answer(folder: Path, cfg) -> None:
    """The other process: a line in, its seconds out."""
    calls = theirs(folder, cfg)
    print("transformers", sys.modules["transformers"].__version__, "peft", sys.modules["peft"].__version__, flush=True)
    for line in sys.stdin:
        print(bench.timed(calls[line.strip()]), flush=True)
