"""LoRA adapters and weight deltas, applied while a base is being read.

Both are written in the names of the base's own file, so they are applied there, tensor by tensor, before anything is
split or renamed. The sum is taken in fp32 and rounded once.

    LoRA     W + s B A                            s = alpha / r, or alpha / sqrt(r) with rslora (Kalajdzievski 2023,
                                                  arXiv 2312.03732); of an embedding W + s (B A)^T
    DoRA     m (W + s B A) / |W + s B A|          row by row (Liu et al. 2024, arXiv 2402.09353, eq. 5)
    delta    W_base + W_delta                     how Vicuna, Alpaca and others were published: LLaMA could not be

Names may differ by what stands in front: the file of GPT-2 says `h.0.attn.c_attn.weight`, an adapter of it
`base_model.model.transformer.h.0.attn.c_attn.lora_A.weight`. A name counts as the base's if it is, or if one of the two
ends with the other and no second one does.
"""
import math
import re
import time
from pathlib import Path

import regex
import torch
from torch import Tensor

from checkpoints import formats
from common import UserError

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "word_embedding", "tokens_embed")
HEADS = ("lm_head.weight", "embed_out.weight", "output_layer.weight", "output.weight")
CONV1D = ("gpt2", "openai-gpt", "imagegpt")                   # families that store matrices as (in, out)
# Tensors of old files that hold no weights: tables and masks that every program computes for itself.
NO_WEIGHTS = re.compile(r".*(rotary_(pos_)?emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)")
HALVES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# Initialisations that also change the base: the adapter alone is then not what was trained.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNSUPPORTED = {"alora_invocation_tokens": "is switched on by tokens", "layer_replication": "repeats layers",
               "trainable_token_indices": "trains single rows of the embedding", "target_parameters": "adapts experts",
               "megatron_config": "was cut over GPUs"}


class Lora:
    """A PEFT directory: adapter_config.json and adapter_model.safetensors or .bin."""
    def __init__(self, folder: Path, source: formats.Source):
        self.folder, self.config = folder, formats.read_json(folder / "adapter_config.json")
        self.model_type = source.config.get("model_type")
        self.check_config()
        files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
        file = next((f for f in files if f.exists()), None)
        if file is None:
            raise UserError(f"{folder} has adapter_config.json but no adapter_model.safetensors or .bin")
        self.file, self.halves, self.whole = file, {}, {}     # by the base's names
        for key, entry in formats.merge_files([file]).items():
            self.sort_in(key, entry, source)
        if not self.halves and not self.whole:
            raise UserError(f"{file} holds no tensors: it was saved without its weights")
        for name, pair in self.halves.items():
            self.check(name, pair, source)
        deadline = time.monotonic() + 3
        self.scales = {name: self.scale(name, pair, deadline) for name, pair in self.halves.items()}
        for name, entry in self.whole.items():
            base = source.shape(name if name in source.entries else embedding_of(source))
            words = is_embedding(name) or name in HEADS        # nothing else has rows that can be new
            if entry.shape != base and not (words and entry.shape[1:] == base[1:]):
                raise UserError(f"{file}: {name} is {entry.shape}, the base has {base}")

    def check_config(self) -> None:
        where, c = self.folder / "adapter_config.json", self.config
        if (kind := c.get("peft_type")) != "LORA":
            raise UserError(f"{self.folder}: an adapter of type {kind}; only LORA can be merged. What is trained in "
                            "another way can be merged only by peft itself, if at all")
        for key, what in UNSUPPORTED.items():
            if c.get(key):
                raise UserError(f"{where}: {key} is set: an adapter that {what} cannot be merged")
        start = str(c.get("init_lora_weights")).lower()
        if any(start.startswith(kind) for kind in CHANGED_BASE):
            raise UserError(f"{where}: init_lora_weights is {start!r}, which changed the base as well. Save the "
                            "adapter with peft's path_initial_model_for_weight_conversion: it makes a plain LoRA of it")
        patterns = c.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{where}: alpha_pattern is {str(patterns)[:60]}, expected an object")
        for alpha in (c.get("lora_alpha"), *patterns.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
                raise UserError(f"{where}: lora_alpha or alpha_pattern has {str(alpha)[:60]!r}, expected a number")
        try:
            self.alphas = [(regex.compile(rf"(.*\.)?({p})$"), a) for p, a in patterns.items()]
        except (regex.error, RecursionError, OverflowError) as error:
            raise UserError(f"{where}: alpha_pattern holds no regular expression: {error}") from None

    def sort_in(self, key: str, entry: formats.Entry, source: formats.Source) -> None:
        """base_model.model.<path>.lora_A[.name][.weight] -> halves; what was trained whole -> whole."""
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        m = re.fullmatch(rf"(.+)\.({'|'.join(HALVES)})((?:\.\w+)??(?:\.weight|\.bias)?)", name)
        if m:
            if m[3].endswith(".bias"):
                raise UserError(f"{self.file}: {key} is a bias inside the adapter (lora_bias), which is not supported")
            self.halves.setdefault(self.place(m[1] + ".weight", key, source), {})[m[2]] = entry
            return
        if ".original_module." in name or name.split(".")[0] == "score" or ".token_adapter." in name:
            return                                             # the base's own; a reward head; a copy of the embedding
        name = re.sub(r"\.modules_to_save(\.\w+)??(?=\.(weight|bias)$)", "", name)
        self.whole[self.place(name, key, source)] = entry

    def place(self, name: str, key: str, source: formats.Source) -> str:
        """The name of this tensor in the base's file."""
        if name in source.entries:
            return name
        near = [n for n in source.entries if n.endswith("." + name) or name.endswith("." + n)]
        if len(near) == 1:
            return near[0]
        if near:
            raise UserError(f"{self.file}: {key} may mean {near[0]} or {near[1]} of the base ({source.path})")
        if head := next((h for h in HEADS if name == h or name.endswith("." + h)), None):
            if embedding_of(source):                           # the base's head is its embedding: from now on it is not
                return head
        raise UserError(f"{self.file}: {name} has no place in the base ({source.path}): is it the adapter of another "
                        "model?")

    def check(self, name: str, pair: dict, source: formats.Source) -> None:
        halves = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in pair else ("lora_A", "lora_B")
        if missing := [half for half in halves if half not in pair]:
            raise UserError(f"{self.file}: {name} has only {next(iter(pair))}, its other half {missing[0]} is missing")
        base = source.shape(name) if name in source.entries else source.shape(embedding_of(source))
        there = self.shape(name, base)
        a, b = (pair[half].shape for half in halves)
        fits = len(a) == len(b) == len(there) == 2 and a[0] == b[1] > 0
        if not fits or there != ((a[1], b[0]) if self.turned(name, pair, there) else (b[0], a[1])):
            raise UserError(f"{self.file}: {name}: A is {a} and B {b}, the base has {there}")
        norms = math.prod(pair["lora_magnitude_vector"].shape) if "lora_magnitude_vector" in pair else b[0]
        if (dora := "lora_magnitude_vector" in pair) is not bool(self.config.get("use_dora")):
            raise UserError(f"{self.file}: {name} has {'a' if dora else 'no'} magnitude vector, but use_dora in "
                            f"adapter_config.json is {self.config.get('use_dora')}")
        if norms != b[0]:
            raise UserError(f"{self.file}: {name}: the magnitude has {norms} numbers, B {b[0]} rows")

    def turned(self, name: str, pair: dict, shape: tuple) -> bool:
        """Whether the base stores (in, out), as Conv1D and embeddings do. fan_in_fan_out alone cannot say it: peft sets
        it by whichever layer it wrapped last. A matrix that is not square tells itself."""
        if "lora_embedding_A" in pair:
            return True
        n_in, n_out = pair["lora_A"].shape[-1], pair["lora_B"].shape[0]
        conv1d = self.model_type in CONV1D and bool(re.search(r"\.c_\w+\.weight$", name))
        if n_in == n_out:
            return conv1d
        return tuple(shape) == (n_in, n_out) and (conv1d or bool(self.config.get("fan_in_fan_out")))

    def scale(self, name: str, pair: dict, deadline: float) -> float:
        """alpha / r of one layer. Patterns are regular expressions for the end of its name; the rank is A's own."""
        path, r = name.removesuffix(".weight"), pair["lora_A" if "lora_A" in pair else "lora_embedding_A"].shape[0]
        try:                                                   # of a stranger: some patterns would take years
            alpha = next((a for pattern, a in self.alphas
                          if pattern.match(path, timeout=max(deadline - time.monotonic(), 0.01))),
                         self.config["lora_alpha"])
        except TimeoutError:
            raise UserError(f"{self.folder / 'adapter_config.json'}: a pattern of alpha_pattern does not come to an "
                            f"end on {path}") from None
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.whole:                                 # PEFT also copies a head that it adapts: both apply
            tensor = self.whole[name].read()
        if name not in self.halves:
            return tensor
        pair = self.halves[name]
        turn = self.turned(name, pair, tensor.shape)
        half = {kind.removeprefix("lora_").removeprefix("embedding_"): e.read().float() for kind, e in pair.items()}
        A, B, m = half["A"], half["B"], half.get("magnitude_vector")
        W = tensor.to(torch.float32, copy=True)                # summed in place: no third matrix of this size
        W.addmm_(A.T, B.T, alpha=self.scales[name]) if turn else W.addmm_(B, A, alpha=self.scales[name])
        if m is not None:
            W *= m.view(1, -1) / W.norm(dim=0, keepdim=True) if turn else m.view(-1, 1) / W.norm(dim=1, keepdim=True)
        return W

    def shape(self, name: str, shape: tuple) -> tuple:
        return self.whole[name].shape if name in self.whole else shape


class Delta:
    """A checkpoint whose weights are differences to the base. Where it has more rows, the base's new rows count as
    zero or as the mean of the old ones; only the authors of the delta know which (Vicuna v0: zero, Alpaca: mean)."""
    def __init__(self, folder: Path, source: formats.Source, new_rows: str | None):
        whole = (folder / "config.json").exists() or not folder.is_dir()         # some deltas come without a config
        self.source = formats.open_source(folder) if whole else formats.Source(folder, {}, formats.hf_entries(folder))
        self.new_rows, self.folder = new_rows, folder
        if new_rows not in (None, "zero", "mean"):
            raise UserError(f"new_rows is {new_rows!r}, expected zero or mean")
        ours, theirs = ({n for n in s.entries if not NO_WEIGHTS.fullmatch(n)} for s in (source, self.source))
        if odd := sorted(ours ^ theirs):
            where = "the base" if odd[0] in ours else "the delta"
            raise UserError(f"{folder}: tensor {odd[0]} is only in {where} ({len(odd)} such tensors): the delta is one "
                            "of another base")
        for name in sorted(theirs):
            self.check(name, source.shape(name), self.source.shape(name))

    def check(self, name: str, base: tuple, delta: tuple) -> None:
        if base == delta:
            return
        words = is_embedding(name) or name in HEADS            # nothing else has rows that can be new
        if not words or base[1:] != delta[1:] or base[0] > delta[0]:
            raise UserError(f"{self.folder}: {name} is {delta}, the base has {base}")
        if self.new_rows is None:
            raise UserError(f"{self.folder}: {name} has {delta[0]} rows, the base {base[0]}: say what the base's new "
                            "rows count as, --new-rows zero (Vicuna v0, stable-vicuna) or --new-rows mean (Alpaca)")

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.source.entries or NO_WEIGHTS.fullmatch(name):
            return tensor
        delta, base = self.source.read(name).float(), tensor.float()
        if (new := delta.shape[0] - base.shape[0]) > 0:
            row = base.mean(0, keepdim=True) if self.new_rows == "mean" else torch.zeros_like(base[:1])
            base = torch.cat((base, row.expand(new, *base.shape[1:])))
        return base + delta

    def shape(self, name: str, shape: tuple) -> tuple:
        known = name in self.source.entries and not NO_WEIGHTS.fullmatch(name)
        return self.source.shape(name) if known else shape


# ---------------------------------------------------------------- embedding and head

def is_embedding(name: str) -> bool:
    return name.removesuffix(".weight").split(".")[-1] in EMBEDDINGS and name.endswith(".weight")


def embedding_of(source: formats.Source) -> str | None:
    return next((name for name in source.entries if is_embedding(name)), None)


def untie(source: formats.Source, patch: Lora) -> None:
    """Where one tensor is embedding and head and an adapter changes one of the two, they are two from then on."""
    embedding, touched = embedding_of(source), {*patch.halves, *patch.whole}
    if embedding is None or any(h in source.entries for h in HEADS) or patch.config.get("ensure_weight_tying"):
        return
    head = next((h for h in HEADS if h in touched), None)
    if head is None:
        # More rows and no head: saved by a program that knew them to be one. And a file may have no head at all.
        grown = patch.shape(embedding, source.shape(embedding)) != source.shape(embedding)
        if embedding not in touched or grown or source.config.get("tie_word_embeddings") is False:
            return
        head = "embed_out.weight" if source.config.get("model_type") == "gpt_neox" else "lm_head.weight"
    before = formats.Source(source.path, source.config, dict(source.entries), list(source.patches))
    entry = source.entries[embedding]
    source.entries[head] = formats.Entry(source.shape(embedding), lambda: before.read(embedding), entry.file,
                                         entry.kind)
    for config in parts(source.config):
        config["tie_word_embeddings"] = False


def apply(source: formats.Source, lora: list[Path], delta: Path | None, new_rows: str | None) -> None:
    """Puts adapters and a delta on a source, in the order given; the vocabulary grows with them."""
    embedding = embedding_of(source)
    before = source.shape(embedding) if embedding else None
    if delta is not None:
        source.patches.append(Delta(delta, source, new_rows))
    for folder in lora:
        patch = Lora(folder, source)
        untie(source, patch)
        source.patches.append(patch)
    if embedding and source.shape(embedding)[0] != before[0]:          # else as it was: some files have spare rows
        for config in parts(source.config):
            if "vocab_size" in config:
                config["vocab_size"] = source.shape(embedding)[0]


def parts(config: dict) -> list[dict]:
    """The config, and the language model's own inside of it where the family nests one (Gemma 3)."""
    return [config] + ([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])
