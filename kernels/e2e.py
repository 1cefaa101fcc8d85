"""End to end on a GPU: a LoRA SFT step and generation with our kernels, without them, and with transformers + peft.

    python -m kernels.e2e --out docs/results/e2e_h200.json      random weights of LLaMA-7B's shape, about two minutes
    python -m kernels.e2e --size tiny --device cpu              does the program run? (no figure is worth anything)

Speed does not depend on the weights, so random ones of the true shape do. A step: 2 rows of 2,048 tokens, all of them
supervised, bf16, rank 16 on all linears, fused AdamW, no gradient checkpointing; `packed` has seven documents a row.
MFU counts 4 N FLOPs a token (forward, and backward through a frozen base) against the product's measured ceiling.
"""
import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lora
import sft
from model import ModelConfig, Transformer

SHAPES = {"7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32,
                 "num_heads": 32, "num_kv_heads": 32},
          "1.1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 22,
                   "num_heads": 32, "num_kv_heads": 4},
          "tiny": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4,
                   "num_kv_heads": 2}}
PROMPT, NEW = 128, 48


class Table:
    """Rows of figures, printed and written as they come: what stops the program loses nothing."""
    def __init__(self, args: argparse.Namespace):
        self.args, self.gpu = args, args.device == "cuda"
        self.result = {"device": torch.cuda.get_device_name() if self.gpu else "cpu", "size": args.size,
                       "date": datetime.date.today().isoformat(), "command": "python -m kernels.e2e",
                       "versions": {name: importlib.metadata.version(name) for name in
                                    ("torch", "triton", "transformers", "peft") if installed(name)}, "rows": []}

    def put(self, **row) -> None:
        self.result["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self.args.out:
            Path(self.args.out).write_text(json.dumps(self.result, indent=1), encoding="utf-8")

    def wait(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0

    def clear(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def installed(name: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


def train(table: Table, who: str, loss: Callable[[], Tensor], params: list, tokens: int, numbers: int) -> None:
    """Two steps to warm up, four counted."""
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=table.gpu)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    table.clear()
    for _ in range(2):
        step()
    start = table.wait()
    for _ in range(4):
        step()
    seconds = (table.wait() - start) / 4
    table.put(what="LoRA SFT step", who=who, tokens=tokens, s=seconds, tokens_per_s=tokens / seconds,
              tflops=4e-12 * numbers * tokens / seconds, peak_gib=table.peak())


def generate(table: Table, who: str, call: Callable[[], Tensor], rows: int, size: int) -> None:
    """The second call counts. Every token reads all weights once: gb_per_s is that alone."""
    call()
    table.clear()
    start = table.wait()
    call()
    seconds = table.wait() - start
    table.put(what=f"generation, {rows} rows, {PROMPT} + {NEW}", who=who, s=seconds, tokens_per_s=rows * NEW / seconds,
              gb_per_s=1e-9 * size * NEW / seconds, peak_gib=table.peak())


def ours(table: Table, shape: dict) -> None:
    device = table.args.device
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Transformer(ModelConfig(**shape, max_positions=4096))
    torch.set_default_dtype(torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    for rows in (1, 64):
        prompts = torch.randint(5, shape["vocab_size"], (rows, PROMPT), device=device)
        for kind in ("auto", "torch"):
            os.environ["CHATPIXIU_KERNELS"] = kind
            generate(table, f"ours, kernels {kind}", lambda p=prompts: model.generate(p, NEW, temperature=0.0), rows,
                     2 * numbers)
    lora.apply(model, 16, 32.0, name="sft")
    params = [p for _, p in lora.parameters(model, "sft")]
    ids = torch.randint(5, shape["vocab_size"], (2, table.args.length), device=device)
    documents = (torch.arange(ids.shape[1], device=device) // 300 + 1).expand(*ids.shape)
    for name, docs in (("", None), (", packed", documents)):
        for kind in ("auto", "torch"):
            os.environ["CHATPIXIU_KERNELS"] = kind

            def loss(docs=docs) -> Tensor:
                with lora.use(model, "sft"):
                    return sft.batch_loss(model, ids, docs, torch.ones_like(ids))
            train(table, f"ours, kernels {kind}{name}", loss, params, ids.numel(), numbers)
    os.environ["CHATPIXIU_KERNELS"] = "auto"


def theirs(table: Table, shape: dict) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], num_hidden_layers=shape["num_layers"],
        intermediate_size=shape["intermediate_size"], num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"], max_position_embeddings=4096, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(table.args.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    for rows in (1, 64):
        prompts = torch.randint(5, shape["vocab_size"], (rows, PROMPT), device=table.args.device)
        with torch.no_grad():
            generate(table, "transformers", lambda p=prompts: model.generate(
                p, attention_mask=torch.ones_like(p), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                pad_token_id=0), rows, 2 * numbers)
    names = [*lora.ALL_LINEAR]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names)).train()
    ids = torch.randint(5, shape["vocab_size"], (2, table.args.length), device=table.args.device)
    train(table, "transformers + peft", lambda: model(input_ids=ids, labels=ids, use_cache=False).loss,
          [p for p in model.parameters() if p.requires_grad], ids.numel(), numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7B")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row of the SFT step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="", help="write the figures there as JSON")
    table = Table(parser.parse_args())
    for side in (ours, theirs) if installed("transformers") and installed("peft") else (ours,):
        side(table, SHAPES[table.args.size])
        table.clear()


if __name__ == "__main__":
    main()
