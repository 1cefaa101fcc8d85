"""LoRA adapters and weight deltas, applied while a base is being read.

Both are written in the names of the base's own file, so they are applied there, tensor by tensor, before anything is
split or renamed. The sum is taken in fp32 and rounded once.

    LoRA     W + (alpha / r) B A                  alpha / sqrt(r) with rslora (Kalajdzievski 2023, arXiv 2312.03732)
    delta    W_base + W_delta                     how Vicuna, Alpaca and others were published: LLaMA could not be
"""
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import formats
from common import UserError


class Lora:
    """A PEFT directory: adapter_config.json and adapter_model.safetensors or .bin."""
    def __init__(self, folder: Path, source: formats.Source):
        self.folder, self.config = folder, formats.read_json(folder / "adapter_config.json")
        kind = self.config.get("peft_type")
        if kind != "LORA" or self.config.get("use_dora"):
            kind = "DoRA" if self.config.get("use_dora") else kind
            raise UserError(f"{folder}: an adapter of type {kind}; only LORA can be merged")
        patterns = self.config.get("alpha_pattern") or {}
        alphas = [self.config.get("lora_alpha")]
        alphas += patterns.values() if isinstance(patterns, dict) else [str(patterns)]
        if odd := [a for a in alphas if not isinstance(a, (int, float))]:
            raise UserError(f"{folder / 'adapter_config.json'}: lora_alpha or alpha_pattern has {odd[0]!r}, "
                            "expected a number")
        files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
        file = next((f for f in files if f.exists()), None)
        if file is None:
            raise UserError(f"{folder} has adapter_config.json but no adapter_model.safetensors or .bin")
        self.file, self.halves, self.whole = file, {}, {}
        for key, entry in formats.merge_files([file]).items():
            self.sort_in(key, entry)
        if not self.halves and not self.whole:
            raise UserError(f"{file} holds no tensors: it was saved without its weights")
        for name, pair in self.halves.items():
            self.check(name, pair, source)
        for name, entry in self.whole.items():
            if name in source.entries and entry.shape[1:] != source.shape(name)[1:]:
                raise UserError(f"{file}: {name} is {entry.shape}, the base has {source.shape(name)}")

    def sort_in(self, key: str, entry: formats.Entry) -> None:
        """base_model.model.<path>.lora_A[.name].weight -> halves; what was trained whole -> whole."""
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        m = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.\w+)??(?:\.weight)?", name)
        if m and "embedding" in m[2]:
            raise UserError(f"{self.file}: {key} adapts an embedding; only linear layers and modules_to_save can be "
                            "merged")
        if m:
            self.halves.setdefault(m[1] + ".weight", {})[m[2]] = entry
        elif name.split(".")[0] != "score":                    # a reward head is no part of the language model
            self.whole[re.sub(r"\.(modules_to_save|original_module)(\.\w+)??(?=\.(weight|bias)$)", "", name)] = entry

    def check(self, name: str, pair: dict, source: formats.Source) -> None:
        if name not in source.entries:
            if name == "lm_head.weight" and source.config.get("tie_word_embeddings"):
                raise UserError(f"{self.file}: it adapts lm_head, which in this model is the embedding: untie it first")
            raise UserError(f"{self.file}: {name} has no place in the base ({source.path}): is it the adapter of "
                            "another model?")
        if len(pair) != 2:
            raise UserError(f"{self.file}: {name} has only {next(iter(pair))}, its other half is missing")
        (r, n_in), (n_out, r2) = pair["lora_A"].shape, pair["lora_B"].shape
        there = self.shape(name, source.shape(name))
        if r != r2 or (n_out, n_in) != (there[::-1] if self.config.get("fan_in_fan_out") else there):
            raise UserError(f"{self.file}: {name}: A is {pair['lora_A'].shape} and B {pair['lora_B'].shape}, the base "
                            f"has {there}")

    def alpha(self, path: str) -> float:
        """lora_alpha of one layer: patterns are regular expressions for the end of its name. The rank is A's own."""
        patterns = self.config.get("alpha_pattern") or {}
        special = (a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
        return next(special, self.config["lora_alpha"])

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.whole:                                 # PEFT also copies a head that it adapts: both apply
            tensor = self.whole[name].read()
        if name not in self.halves:
            return tensor
        A, B = (self.halves[name][half].read().float() for half in ("lora_A", "lora_B"))
        alpha, r = self.alpha(name.removesuffix(".weight")), A.shape[0]
        delta = (alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r) * (B @ A)
        return (tensor.float() + (delta.T if self.config.get("fan_in_fan_out") else delta)).to(torch.float32)

    def shape(self, name: str, shape: tuple) -> tuple:
        return self.whole[name].shape if name in self.whole else shape


class Delta:
    """A checkpoint whose weights are differences to the base. Where it has more rows, the base's new rows count as
    zero or as the mean of the old ones; only the authors of the delta know which (Vicuna v0: zero, Alpaca: mean)."""
    def __init__(self, folder: Path, source: formats.Source, new_rows: str | None):
        self.source, self.new_rows, self.folder = formats.open_source(folder), new_rows, folder
        if new_rows not in (None, "zero", "mean"):
            raise UserError(f"new_rows is {new_rows!r}, expected zero or mean")
        junk = re.compile(r".*rotary_emb\.inv_freq")
        ours, theirs = ({n for n in s.entries if not junk.fullmatch(n)} for s in (source, self.source))
        if odd := sorted(ours ^ theirs):
            where = "the base" if odd[0] in ours else "the delta"
            raise UserError(f"{folder}: tensor {odd[0]} is only in {where} ({len(odd)} such tensors)")
        for name in sorted(theirs):
            base, delta = source.shape(name), self.source.shape(name)
            if base[1:] != delta[1:] or base[0] > delta[0]:
                raise UserError(f"{folder}: {name} is {delta}, the base has {base}")
            if base[0] < delta[0] and new_rows is None:
                raise UserError(f"{folder}: {name} has {delta[0]} rows, the base {base[0]}: say what the base's new "
                                "rows count as, --new-rows zero (Vicuna v0, stable-vicuna) or --new-rows mean (Alpaca)")

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.source.entries or name.endswith("inv_freq"):
            return tensor
        delta, base = self.source.read(name).float(), tensor.float()
        if (new := delta.shape[0] - base.shape[0]) > 0:
            row = base.mean(0, keepdim=True) if self.new_rows == "mean" else torch.zeros_like(base[:1])
            base = torch.cat((base, row.expand(new, *base.shape[1:])))
        return base + delta

    def shape(self, name: str, shape: tuple) -> tuple:
        return self.source.shape(name) if name in self.source.entries else shape


def apply(source: formats.Source, lora: list[Path], delta: Path | None, new_rows: str | None) -> None:
    """Puts adapters and a delta on a source, in the order given; the vocabulary grows with them."""
    if delta is not None:
        source.patches.append(Delta(delta, source, new_rows))
    for folder in lora:
        patch = Lora(folder, source)
        source.patches.append(patch)
        for name, entry in patch.whole.items():                # a head of its own, or biases that the base lacks
            source.entries.setdefault(name, entry)
    for name in ("model.embed_tokens.weight", "embed_tokens.weight"):
        if name in source.entries and source.patches:
            source.config["vocab_size"] = source.shape(name)[0]
