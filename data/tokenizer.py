"""Text to ids and back: one interface over every tokenizer file that public models come with.

    tokenizer.json          byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) or SentencePiece-like BPE (LLaMA 1/2, Mistral)
    tokenizer.model         SentencePiece (a protobuf), or tiktoken ranks (Llama 3: one "base64 rank" per line)
    *.tiktoken              tiktoken ranks (Qwen)
    *.gguf                  the tokenizer inside the weights: merges, or scores
    tok*.bin                llama2.c
    encoder.json vocab.bpe  GPT-2's first release

Three algorithms hide behind these names. Byte-level BPE: a regex cuts the text into words, each word starts as bytes,
and the pair whose merge was learned first is merged until none is left (Sennrich et al. 2016, arXiv 1508.07909). Scored
BPE: no words, the whole text starts as characters, the pair with the best score is merged. SentencePiece's unigram is
left to its library.

Every token is a byte string. This is why decoding is one join, and why streaming can hold back half a character:
a Chinese character is three bytes, and a token may end in the middle of it.
"""
import base64
import codecs
import heapq
import json
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex

from common import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# GGUF names the word splitter instead of spelling it: `tokenizer.ggml.pre` -> regexes, each applied to the pieces of
# the one before.
GGUF_SPLITS = {"default": [GPT2], "gpt-2": [GPT2], "mpt": [GPT2], "olmo": [GPT2], "jina-v2-en": [GPT2], "phi-2": [GPT2],
               "llama-bpe": [LLAMA3], "llama3": [LLAMA3], "llama-v3": [LLAMA3], "qwen2": [QWEN2],
               "deepseek-r1-qwen": [QWEN2],
               "stablelm2": [QWEN2], "dbrx": [LLAMA3], "smaug-bpe": [LLAMA3],
               "smollm": [r"\p{N}", GPT2], "starcoder": [r"\p{N}", GPT2], "refact": [r"\p{N}", GPT2],
               "command-r": [r"\p{N}", GPT2]}


# ---------------------------------------------------------------- byte pair encoding

def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next free character from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def merge_pairs(parts: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Merges the pair of lowest rank (the leftmost of equals) until no pair has a rank. A heap and a linked list: a
    book without spaces costs n log n. "lower" with merges l+o first, lo+w second -> ["low", "e", "r"]"""
    after = list(range(1, len(parts) + 1))
    before = list(range(-1, len(parts) - 1))
    heap: list[tuple[float, int, str, str]] = []

    def offer(i: int) -> None:
        j = after[i]
        if j < len(parts) and (r := rank(parts[i], parts[j])) is not None:
            heapq.heappush(heap, (r, i, parts[i], parts[j]))

    parts = list(parts)
    for i in range(len(parts) - 1):
        offer(i)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = after[i]
        if parts[i] != left or j >= len(parts) or parts[j] != right:          # one of the two has been merged meanwhile
            continue
        parts[i], parts[j] = left + right, ""
        after[i] = after[j]
        if after[j] < len(parts):
            before[after[j]] = i
        offer(i)
        if before[i] >= 0:
            offer(before[i])
    return [p for p in parts if p]


class ByteBPE:
    """Byte-level BPE: regexes cut words, words become bytes (as GPT-2's stand-in characters), pairs merge by rank."""
    def __init__(self, vocab: dict[str, int], rank: Callable[[str, str], float | None], splits: list[str],
                 nfc: bool = False,
                 ignore_merges: bool = False, prefix_space: bool = False):
        self.vocab, self.rank, self.nfc = vocab, rank, nfc
        self.ignore_merges, self.prefix_space = ignore_merges, prefix_space
        self.splits = [regex.compile(s) for s in splits]
        self.cache: dict[str, list[int]] = {}

    def words(self, text: str) -> list[str]:
        pieces = [text]
        for pattern in self.splits:
            pieces = [p for piece in pieces for p in cut(pattern, piece)]
        return pieces

    def encode(self, text: str, start: bool = True) -> list[int]:
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.prefix_space and start and not text.startswith(" "):
            text = " " + text
        ids: list[int] = []
        for word in self.words(text):
            known = self.cache.get(word)
            if known is None:
                chars = "".join(BYTE_TO_CHAR[b] for b in word.encode("utf-8"))
                parts = [chars] if self.ignore_merges and chars in self.vocab else merge_pairs(list(chars), self.rank)
                # Some vocabularies lack bytes that text hardly has (control characters): their tokenizers skip them.
                known = self.cache[word] = [self.vocab[p] for p in parts if p in self.vocab]
                if len(self.cache) > 100_000:
                    self.cache.clear()
            ids += known
        return ids

    def token_bytes(self, token: str) -> bytes:
        return bytes(CHAR_TO_BYTE[c] for c in token) if all(c in CHAR_TO_BYTE for c in token) else token.encode("utf-8")


def cut(pattern, text: str) -> list[str]:
    """The matches and what lies between them, in order."""
    pieces, last = [], 0
    for m in pattern.finditer(text):
        if m.start() > last:
            pieces.append(text[last:m.start()])
        if m.end() > m.start():
            pieces.append(m.group())
        last = m.end()
    return pieces + ([text[last:]] if last < len(text) else [])


class CharBPE:
    """SentencePiece-like BPE: a space is a lower block, one is put in front, what has no token becomes bytes."""
    def __init__(self, vocab: dict[str, int], rank: Callable[[str, str], float | None], unk_id: int = 0,
                 prefix: bool = True, fallback: bool = True):
        self.vocab, self.rank, self.unk_id, self.prefix, self.fallback = vocab, rank, unk_id, prefix, fallback

    def encode(self, text: str, start: bool = True) -> list[int]:
        if not text:
            return []
        text = text.replace(" ", "\u2581")
        if self.prefix and start:
            text = "\u2581" + text
        ids: list[int] = []
        for part in merge_pairs(list(text), self.rank):
            if part in self.vocab:
                ids.append(self.vocab[part])
            else:
                names = [f"<0x{b:02X}>" for b in part.encode("utf-8")] if self.fallback else [""]
                ids += [self.vocab.get(name, self.unk_id) for name in names]
        return ids

    def token_bytes(self, token: str) -> bytes:
        if self.fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8")


class SentencePiece:
    """A .model file, by its own library: BPE and unigram, with the normalisation that the file prescribes."""
    def __init__(self, data: bytes):
        import sentencepiece
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.vocab = {self.sp.id_to_piece(i): i for i in range(self.sp.vocab_size())}
        first = self.sp.encode("a")
        self.prefix = bool(first) and self.sp.id_to_piece(first[0]).startswith("\u2581")
        self.newline = self.sp.encode("\n")

    def encode(self, text: str, start: bool = True) -> list[int]:
        if start or not self.prefix or not text:
            return self.sp.encode(text)
        # The library always puts a space in front. Behind a newline it has no effect on what follows: cut that off.
        ids = self.sp.encode("\n" + text)
        assert ids[:len(self.newline)] == self.newline, f"{self.newline} is no piece of its own in {ids[:4]}"
        return ids[len(self.newline):]

    def token_bytes(self, token: str) -> bytes:
        i = self.vocab[token]
        if self.sp.is_byte(i):
            return bytes([int(token[3:5], 16)])
        return b"" if self.sp.is_control(i) else token.replace("\u2581", " ").encode("utf-8")


# ---------------------------------------------------------------- the tokenizer

class Tokenizer:
    """encode, decode, stream and render, whatever the file was. Special tokens are strings that map to one id."""
    def __init__(self, core, specials: dict[str, int], *, bos_id: int | None, eos_ids: list[int], pad_id: int | None,
                 vocab_size: int = 0,
                 chat_template: str | None = None, files: dict[str, bytes] | None = None, add_bos: bool | None = None,
                 space_after: bool = False):
        self.core, self.specials, self.bos_id, self.eos_ids = core, specials, bos_id, list(dict.fromkeys(eos_ids))
        self.chat_template, self.files, self.space_after = chat_template, files or {}, space_after
        self.add_bos = bos_id is not None if add_bos is None else add_bos
        self.token_of = {i: t for t, i in core.vocab.items()} | {i: t for t, i in specials.items()}
        self.vocab_size = max(vocab_size, max(self.token_of) + 1)
        self.pad_id = pad_id if pad_id is not None else self.eos_ids[0] if self.eos_ids else 0
        longest_first = sorted(specials, key=len, reverse=True)
        self.special_pattern = regex.compile("|".join(regex.escape(s) for s in longest_first)) if specials else None
        self.special_ids = set(specials.values())

    def encode(self, text: str, special: bool = False, start: bool = True) -> list[int]:
        """Ids without BOS and EOS. special=True turns the names of special tokens in the text into these tokens: for
        templates, never for what a user typed. start=False: the text continues another piece (no space is put in
        front)."""
        if not special or self.special_pattern is None:
            return self.core.encode(text, start)
        ids: list[int] = []
        for piece in cut(self.special_pattern, text):
            if piece in self.specials:
                ids.append(self.specials[piece])
                start = self.space_after
            else:
                ids += self.core.encode(piece, start)
                start = False
        return ids

    def bytes_of(self, i: int) -> bytes:
        token = self.token_of.get(i)
        if token is None:
            return b""                                    # padded vocabularies have ids without a token
        return token.encode("utf-8") if i in self.special_ids else self.core.token_bytes(token)

    def decode(self, ids) -> str:
        """The text of the ids, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(stream.push(int(i)) for i in ids) + stream.flush()

    def stream(self) -> "Stream":
        return Stream(self)

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """A conversation as (ids, mask), mask 1 = the assistant's words and their end token (see data/chat.py)."""
        from data import chat  # it imports nothing from here, but reads better behind it
        return chat.render(self, messages, add_generation_prompt)

    def prompt(self, text: str):
        """(1, T) ids of one user message, ready for model.generate."""
        import torch
        return torch.tensor([self.render([{"role": "user", "content": text}], add_generation_prompt=True)[0]])


class Stream:
    """Prints ids as they come: bytes that are only the beginning of a character wait for the rest of it."""
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.first = getattr(tokenizer.core, "prefix", False)  # the space that encode put in front is taken off

    def push(self, i: int) -> str:
        data = self.tokenizer.bytes_of(i)
        if self.first and i not in self.tokenizer.special_ids:
            data, self.first = data.removeprefix(b" "), self.first and not data
        return self.decoder.decode(data)

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------- files

def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """A directory or a file -> Tokenizer, or None when there is none."""
    path = Path(path)
    if path.is_file():
        return from_file(path)
    for name in ("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "encoder.json", "vocab.json"):
        if (path / name).exists():
            return from_file(path / name)
    others = [*sorted(path.glob("*.gguf")), *sorted(path.glob("*.tiktoken")), *sorted(path.glob("tok*.bin"))]
    return from_file(others[0]) if others else None


def from_file(path: Path) -> Tokenizer | None:
    if path.suffix == ".gguf":
        return from_gguf(path)
    if path.name == "tokenizer.json":
        return from_tokenizer_json(path)
    if path.name in ("encoder.json", "vocab.json"):
        return from_gpt2_files(path)
    data = path.read_bytes()
    if path.suffix == ".tiktoken" or (path.name == "tokenizer.model" and is_ranks(data)):
        return from_ranks(path, data)
    if path.suffix == ".model":
        settings = read_settings(path.parent)
        core = SentencePiece(data)
        sp, eos = core.sp, settings.get("eos", [])
        specials = {sp.id_to_piece(i): i for i in range(sp.vocab_size())
                    if sp.is_control(i)} | settings.get("added", {})
        return Tokenizer(core, specials, bos_id=sp.bos_id() if sp.bos_id() >= 0 else None,
                         eos_ids=lookup(eos, specials) or ([sp.eos_id()] if sp.eos_id() >= 0 else []),
                         pad_id=sp.pad_id() if sp.pad_id() >= 0 else (sp.unk_id() if sp.unk_id() >= 0 else None),
                         chat_template=settings.get("template"),
                         files=collect(path), add_bos=settings.get("add_bos"), space_after=True)
    if path.suffix == ".bin" and path.name.startswith("tok"):
        return from_llama2c(data)
    raise UserError(f"{path} is no tokenizer that is known: tokenizer.json, tokenizer.model, *.tiktoken, encoder.json, "
                    "tok*.bin or *.gguf")


def read_settings(folder: Path) -> dict:
    """What stands beside a tokenizer: special tokens by name, stop tokens (id, list or name), the chat template."""
    def read(name: str) -> dict:
        file = folder / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file} is no JSON: {error}") from None

    config, special_map, generation, model = (
        read(f"{n}.json") for n in ("tokenizer_config", "special_tokens_map", "generation_config", "config"))
    names = {**special_map, **{k: v for k, v in config.items() if v is not None}}
    text = {k: v["content"] if isinstance(v, dict) else v for k, v in names.items()
            if k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    eos: list = [text["eos_token"]] if text.get("eos_token") else []
    for source in (generation, model):
        stop = source.get("eos_token_id")
        eos += stop if isinstance(stop, list) else [] if stop is None else [stop]
        if stop is not None:
            break                                         # generation_config knows better than config
    template = config.get("chat_template")
    if isinstance(template, list):                        # several named ones: {"name": "default", "template": ...}
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    added = {t["content"]: int(i) for i, t in (config.get("added_tokens_decoder") or {}).items()}
    return {"names": text, "eos": eos, "template": template, "added": added, "add_bos": config.get("add_bos_token")}


def lookup(stops: list, specials: dict[str, int], vocab: dict[str, int] | None = None) -> list[int]:
    """Stop tokens given as ids or names -> ids, in order, each once."""
    ids = [s if isinstance(s, int) else specials.get(s, (vocab or {}).get(s)) for s in stops]
    return list(dict.fromkeys(i for i in ids if i is not None))


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja",
                   "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "qwen.tiktoken")


def collect(path: Path) -> dict[str, bytes]:
    """The files that export writes out again, as they were."""
    there = [path.parent / name for name in TOKENIZER_FILES]
    return {file.name: file.read_bytes() for file in [*there, path] if file.exists()}


def is_ranks(data: bytes) -> bool:
    head = data[:200].split(b"\n")[0].split(b" ")
    return len(head) == 2 and head[1].strip().isdigit()


def from_ranks(path: Path, data: bytes) -> Tokenizer:
    """tiktoken's format. The rank of a merge is the id of its result; special tokens follow the last rank."""
    vocab = {}
    for line in data.splitlines():
        if line:
            token, rank = line.split()
            vocab["".join(BYTE_TO_CHAR[b] for b in base64.b64decode(token))] = int(rank)
    n, settings = len(vocab), read_settings(path.parent)
    if path.suffix == ".tiktoken":                        # Qwen
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]
        split, bos, eos = QWEN2, None, ["<|im_end|>", "<|endoftext|>"]
    else:                                                 # Llama 3
        reserved = "<|reserved_special_token_{}|>".format
        names = ["<|begin_of_text|>", "<|end_of_text|>", reserved(0), reserved(1), "<|finetune_right_pad_id|>",
                 reserved(2), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
        names += [reserved(i) for i in range(3, 3 + 256 - len(names))]
        split, bos, eos = LLAMA3, n, ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    specials = {name: n + i for i, name in enumerate(names)}
    core = ByteBPE(vocab, lambda a, b: vocab.get(a + b), [split], nfc=path.suffix == ".tiktoken", ignore_merges=True)
    template = settings.get("template") or ("chatml" if path.suffix == ".tiktoken" else "llama3")
    return Tokenizer(core, specials, bos_id=bos, eos_ids=lookup(settings["eos"] or eos, specials),
                     pad_id=specials.get("<|finetune_right_pad_id|>"), chat_template=template, files=collect(path))


def from_gpt2_files(path: Path) -> Tokenizer:
    """encoder.json / vocab.json with its list of merges."""
    vocab = json.loads(path.read_text(encoding="utf-8"))
    merges_file = path.with_name("vocab.bpe" if path.name == "encoder.json" else "merges.txt")
    if not merges_file.exists():
        raise UserError(f"{path} needs {merges_file.name} beside it")
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
    specials = {t: vocab[t] for t in ("<|endoftext|>",) if t in vocab}
    end = list(specials.values())
    return Tokenizer(ByteBPE(vocab, lambda a, b: ranks.get((a, b)), [GPT2]), specials, bos_id=None, eos_ids=end,
                     pad_id=None, files=collect(path))


def from_llama2c(data: bytes) -> Tokenizer:
    """llama2.c: longest length, then (score, length, bytes) per token; ids 0 unk, 1 bos, 2 eos, 3.. the 256 bytes."""
    at, vocab, scores = 4, {}, {}
    while at < len(data):
        if at + 8 > len(data):
            raise UserError(f"llama2.c tokenizer: truncated at byte {at} of {len(data)}")
        score, n = struct.unpack_from("<fi", data, at)
        if not 0 <= n <= len(data) - at - 8:
            raise UserError(f"llama2.c tokenizer: token {len(vocab)} claims {n} bytes at byte {at} of {len(data)}")
        token = data[at + 8:at + 8 + n].decode("utf-8", "replace").replace(" ", "\u2581")
        i = len(vocab)
        # it wraps these in newlines
        token = f"<0x{i - 3:02X}>" if 3 <= i < 259 else {1: "<s>", 2: "</s>"}.get(i, token)
        vocab[token if token not in vocab else f"{token}\0{i}"], scores[token] = i, score
        at += 8 + n
    return Tokenizer(CharBPE(vocab, scored(vocab, scores), unk_id=0), {"<s>": 1, "</s>": 2}, bos_id=1, eos_ids=[1, 2],
                     pad_id=0)


def scored(vocab: dict[str, int], scores: dict[str, float]) -> Callable[[str, str], float | None]:
    return lambda a, b: -scores[a + b] if a + b in vocab else None


# ---------------------------------------------------------------- tokenizer.json

def from_tokenizer_json(path: Path) -> Tokenizer:
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        model = spec["model"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no tokenizer.json: {error}") from None
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path}: a tokenizer of type {model['type']!r}; only BPE is read from tokenizer.json. If a "
                        "tokenizer.model lies beside it, point to that file")
    vocab: dict[str, int] = model["vocab"]
    ranks = {tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m): i for i, m in enumerate(model["merges"])}
    settings, added = read_settings(path.parent), spec.get("added_tokens") or []
    if model.get("byte_fallback"):                        # some files list the byte tokens as special: they are text
        added = [t for t in added if not regex.fullmatch(r"<0x[0-9A-F]{2}>", t["content"])]
    specials = {t["content"]: t["id"] for t in added}
    steps = flatten(spec.get("pre_tokenizer"), "pretokenizers")
    normalizers = flatten(spec.get("normalizer"), "normalizers")
    byte_level = next((s for s in [*steps, *flatten(spec.get("decoder"), "decoders")] if s["type"] == "ByteLevel"),
                      None)

    def rank(a: str, b: str) -> int | None:
        return ranks.get((a, b))

    if byte_level:
        core = ByteBPE(vocab, rank, json_splits(steps, path), nfc=any(n["type"] == "NFC" for n in normalizers),
                       ignore_merges=model.get("ignore_merges", False),
                       prefix_space=any(s["type"] == "ByteLevel" and s.get("add_prefix_space", True) for s in steps))
    else:
        prefix = any(n["type"] == "Prepend" for n in normalizers)
        prefix |= any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in steps)
        core = CharBPE(vocab, rank, vocab.get(model.get("unk_token") or "", 0), prefix,
                       model.get("byte_fallback", False))
    for t in added:
        core.vocab.pop(t["content"], None) if t["special"] else None
    names = settings["names"]
    known = {**specials, **vocab}
    usual = ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>"]
    eos = lookup(settings["eos"], specials, vocab) or lookup(usual, specials)[:1]
    end_of_turn = [specials[t] for t in ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")
                   if t in specials and settings["template"] and (t in settings["template"] or t == "<|end_of_text|>")]
    return Tokenizer(core, specials, bos_id=known.get(names.get("bos_token")),
                     eos_ids=eos + [i for i in end_of_turn if i not in eos],
                     pad_id=known.get(names.get("pad_token"), known.get(names.get("unk_token"))),
                     chat_template=settings["template"], files=collect(path),
                     add_bos=settings["add_bos"] if settings["add_bos"] is not None
                     else post_adds_bos(spec, names.get("bos_token")),
                     space_after=not byte_level and any(n["type"] == "Prepend" for n in normalizers))


def flatten(step: dict | None, key: str) -> list[dict]:
    if step is None:
        return []
    return [s for inner in step[key] for s in flatten(inner, key)] if step["type"] == "Sequence" else [step]


def post_adds_bos(spec: dict, bos: str | None) -> bool:
    """Whether the post-processor puts the BOS token in front."""
    return bos is not None and bos in json.dumps(spec.get("post_processor") or {}, ensure_ascii=False)


def json_splits(steps: list[dict], path: Path) -> list[str]:
    splits: list[str] = []
    for s in steps:
        if s["type"] == "Split":
            pattern = s["pattern"].get("Regex") or regex.escape(s["pattern"]["String"])
            if s["behavior"] not in ("Isolated", "Removed"):
                raise UserError(f"{path}: pre_tokenizer Split with behavior {s['behavior']} is not supported")
            splits.append(pattern)
        elif s["type"] == "Digits":
            splits.append(r"\p{N}" if s.get("individual_digits") else r"\p{N}+")
        elif s["type"] == "Punctuation":
            splits.append(r"[\p{P}$+<=>^`|~]")
        elif s["type"] == "ByteLevel":
            splits += [GPT2] if s.get("use_regex", True) else []
        else:
            raise UserError(f"{path}: pre_tokenizer {s['type']} is not supported; known: Split, Digits, Punctuation, "
                            "ByteLevel, Metaspace")
    return splits


# ---------------------------------------------------------------- GGUF

def from_gguf(path: Path) -> Tokenizer | None:
    """`tokenizer.ggml.model` gpt2: byte-level BPE with merges, llama: scored BPE. Token type 3: control, 4: added."""
    from checkpoints.gguf import read_header
    meta = read_header(path)[0]
    kind = meta.get("tokenizer.ggml.model")
    if kind is None:
        return None
    tokens, types = list(meta["tokenizer.ggml.tokens"]), [int(t) for t in meta.get("tokenizer.ggml.token_type", [])]
    vocab = {t: i for i, t in enumerate(tokens)}
    specials = {t: i for i, t in enumerate(tokens) if i < len(types) and types[i] in (3, 4) and t}
    ids = {name: int(meta[f"tokenizer.ggml.{name}_token_id"]) for name in ("bos", "eos", "eot", "padding", "unknown")
           if f"tokenizer.ggml.{name}_token_id" in meta}
    splits: list[str] = []
    if kind == "gpt2":
        pre = meta.get("tokenizer.ggml.pre", "default")
        if pre not in GGUF_SPLITS:
            raise UserError(f"{path}: the word splitter tokenizer.ggml.pre = {pre!r} is unknown; known: "
                            f"{', '.join(sorted(GGUF_SPLITS))}")
        splits, merges = GGUF_SPLITS[pre], [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
        ranks = {m: i for i, m in enumerate(merges)}
        core = ByteBPE(vocab, lambda a, b: ranks.get((a, b)), splits, nfc=pre == "qwen2",
                       ignore_merges=pre in ("llama-bpe", "llama3", "llama-v3"))
    elif kind == "llama":
        scores = dict(zip(tokens, map(float, meta["tokenizer.ggml.scores"])))
        core = CharBPE(vocab, scored(vocab, scores), ids.get("unknown", 0),
                       bool(meta.get("tokenizer.ggml.add_space_prefix", True)))
        merges = sorted(((t[:k], t[k:]) for t in tokens for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab),
                        key=lambda m: (-scores[m[0] + m[1]], vocab[m[0]], vocab[m[1]]))
    else:
        raise UserError(f"{path}: a tokenizer of kind {kind!r} is not supported; known: gpt2, llama")
    template = meta.get("tokenizer.chat_template")
    turns = [t for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if t in specials and template and t in template]
    stops = [ids[n] for n in ("eos", "eot") if n in ids] + [specials[t] for t in turns]
    tokenizer = Tokenizer(core, specials, bos_id=ids.get("bos"), eos_ids=stops,
                          pad_id=ids.get("padding", ids.get("unknown")), vocab_size=len(tokens), chat_template=template,
                          add_bos=bool(meta.get("tokenizer.ggml.add_bos_token", kind == "llama")),
                          space_after=kind == "llama")
    tokenizer.files = json_files(tokenizer, core, merges, splits, ids, tokens)
    return tokenizer


def json_files(tokenizer: Tokenizer, core, merges: list, splits: list[str], ids: dict[str, int],
               tokens: list[str]) -> dict[str, bytes]:
    """The tokenizer of a GGUF file as the files that other tools read."""
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for t, i in tokenizer.specials.items()]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": getattr(core, "ignore_merges", False), "vocab": core.vocab,
             "merges": [list(m) for m in merges]}
    if isinstance(core, ByteBPE):
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pre = {"type": "Sequence",
               "pretokenizers": [{"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False}
                                 for s in splits] + [level]}
        normalizer, decoder = {"type": "NFC"} if core.nfc else None, level
    else:
        model |= {"unk_token": tokens[core.unk_id], "fuse_unk": True, "byte_fallback": True}
        pre, normalizer = None, {"type": "Sequence",
                                 "normalizers": ([{"type": "Prepend", "prepend": "\u2581"}] if core.prefix else [])
                                 + [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
        decoder = {"type": "Sequence",
                   "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                {"type": "ByteFallback"}, {"type": "Fuse"}]
                   + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if core.prefix else [])}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre, "post_processor": None, "decoder": decoder, "model": model}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "add_bos_token": tokenizer.add_bos,
              **{f"{short}_token": tokens[ids[name]] for short, name in (("bos", "bos"), ("eos", "eos"),
                                                                         ("pad", "padding"), ("unk", "unknown"))
                 if name in ids}}
    files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(),
             "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode()}
    return files | ({"chat_template.jinja": tokenizer.chat_template.encode()} if tokenizer.chat_template else {})
