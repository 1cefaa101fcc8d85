"""Stage 1, supervised fine-tuning: show a language model conversations and let it learn the assistant's half of them.

    loss = - 1/N  sum over supervised tokens t of  log p(token_t | tokens before t)         N: all of the step

Only the assistant's words and their end token are supervised. The end token matters most: a model that never saw it
as a target never stops. N is counted first, over all micro-batches and all ranks: a mean of means would weigh short
answers more.

    python sft.py                                                       # the embedded default, a laptop, two minutes
    python sft.py --init llama-7b --data alpaca.json --dry_run          # how much memory, and why
    python sft.py --init DIR --data FILE --out_dir out/sft              # LoRA; --lora_r 0 trains every weight
    python sft.py --init llama-7b --data FILE --quant nf4 --checkpointing      # QLoRA: the base in four bits
    torchrun --nproc_per_node 8 sft.py --init DIR --data FILE           # many GPUs

Out comes a run folder: model/ (a directory that other tools load, the adapter merged in), adapter/ (PEFT's format),
metrics.jsonl, samples.jsonl, gate.json, state/ (for --resume). Over a base in four bits nothing is merged: adapter/ is
then what goes on, as --init of the next stage or in chat.py, with the same --quant. Both put W + BA into four bits
anew, trained was BA beside four bits of W: eval/saved_loss says what that costs, and the gate asks it.
"""
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoints
import common
import lora
import memory
from checkpoints.export import write_tokenizer
from data import batch as data_batch
from data import chat, formats
from kernels.head import linear_cross_entropy
from model import Transformer, linear_head


@dataclass
class Config:
    # --- model and data ---
    init: str = "smollm2-135m"         # a name (python -m checkpoints names) or a directory with weights
    data: str = "data/demo/sft.jsonl"  # any json / jsonl of conversations, instructions or texts: the format is sniffed
    valid: str = ""                    # held-out file; empty: the last valid_share of data is held out
    valid_share: float = 0.05          # ignored when valid is given
    format: str = "auto"               # name the format of data when sniffing guesses wrong
    template: str = ""                 # a chat format, say chatml (help: a list); empty: the model's own
    skip_bad: bool = False             # go on past rows that cannot be read (they are counted) instead of stopping
    max_len: int = 512                 # tokens per row; longer conversations are cut and counted
    packing: bool = True               # several conversations in one row, none sees another; off: one per row
    out_dir: str = "out/sft"
    overwrite: bool = False            # replace a finished run in out_dir
    # --- training ---
    steps: int = 0                     # optimiser steps; 0: as many as `epochs` needs
    epochs: float = 1.0
    batch_size: int = 16               # rows per optimiser step, over all ranks
    micro_batch: int = 4               # rows per forward: lower it when memory runs out, the gradient stays the same
    lr: float = 2e-4                   # LoRA likes 1e-4 .. 5e-4; full fine-tuning 1e-5 .. 3e-5
    schedule: str = "cosine"           # cosine | linear | constant
    warmup: int = 10                   # steps of linear warm-up
    weight_decay: float = 0.0
    grad_clip: float = 1.0             # norm of the gradient at most; 0: off
    checkpointing: bool = False        # recompute activations in backward: a third slower, a fraction of the memory
    # --- LoRA ---
    lora_r: int = 16                   # rank; 0: train every weight
    lora_alpha: float = 32.0           # the correction is scaled by alpha / r
    lora_targets: tuple[str, ...] = lora.ALL_LINEAR
    quant: str = ""                    # nf4: the frozen linears in four bits (QLoRA), a quarter of the memory of bf16
    # --- run ---
    seed: int = 0
    device: str = "auto"               # auto | cpu | cuda | mps
    dtype: str = "auto"                # of the frozen weights and the arithmetic: auto | bf16 | fp32
    eval_every: int = 50               # steps between measurements on held-out rows
    eval_answers: int = 32             # held-out prompts that are answered to see whether the model stops
    answer_len: int = 64               # tokens an answer may take there
    save_every: int = 50               # steps between states that --resume can continue from
    resume: bool = False               # go on from the newest state in out_dir
    dry_run: bool = False              # print parameters and memory, allocate nothing


# ---------------------------------------------------------------- the maths

def loss(logits: Tensor, ids: Tensor, mask: Tensor, n_tokens: float | None = None) -> Tensor:
    """Mean negative log-likelihood of the supervised tokens: (B, T, V), (B, T), mask (B, T) 1 = supervised -> scalar.

        ids      [bos] Hi  :  Hello  [end]      position t predicts token t + 1: logits move one to the left of ids
        mask       0   0   0    1      1        "Hello" is predicted at ":", [end] at "Hello"
    n_tokens: the count of the whole optimiser step when this is one micro-batch of several."""
    keep = mask[:, 1:] == 1
    return nll(logits[:, :-1][keep], ids[:, 1:][keep], n_tokens)


def nll(logits: Tensor, targets: Tensor, n_tokens: float | None = None) -> Tensor:
    """(N, V), (N,) -> sum of -log p in fp32 over n_tokens (default N; at least 1, so that nothing divides by zero)."""
    n = len(targets) if n_tokens is None else n_tokens
    return F.cross_entropy(widen(logits), targets, reduction="sum") / max(1, n)


def widen(x: Tensor) -> Tensor:
    """At least fp32; fp64 stays fp64, for tests in which nothing may hide in rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_loss(model: Transformer, ids: Tensor, docs: Tensor | None, mask: Tensor,
               n_tokens: float | None = None) -> Tensor:
    """`loss`, with the head computed only where a token is supervised: with V = 50,000 it is a quarter of all work.
    An encoder-decoder reads the prompt in its encoder and is taught the answer in its decoder."""
    if getattr(model, "encoder_decoder", False):
        prompt, seen, answer, keep = data_batch.split(ids, mask)
        given = F.pad(answer[:, :-1], (1, 0), value=model.config.decoder_start_id)       # [a b end] -> [start a b]
        return head_loss(model.lm_head, model.hidden(prompt, seen, given)[keep], answer[keep], n_tokens)
    keep = mask[:, 1:] == 1
    return head_loss(model.lm_head, model.hidden(ids, docs)[:, :-1][keep], ids[:, 1:][keep], n_tokens)


def head_loss(head: torch.nn.Module, h: Tensor, targets: Tensor, n_tokens: float | None = None) -> Tensor:
    """nll(head(h), targets): (N, C), (N,). On a GPU in chunks of rows, with the gradients made on the way: (N, V)
    logits never exist as a whole."""
    if (parts := linear_head(head)) is None:
        return nll(head(h), targets, n_tokens)
    weight, bias, cap = parts
    share = torch.tensor(1 / max(1, len(targets) if n_tokens is None else n_tokens), device=h.device)
    return linear_cross_entropy(h, weight, targets, share, bias, softcap=cap)


# ---------------------------------------------------------------- batches and answers

def collate(rows: list[dict], pad_id: int, device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows of {"ids", "mask", maybe "docs"} -> ids, docs, mask (B, T), padded on the right. docs is None without
    packing: a causal model never looks at what follows, so right padding needs no mask."""
    ids, _ = data_batch.pad([row["ids"] for row in rows], pad_id)
    mask, _ = data_batch.pad([row["mask"] for row in rows], 0)
    docs = data_batch.pad([row["docs"] for row in rows], 0)[0].to(device) if any(max(row.get("docs", [1])) > 1
                                                                                 for row in rows) else None
    return ids.to(device), docs, mask.to(device)


def autocast(world: common.World, full: bool):
    """Full training keeps fp32 weights and computes in bf16; LoRA's frozen base is bf16 already."""
    mixed = full and world.dtype != torch.float32
    return torch.autocast(world.device.type, world.dtype) if mixed else contextlib.nullcontext()


def answer(model: Transformer, prompts: list[list[int]], tokenizer, max_new_tokens: int, temperature: float = 0.0,
           seed: int = 0, rows: int = 32) -> list[list[int]]:
    """New ids for each prompt (end token included if it came), in batches of prompts of similar length."""
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        part = order[start:start + rows]
        ids, mask = data_batch.pad([prompts[i] for i in part], tokenizer.pad_id, side="left")
        new = model.generate(ids.to(device), max_new_tokens, mask.to(device), temperature, eos_ids=tokenizer.eos_ids,
                             generator=generator, pad_id=tokenizer.pad_id).tolist()
        for i, row in zip(part, new):
            end = next((t for t, token in enumerate(row) if token in tokenizer.eos_ids), len(row) - 1)
            answers[i] = row[:end + 1]
    return answers


def in_the_loss(ids: Tensor, mask: Tensor, eos_ids) -> tuple[int, int]:
    """Of the tensors a step computes with: supervised tokens, and those of them that are end tokens."""
    keep = mask[:, 1:] == 1
    ends = torch.isin(ids[:, 1:], torch.tensor(sorted(eos_ids), device=ids.device))
    return int(keep.sum()), int((keep & ends).sum())


@torch.no_grad()
def evaluate(model: Transformer, samples: list[dict], tokenizer, cfg: Config, world: common.World) -> dict[str, float]:
    """Held-out loss per supervised token; each rank takes every size-th sample."""
    total = count = 0.0
    for start in range(0, len(samples), cfg.micro_batch * world.size):
        part = samples[start:start + cfg.micro_batch * world.size][world.rank::world.size]
        if part:
            ids, docs, mask = collate(part, tokenizer.pad_id, world.device)
            with autocast(world, cfg.lora_r == 0):
                total += float(batch_loss(model, ids, docs, mask, n_tokens=1))
            count += float((mask[:, 1:] == 1).sum())
    return {"eval/loss": common.all_sum(total) / max(1.0, common.all_sum(count))}


def packing_gap(model: Transformer, rows: list[dict], tokenizer, cfg: Config, world: common.World) -> float:
    """|loss of packed rows - loss of the same samples, a row each|: 0 up to rounding, or they see each other."""
    alone = [{key: [x for x, doc in zip(row[key], row["docs"]) if doc == k] for key in ("ids", "mask")}
             for row in rows for k in dict.fromkeys(row["docs"])]
    return abs(evaluate(model, rows, tokenizer, cfg, world)["eval/loss"] -
               evaluate(model, alone, tokenizer, cfg, world)["eval/loss"])


def sample_answers(model: Transformer, rows: list[dict], tokenizer, cfg: Config, run: common.Run, step: int) -> float:
    """Answers held-out prompts greedily, keeps the texts in samples.jsonl, returns the share that ended by itself."""
    rows = [row for row in rows if row["messages"][-1]["role"] == "assistant"][:cfg.eval_answers]
    if not rows:
        return float("nan")
    prompts = [tokenizer.render(row["messages"][:-1], add_generation_prompt=True)[0] for row in rows]
    answers = answer(model, prompts, tokenizer, cfg.answer_len)
    ended = [bool(ids) and ids[-1] in tokenizer.eos_ids for ids in answers]
    run.sample(step, [{"prompt": row["messages"][-2]["content"], "answer": tokenizer.decode(ids[:-1] if end else ids),
                       "ended": end,
                       "reference": row["messages"][-1]["content"]} for row, ids, end in zip(rows, answers, ended)])
    return sum(ended) / len(ended)


def check_quant(cfg) -> None:
    """Of every stage: four bits cannot be trained, only what lies beside them."""
    if cfg.quant and (cfg.lora_r == 0 or getattr(cfg, "merge", False)):
        raise common.UserError("--quant keeps the frozen base in four bits: it needs adapters beside it (--lora_r 16) "
                               "that stay beside it (no --merge)")


# ---------------------------------------------------------------- training

def prepare(cfg: Config, tokenizer, pairs: bool = False) -> tuple[list[dict], list[dict], list[dict]]:
    """Reads and encodes the data: (training rows, held-out samples, held-out conversations). pairs: for an
    encoder-decoder, one prompt and one answer a row."""
    rows = formats.read_sft(cfg.data, cfg.format, cfg.skip_bad)
    rows.print_report()
    if cfg.valid:
        train, held = rows, formats.read_sft(cfg.valid, cfg.format, cfg.skip_bad)
    else:
        cut = max(1, round(len(rows) * (1 - cfg.valid_share)))
        train, held = rows[:cut], rows[cut:]
    samples, held_samples = (data_batch.encode_sft(part, tokenizer, cfg.max_len) for part in (train, held))
    if pairs:
        samples, held_samples = data_batch.last_answers(samples), data_batch.last_answers(held_samples)
    samples.print_report()
    share = sum(sum(s["mask"]) for s in samples) / max(1, sum(len(s["ids"]) for s in samples))
    if not 0 < share <= 1:
        raise common.UserError(f"{cfg.data}: {share:.0%} of the tokens are supervised, there is nothing to learn from")
    sample = data_batch.show(tokenizer, samples[0]["ids"], samples[0]["mask"], colour=sys.stdout.isatty())
    print(f"supervised: {share:.0%} of the tokens. One sample, supervised tokens marked:\n{sample}")
    packed = data_batch.pack(samples, cfg.max_len) if cfg.packing and not pairs else samples
    return packed, held_samples, [row for row in held if "messages" in row]


def improve(model: Transformer, rows: list[dict], optimizer: torch.optim.Optimizer, tokenizer, cfg: Config,
            world: common.World, step: int, run=None, state=None) -> dict[str, float]:
    """One step, at the rate that the optimiser holds -> the figures of the log. Whoever fine-tunes calls this: main,
    and every experiment of the course."""
    # ---- count the supervised tokens, then sum gradients over micro-batches and ranks
    started, trainable = time.perf_counter(), [p for p in model.parameters() if p.requires_grad]
    n_tokens = common.all_sum(sum(sum(row["mask"][1:]) for row in rows))
    total, counts = 0.0, []
    for i in range(0, len(rows), cfg.micro_batch):
        ids, docs, mask = collate(rows[i:i + cfg.micro_batch], tokenizer.pad_id, world.device)
        with lora.use(model, "sft" if cfg.lora_r else None), autocast(world, cfg.lora_r == 0):
            part = batch_loss(model, ids, docs, mask, n_tokens)
        part.backward()
        total += float(part.detach())
        counts.append(in_the_loss(ids, mask, tokenizer.eos_ids))
    if step == 0:
        common.check_gradients(model.named_parameters())
    common.sync_gradients(trainable)

    # ---- check, clip, move
    norm, total = common.clip(trainable, cfg.grad_clip), common.all_sum(total)
    common.check_finite({"loss": total, "gradient norm": norm}, step, [place(row) for row in rows], run, state)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens, seen, ends = (common.all_sum(sum(x)) for x in ([len(row["ids"]) for row in rows], *zip(*counts)))
    return {"loss": total, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "num_tokens": n_tokens,
            "num_end_tokens": ends, "loss_weight": seen / max(1, n_tokens),
            "tokens_per_sec": tokens / (time.perf_counter() - started)}


def main(cfg: Config) -> bool:
    # ---- setup: device, model, adapter
    chat.check_format(cfg.template)
    world = common.setup(cfg.device, cfg.dtype, cfg.seed)
    full = cfg.lora_r == 0
    check_quant(cfg)
    if cfg.dry_run:
        memory.print_table(memory.estimate(checkpoints.read_config(cfg.init), "sft", batch=cfg.micro_batch,
                                           length=cfg.max_len, lora_r=cfg.lora_r,
                                           targets=checkpoints.our_linears(cfg.init, cfg.lora_targets),
                                           dtype=world.dtype, checkpointing=cfg.checkpointing, quant=cfg.quant,
                                           device=world.device.type))
        return True
    model, tokenizer = checkpoints.load(cfg.init, world.device, torch.float32 if full else world.dtype, quant=cfg.quant)
    if getattr(model, "bidirectional", False):
        raise common.UserError(f"{cfg.init} reads in both directions: taught to predict the next token it would see it")
    chat.use_format(tokenizer, cfg.template)
    common.seed_all(cfg.seed)
    if not full:
        lora.apply(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, "sft")
    model.checkpointing = cfg.checkpointing
    trainable = list(model.named_parameters()) if full else lora.parameters(model, "sft")

    # ---- data, optimiser, run folder
    train, held, talks = prepare(cfg, tokenizer, pairs=getattr(model, "encoder_decoder", False))
    batches = data_batch.Batches(train, cfg.batch_size, cfg.seed, rank=world.rank, world=world.size)
    steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch_size))
    optimizer = common.optimizer(model, [{"name": "model", "params": trainable, "lr": 1.0}],
                                 weight_decay=cfg.weight_decay)
    run = common.Run(cfg.out_dir, "sft", cfg, world, resume=cfg.resume)
    run.total = steps
    step, first = 0, {}

    def state() -> dict:
        return {"step": step, "first": first, "batches": batches.state(), "optimizer": optimizer.state_dict(),
                "weights": {name: p.detach() for name, p in trainable}}

    if cfg.resume and (saved := run.load_state()):
        step, first = saved["step"], saved["first"]
        batches.load_state(saved["batches"])
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, p in trainable:
                p.copy_(saved["weights"][name])

    while True:
        # ---- measure on held-out rows
        if step % cfg.eval_every == 0 or step == steps:
            with lora.use(model, None if full else "sft"):
                measured = evaluate(model, held, tokenizer, cfg, world)
                if step in (0, steps):
                    measured["eval/eos_rate"] = sample_answers(model, talks, tokenizer, cfg, run, step)
                if step == 0 and "docs" in train[0]:
                    measured["eval/packing_gap"] = packing_gap(model, train[:cfg.micro_batch], tokenizer, cfg, world)
            first = first or measured
            run.log(step, measured, show=("eval/loss", "eval/eos_rate"))
        if step == steps:
            break

        # ---- one step
        rows = sorted(batches.next(), key=lambda row: len(row["ids"]))        # similar lengths together: less padding
        lr = common.lr_at(step, steps, cfg.lr, cfg.warmup, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        figures = improve(model, rows, optimizer, tokenizer, cfg, world, step, run, state())
        step += 1
        run.log(step, figures, show=("loss", "lr", "tokens_per_sec"))
        if step % cfg.save_every == 0 or step == steps:
            run.save_state(step, state())

    # ---- keep the result: the adapter as it is, the model with the adapter merged in, and the proof that both were
    # saved
    if world.main:
        export(model, tokenizer, cfg, run, full)
    common.barrier()
    again = []
    if cfg.quant:
        saved = saved_loss(run, held, tokenizer, cfg, world)
        run.log(step, saved)
        again = [("and as saved, in four bits anew", saved["eval/saved_loss"] < first["eval/loss"],
                  f"{saved['eval/saved_loss']:.3f}")]
    return common.gate("sft", [
        ("held-out loss fell", measured["eval/loss"] < first["eval/loss"],
         f"{first['eval/loss']:.3f} -> {measured['eval/loss']:.3f}"), *again,
        ("answers end", not measured["eval/eos_rate"] < 0.95,
         f"{first['eval/eos_rate']:.0%} -> {measured['eval/eos_rate']:.0%} of {cfg.eval_answers}"),
    ], advice="loss rises: lower --lr or --epochs. Answers do not end: look at the sample above, its end token must be "
              "marked.", run=run)


def place(row: dict) -> str:
    return str(row.get("where", "?"))


def export(model: Transformer, tokenizer, cfg: Config, run: common.Run, full: bool) -> None:
    """adapter/ and, unless the base is in four bits, model/; the adapter is read back and must give the logits of the
    live one."""
    out = Path(run.dir)
    if not full:
        lora.save(model, "sft", out / "adapter", base=str(checkpoints.resolve(cfg.init)))
        lora.load(model, out / "adapter", "saved")
        probe = torch.arange(16, device=model.embed_tokens.weight.device)[None] % model.config.vocab_size
        with torch.no_grad():
            with lora.use(model, "sft"):
                live = model(probe)
            with lora.use(model, "saved"):
                gap = float((model(probe) - live).abs().max())
        assert gap == 0, f"the adapter read back from {out / 'adapter'} gives logits {gap} away from the live one's"
        if cfg.quant:
            return keep_apart(tokenizer, out / "adapter", cfg.init)
        lora.merge(model, "sft", keep_original=False)
        lora.strip(model)
    checkpoints.save(model, tokenizer, out / "model")
    print(f"saved {out / 'model'}   talk to it: python chat.py {out / 'model'}")


def saved_loss(run: common.Run, held: list[dict], tokenizer, cfg: Config, world: common.World) -> dict[str, float]:
    """Held-out loss of adapter/ over its base as --init of the next stage will load it with the same --quant."""
    model, _ = checkpoints.load(run.dir / "adapter", world.device, world.dtype, quant=cfg.quant)
    return {"eval/saved_loss": evaluate(model, held, tokenizer, cfg, world)["eval/loss"]}


def keep_apart(tokenizer, adapter: Path, base: str) -> None:
    """What is left to do over a base in four bits: the adapter's folder gets the tokenizer and is a model by itself."""
    write_tokenizer(tokenizer, adapter)
    print(f"saved {adapter}, nothing is merged into four bits. It is an --init of its own: python chat.py {adapter} "
          f"--quant nf4\n"
          f"as one model: python -m checkpoints convert {base} --lora {adapter} {adapter.parent / 'model'}")


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))
