"""The tokenizer inside a GGUF file -> data/tokenizer.py's Tokenizer. Four kinds (`tokenizer.ggml.model`):

    gpt2      byte-level BPE: merges, and the name of a word splitter (data/splits.py)
    llama     scored BPE: pieces with scores
    t5        unigram: pieces with log-probabilities, and SentencePiece's map of characters
    gemma4    BPE with merges over characters instead of bytes

Types of tokens: 1 ordinary, 2 unknown, 3 control (names that templates use), 4 the user's own (they count wherever they
stand), 5 unused, 6 a byte.
"""
import re
from pathlib import Path

from common import UserError
from data.splits import GGUF_SPLITS, gguf_splitter
from data.tokenizer import BYTE_TO_CHAR, ByteBPE, CharBPE, Tokenizer
from data.tokenizer_files import NO_SETTINGS, build, json_files, scored
from data.unigram import Unigram


def from_gguf(path: Path) -> Tokenizer | None:
    from checkpoints.gguf import read_header  # not at the top: checkpoints imports us
    header = read_header(path)[0]
    meta = {k.removeprefix("tokenizer.ggml."): v for k, v in header.items()}
    if (kind := meta.get("model")) in (None, "no_vocab", "none"):
        return None
    if kind not in READERS:
        raise UserError(f"{path}: a tokenizer of kind {kind!r} is not supported; known: {', '.join(READERS)}")
    if kind == "gpt2" and "merges" not in meta and "tokens" in meta and not set(BYTE_TO_CHAR.values()) <= set(
            map(str, meta["tokens"])):
        return None                                            # placeholders: no text can be written with them
    if missing := [k for k in ("tokens", "scores" if kind in ("llama", "t5") else "merges") if k not in meta]:
        raise UserError(f"{path}: its tokenizer is incomplete: it lacks tokenizer.ggml.{missing[0]}")
    tokens, types = [str(t) for t in meta["tokens"]], [int(t) for t in meta.get("token_type", [])]
    bos, eos, eot, pad, unk = (None if (i := meta.get(f"{name}_token_id")) is None else int(i)
                               for name in ("bos", "eos", "eot", "padding", "unknown"))
    core, merges, add_bos = READERS[kind](path, meta, tokens, types, unk)
    # [PAD7] and the like fill the table up and are nobody's name.
    added = [{"content": t, "id": i, "special": types[i] == 3} for i, t in enumerate(tokens[:len(types)])
             if types[i] in (3, 4) and t and not re.fullmatch(r"\[PAD\d+\]", t)]
    n = len(tokens)
    bos, eos, eot, pad, unk = (i if i is not None and 0 <= i < n else None for i in (bos, eos, eot, pad, unk))
    template = meta.get("tokenizer.chat_template")
    settings = {**NO_SETTINGS, "template": template if isinstance(template, str) else None,
                "name": str(meta.get("general.name", path.stem))}
    return build(core, added, settings, bos=bos, eos=[i for i in (eos, eot) if i is not None],
                 pad=unk if pad is None else pad, vocab_size=n,
                 add_bos=bool(meta.get("add_bos_token", add_bos)), space_after=kind in ("llama", "t5"),
                 files=lambda t: json_files(t, merges()) if merges else {})


def read_gpt2(path: Path, meta: dict, tokens: list[str], types: list[int], unk: int | None):
    """Each reader: -> the core, its merges (made when called) or None, whether BOS goes in front."""
    pre = str(meta.get("pre", "default"))
    splitter = gguf_splitter(pre, str(meta.get("general.architecture")), tokens)
    if splitter is None:
        raise UserError(f"{path}: the word splitter tokenizer.ggml.pre = {pre!r} is unknown; known: default, "
                        f"{', '.join(sorted(GGUF_SPLITS))}")
    merges, rank = read_merges(meta)
    core = ByteBPE({t: i for i, t in enumerate(tokens)}, rank, splitter.splits, nfc=splitter.nfc,
                   ignore_merges=splitter.ignore_merges)
    return core, lambda: merges, splitter.add_bos


def read_merges(meta: dict):
    merges = [tuple(m.split(" ", 1)) for m in meta["merges"]]
    ranks = {m: i for i, m in enumerate(merges)}
    return merges, lambda a, b: ranks.get((a, b))


def read_llama(path: Path, meta: dict, tokens: list[str], types: list[int], unk: int | None):
    scores = [float(s) for s in meta["scores"]]
    if len(scores) != len(tokens):
        raise UserError(f"{path}: {len(tokens)} tokens and {len(scores)} scores")
    core, merges, _ = scored(tokens, scores, types, unk or 0, bool(meta.get("add_space_prefix", True)))
    return core, merges, True


def read_t5(path: Path, meta: dict, tokens: list[str], types: list[int], unk: int | None):
    vocab = {t: i for i, t in enumerate(tokens)}
    scores = {t: float(meta["scores"][i]) for t, i in vocab.items() if types[i:i + 1] in ([], [1])}
    charsmap = bytes(int(b) & 255 for b in meta.get("precompiled_charsmap", []))
    core = Unigram(vocab, scores, 2 if unk is None else unk, charsmap, bool(meta.get("add_space_prefix", True)),
                   bool(meta.get("remove_extra_whitespaces", True)))
    return core, None, False


def read_gemma4(path: Path, meta: dict, tokens: list[str], types: list[int], unk: int | None):
    merges, rank = read_merges(meta)
    core = CharBPE({t: i for i, t in enumerate(tokens)}, rank, unk or 0, prefix=bool(meta.get("add_space_prefix")))
    return core, lambda: merges, True


READERS = {"gpt2": read_gpt2, "llama": read_llama, "t5": read_t5, "gemma4": read_gemma4}
