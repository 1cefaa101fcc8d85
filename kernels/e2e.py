"""End to end on a GPU: our steps beside the same steps written with transformers and peft, one part at a time.

    python -m kernels.e2e --part ppo --out FILE                 one of: lora, full, qlora, generate, ppo; default: all
    python -m kernels.e2e --size tiny --device cpu              does the program run? (no figure is worth anything)

    lora      SFT of 7B, rank 16 on all linears, 2 rows of 2,048 tokens, with our kernels, without them, packed; peft
    full      SFT of 1.1B, every weight in fp32 under bf16 autocast, 8 x 2,048; transformers, and with Liger's kernels
    qlora     SFT of 7B in four bits, 4 x 512; transformers + peft over bitsandbytes
    generate  7B, 1 and 64 rows, 256 + 256 tokens: the plain loop, --graph; transformers, dynamic and static cache
    ppo       7B, one base and four roles, 64 answers of 256 + 256 tokens, 4 epochs; the same on transformers + peft

Speed does not depend on the weights, so random ones of the true shape do. Fused AdamW, bf16, no gradient checkpointing;
peers that are not installed are left out. MFU counts 4 N FLOPs a token with LoRA (forward, and backward through a
frozen base) and 6 N in full. Each part is meant to fit into ten minutes of an H200; what would begin after --budget
seconds is noted as skipped.
"""
import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoints
import lora
import sft
from kernels import nf4
from kernels.e2e_ppo import ppo_step
from model import ModelConfig, Transformer

SHAPES = {"7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32,
                 "num_heads": 32, "num_kv_heads": 32},
          "1.1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 22,
                   "num_heads": 32, "num_kv_heads": 4},
          "tiny": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4,
                   "num_kv_heads": 2}}
PEERS = ("torch", "triton", "transformers", "peft", "liger_kernel", "bitsandbytes")


class Table:
    """Rows of figures, printed and written as they come: what stops the program loses nothing."""
    def __init__(self, args: argparse.Namespace):
        self.args, self.gpu, self.started = args, args.device == "cuda", time.perf_counter()
        self.tiny = args.size == "tiny"
        self.result = {"device": torch.cuda.get_device_name() if self.gpu else "cpu", "size": args.size,
                       "date": datetime.date.today().isoformat(),
                       "command": f"python -m kernels.e2e --part {args.part}",
                       "versions": {n: importlib.metadata.version(n) for n in PEERS if installed(n)}, "rows": []}

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

    def run(self, name: str, work: Callable) -> None:
        """One side of one part, if there is time for it. A side that fails is a row, the others go on."""
        if time.perf_counter() - self.started > self.args.budget:
            self.put(what=name, skipped=f"after {self.args.budget:.0f} s")
            return
        self.clear()
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.put(what=name, failed=f"{type(error).__name__}: {error}".splitlines()[0])
        self.clear()


def installed(name: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


@contextlib.contextmanager
def kernels(kind: str) -> Iterator[None]:
    before, os.environ["CHATPIXIU_KERNELS"] = os.environ.get("CHATPIXIU_KERNELS", "auto"), kind
    try:
        yield
    finally:
        os.environ["CHATPIXIU_KERNELS"] = before


# ---------------------------------------------------------------- models with random weights

def our_model(table: Table, shape: dict, dtype: torch.dtype = torch.bfloat16, quant: str = "") -> tuple[Transformer,
                                                                                                        int]:
    """A model and its parameters; its matrices are made on the device, and quantised, one after the other."""
    with checkpoints.hollow():
        model = Transformer(ModelConfig(**shape, max_positions=4096))
    small = checkpoints.four_bits(model, quant, Path("the model"))
    numbers = sum(p.numel() for p in model.parameters())
    for name, p in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        value = torch.ones(p.shape, device=table.args.device, dtype=dtype)
        value = value.normal_(std=0.02) if p.dim() == 2 else value
        if name in small:
            model.set_submodule(parent, nf4.QuantisedLinear(nf4.quantise(value)))
        else:
            setattr(model.get_submodule(parent), last, nn.Parameter(value))
    return model, numbers


def their_model(table: Table, shape: dict, dtype: torch.dtype = torch.bfloat16):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], num_hidden_layers=shape["num_layers"],
        intermediate_size=shape["intermediate_size"], num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"], max_position_embeddings=4096, attn_implementation="sdpa")
    torch.set_default_dtype(dtype)
    with torch.device(table.args.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model, sum(p.numel() for p in model.parameters())


def with_peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=[*lora.ALL_LINEAR])).train()


def batch(table: Table, shape: dict, rows: int, length: int) -> Tensor:
    return torch.randint(5, shape["vocab_size"], (rows, min(length, table.args.length)), device=table.args.device)


def train(table: Table, what: str, who: str, loss: Callable[[], Tensor], params: list, tokens: int,
          flops: float) -> None:
    """Two steps to warm up, four counted. flops: of a token."""
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=table.gpu)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(2):
        step()
    start = table.wait()
    for _ in range(4):
        step()
    seconds = (table.wait() - start) / 4
    table.put(what=what, who=who, tokens=tokens, s=seconds, tokens_per_s=tokens / seconds,
              tflops=1e-12 * flops * tokens / seconds, peak_gib=table.peak())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ---------------------------------------------------------------- supervised fine-tuning

def adapters(table: Table, shape: dict) -> None:
    what = "LoRA SFT step"

    def ours() -> None:
        model, numbers = our_model(table, shape)
        lora.apply(model, 16, 32.0, name="sft")
        ids = batch(table, shape, 2, 2048)
        documents = (torch.arange(ids.shape[1], device=ids.device) // 300 + 1).expand(*ids.shape)
        for name, docs in (("", None), (", packed", documents)):
            for kind in ("auto", "torch"):
                def loss(docs=docs) -> Tensor:
                    with lora.use(model, "sft"):
                        return sft.batch_loss(model, ids, docs, torch.ones_like(ids))
                with kernels(kind):
                    table.clear()
                    train(table, what, f"ours, kernels {kind}{name}", loss, trainable(model), ids.numel(), 4 * numbers)

    def theirs() -> None:
        model, numbers = their_model(table, shape)
        model, ids = with_peft(model), batch(table, shape, 2, 2048)
        train(table, what, "transformers + peft", lambda: model(input_ids=ids, labels=ids, use_cache=False).loss,
              trainable(model), ids.numel(), 4 * numbers)
    table.run(what, ours)
    if installed("peft"):
        table.run(what, theirs)


def full(table: Table, shape: dict) -> None:
    what = "full SFT step"
    cast = lambda: torch.autocast(table.args.device, torch.bfloat16)  # noqa: E731

    def ours() -> None:
        model, numbers = our_model(table, shape, torch.float32)
        ids = batch(table, shape, 8, 2048)

        def loss() -> Tensor:
            with cast():
                return sft.batch_loss(model, ids, None, torch.ones_like(ids))
        train(table, what, "ours", loss, trainable(model), ids.numel(), 6 * numbers)

    def theirs(liger: bool) -> None:
        model, numbers = their_model(table, shape, torch.float32)
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama
            apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True)
        model, ids = model.train(), batch(table, shape, 8, 2048)

        def loss() -> Tensor:
            with cast():
                return model(input_ids=ids, labels=ids, use_cache=False).loss
        train(table, what, "transformers + Liger" if liger else "transformers", loss, trainable(model), ids.numel(),
              6 * numbers)
    table.run(what, ours)
    for liger in [False] * installed("transformers") + [True] * (installed("liger_kernel") and table.gpu):
        table.run(what, lambda liger=liger: theirs(liger))


def qlora(table: Table, shape: dict) -> None:
    what = "QLoRA SFT step"

    def ours() -> None:
        model, numbers = our_model(table, shape, quant="nf4")
        lora.apply(model, 16, 32.0, name="sft")
        ids = batch(table, shape, 4, 512)

        def loss() -> Tensor:
            with lora.use(model, "sft"):
                return sft.batch_loss(model, ids, None, torch.ones_like(ids))
        for model.checkpointing in (False, True):
            table.clear()
            train(table, what, "ours" + ", checkpointing" * model.checkpointing, loss, trainable(model), ids.numel(),
                  4 * numbers)

    def theirs() -> None:
        import bitsandbytes
        model, numbers = their_model(table, shape)
        for path, m in list(model.named_modules()):
            if isinstance(m, nn.Linear) and path != "lm_head":
                small = bitsandbytes.nn.Linear4bit(m.in_features, m.out_features, bias=False, quant_type="nf4",
                                                   compute_dtype=torch.bfloat16, compress_statistics=True)
                small.weight = bitsandbytes.nn.Params4bit(m.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                                                          compress_statistics=True)
                model.set_submodule(path, small.to(table.args.device))                 # moving it there quantises it
        model.is_loaded_in_4bit = True                       # what peft asks for
        model, ids = with_peft(model), batch(table, shape, 4, 512)
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            table.clear()
            train(table, what, "transformers + peft + bitsandbytes" + ", checkpointing" * checkpointing,
                  lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, trainable(model), ids.numel(),
                  4 * numbers)
    table.run(what, ours)
    if installed("bitsandbytes") and installed("peft") and table.gpu:
        table.run(what, theirs)


# ---------------------------------------------------------------- generation

def generation(table: Table, shape: dict) -> None:
    prompt, new = (16, 24) if table.tiny else (256, 256)

    def timed(who: str, rows: int, size: int, call: Callable[[Tensor], Tensor]) -> None:
        """The second call counts. Every token reads all weights once: gb_per_s is that alone."""
        ids, seconds = torch.randint(5, shape["vocab_size"], (rows, prompt), device=table.args.device), []
        table.clear()
        for _ in range(2):
            start = table.wait()
            assert call(ids).shape[1] >= new
            seconds.append(table.wait() - start)
        table.put(what=f"generation, {rows} rows, {prompt} + {new}", who=who, s=seconds[1], first_call_s=seconds[0],
                  ms_per_token=1e3 * seconds[1] / new, tokens_per_s=rows * new / seconds[1],
                  gb_per_s=1e-9 * size * new / seconds[1], peak_gib=table.peak())

    def ours() -> None:
        model, numbers = our_model(table, shape)
        for rows in (1, 64):
            for graph in (False, True):
                timed("ours, graph" if graph else "ours", rows, 2 * numbers, lambda ids, graph=graph: model.generate(
                    ids, new, temperature=0.8, top_p=0.9, graph=graph))

    def theirs(cache: str) -> None:
        model, numbers = their_model(table, shape)
        how = {"cache_implementation": "static"} if cache == "static" else {}
        with torch.no_grad():
            for rows in (1, 64):
                timed(f"transformers, {cache} cache", rows, 2 * numbers, lambda ids: model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True,
                    temperature=0.8, top_p=0.9, top_k=0, pad_token_id=0, **how))
    table.run("generation", ours)
    for cache in ("dynamic", "static") if installed("transformers") else ():
        table.run(f"generation, {cache} cache", lambda cache=cache: theirs(cache))


PARTS = {"lora": adapters, "generate": generation, "full": full, "qlora": qlora, "ppo": ppo_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--size", choices=SHAPES, default="7B", help="`full` takes 1.1B where this says 7B")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row of an SFT step at most")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing more is begun")
    parser.add_argument("--out", default="", help="write the figures there as JSON")
    table = Table(parser.parse_args())
    for name, part in PARTS.items():
        if table.args.part in ("all", name):
            size = "1.1B" if name == "full" and table.args.size == "7B" else table.args.size
            part(table, SHAPES[size])


if __name__ == "__main__":
    main()
