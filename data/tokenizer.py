"""Text to ids and back: one interface over every tokenizer file that public models come with.

    t = load_tokenizer("a folder or a file")        (which files: data/tokenizer_files.py)
    t.decode(t.encode("Hi")) == "Hi"

Three algorithms hide behind these files. Byte-level BPE: a regex cuts the text into words, each word starts as bytes,
and the pair whose merge was learned first is merged until none is left (Sennrich et al. 2016, arXiv 1508.07909). Scored
BPE: no words, the whole text starts as characters, the pair with the best score is merged. SentencePiece's unigram is
left to its library.

Every token is a byte string. This is why decoding is one join, and why streaming can hold back half a character:
a Chinese character is three bytes, and a token may end in the middle of it.
"""
import codecs
import functools
import heapq
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex
import torch

from data.splits import BYTES, GPT2, LLAMA3, QWEN2, Splitting, cut  # noqa: F401 (names that others import from here)

BLOCK = "\u2581"                          # SentencePiece's sign for a space
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
SURROGATE = re.compile("[\ud800-\udfff]")


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
    def __init__(self, vocab: dict[str, int], rank: Callable[[str, str], float | None], splits: list,
                 nfc: bool = False, ignore_merges: bool = False, prefix_space: bool = False,
                 normalize: Callable[[str], str] | None = None):
        self.vocab, self.rank, self.nfc = vocab, rank, nfc
        self.normalize = normalize or (functools.partial(unicodedata.normalize, "NFC") if nfc else None)
        self.ignore_merges, self.prefix_space = ignore_merges, prefix_space
        self.splits = [Splitting(s) if s != BYTES else None for s in splits]
        self.cache: dict[str, list[int]] = {}

    def words(self, text: str) -> list[str]:
        """The words as stand-in characters. Regexes in front of BYTES see the text, those behind it its bytes."""
        pieces, is_text = [text], True
        for split in [*self.splits, None]:
            if split is not None:
                pieces = [p for piece in pieces for p in split(piece)]
            elif is_text:
                pieces, is_text = [p.encode("utf-8").decode("latin-1").translate(BYTE_TO_CHAR) for p in pieces], False
        return pieces

    def encode(self, text: str, start: bool = True) -> list[int]:
        if self.normalize is not None:
            text = self.normalize(text)
        if self.prefix_space and start and text and not text.startswith(" "):
            text = " " + text
        ids: list[int] = []
        for word in self.words(text):
            known = self.cache.get(word)
            if known is None:
                whole = self.ignore_merges and word in self.vocab
                parts = [word] if whole else merge_pairs(list(word), self.rank)
                # Some vocabularies lack bytes that no UTF-8 text has; the library passes over them as well.
                known = self.cache[word] = [self.vocab[p] for p in parts if p in self.vocab]
                if len(self.cache) > 100_000:
                    self.cache.clear()
            ids += known
        return ids

    def token_bytes(self, token: str) -> bytes:
        return bytes(CHAR_TO_BYTE[c] for c in token) if all(c in CHAR_TO_BYTE for c in token) else token.encode("utf-8")


class CharBPE:
    """SentencePiece-like BPE: a space is a lower block, one is put in front, what has no token becomes bytes.
    double: also where there is a block already; by_word: no merge across the beginning of a word (both: Metaspace)."""
    def __init__(self, vocab: dict[str, int], rank: Callable[[str, str], float | None], unk_id: int | None = 0,
                 prefix: bool = True, fallback: bool = True, fuse_unk: bool = True, double: bool = True,
                 by_word: bool = False):
        self.vocab, self.rank, self.unk_id, self.prefix, self.fallback = vocab, rank, unk_id, prefix, fallback
        self.fuse_unk, self.double, self.by_word = fuse_unk, double, by_word
        self.late: dict[str, int] = {}                    # names that are looked for when the blocks are in place
        self.find_late: regex.Pattern | None = None

    def encode(self, text: str, start: bool = True) -> list[int]:
        text = text.replace(" ", BLOCK)
        if text and self.prefix and start and (self.double or not text.startswith(BLOCK)):
            text = BLOCK + text
        if self.late:
            pieces = cut(self.find_late, text)
            return [i for p in pieces for i in ([self.late[p]] if p in self.late else self.encode_blocks(p))]
        return self.encode_blocks(text)

    def encode_blocks(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in re.findall(f"{BLOCK}?[^{BLOCK}]+|{BLOCK}", text) if self.by_word else [text]:
            unknown = False                               # whether the part before was one: a run of them is one token
            for part in merge_pairs(list(word), self.rank):
                new = self.part_ids(part)
                if new or self.unk_id is None or (unknown and self.fuse_unk):
                    ids += new
                else:
                    ids.append(self.unk_id)
                unknown = not new
        return ids

    def part_ids(self, part: str) -> list[int]:
        """The token, else its bytes, else nothing."""
        if part in self.vocab:
            return [self.vocab[part]]
        names = [f"<0x{b:02X}>" for b in part.encode("utf-8")] if self.fallback else [""]
        return [self.vocab[name] for name in names] if all(name in self.vocab for name in names) else []

    def token_bytes(self, token: str) -> bytes:
        if self.fallback and BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(BLOCK, " ").encode("utf-8")


class SentencePiece:
    """A .model file, by its own library: BPE and unigram, with the normalisation that the file prescribes."""
    def __init__(self, data: bytes):
        import sentencepiece
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        # The library puts a space in front of everything. For text that continues other text a second processor does
        # not: protobuf fields that are appended override, here normalizer_spec (3) with add_dummy_prefix (3) and
        # remove_extra_whitespaces (4) off.
        self.continued = sentencepiece.SentencePieceProcessor(model_proto=data + b"\x1a\x04\x18\x00\x20\x00")
        self.vocab = {self.sp.id_to_piece(i): i for i in range(self.sp.vocab_size())}
        first = self.sp.encode("a")
        self.prefix = bool(first) and self.sp.id_to_piece(first[0]).startswith(BLOCK)
        self.find_hidden: regex.Pattern | None = None

    def hide(self, names) -> None:
        """The library finds the user's own symbols wherever they stand (Gemma's <start_of_turn>): those that steer the
        model shall be text there. They are cut behind their first character, and no longer found."""
        hidden = {name: i for name, i in names.items() if len(name) > 1 and i in self.continued.encode(name)}
        self.find_hidden = name_pattern(hidden, {})

    def encode(self, text: str, start: bool = True) -> list[int]:
        ids, at = [], 0
        for match in self.find_hidden.finditer(text) if self.find_hidden else ():
            ids += (self.sp if start else self.continued).encode(text[at:match.start() + 1])
            at, start = match.start() + 1, False
        return ids + (self.sp if start else self.continued).encode(text[at:])

    def token_bytes(self, token: str) -> bytes:
        i = self.vocab[token]
        if self.sp.is_byte(i):
            return bytes([int(token[3:5], 16)])
        return b"" if self.sp.is_control(i) else token.replace(BLOCK, " ").encode("utf-8")


# ---------------------------------------------------------------- the tokenizer

class Tokenizer:
    """encode, decode, stream and render, whatever the file was. Two kinds of tokens have names instead of being merged:
    `specials` steer the model (<|im_end|>) and come from templates only; `words` (<think>, runs of blanks) count
    wherever they stand. `shapes` are the regexes of names that take blanks around them along, `second` the names that
    are looked for in what the others leave."""
    def __init__(self, core, specials: dict[str, int], *, bos_id: int | None, eos_ids: list[int],
                 pad_id: int | None = None, vocab_size: int = 0, chat_template: str | None = None,
                 files: dict[str, bytes] | Callable[["Tokenizer"], dict[str, bytes]] | None = None,
                 add_bos: bool | None = None, space_after: bool = False, words: dict[str, int] | None = None,
                 shapes: dict[str, str] | None = None, second: set[str] = frozenset()):
        self.core, self.specials, self.words = core, specials, words or {}
        self.bos_id, self.eos_ids = bos_id, list(dict.fromkeys(eos_ids))
        self.pad_id = pad_id if pad_id is not None else self.eos_ids[0] if self.eos_ids else 0
        self.add_bos = bos_id is not None and add_bos is not False
        self.chat_template, self.space_after = chat_template, space_after
        self.origin = ""                                  # what the model's settings call it
        self.named = self.words | specials
        self.token_of = {i: t for t, i in core.vocab.items()} | {i: t for t, i in self.named.items()}
        self.vocab_size = max(vocab_size, max(self.token_of) + 1)
        self.special_ids, self.named_ids = set(specials.values()), set(self.named.values())
        self.find_words, self.find_named = (
            [name_pattern({n: i for n, i in names.items() if (n in second) == last}, shapes or {})
             for last in (False, True)] for names in (self.words, self.named))
        self.make_files = files if callable(files) else lambda tokenizer: files or {}

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that other tools read. Made when asked for: some take seconds."""
        return self.make_files(self)

    def split(self, text: str, special: bool) -> list[int | str]:
        """Cut at the names of tokens: "<s>Hi" -> [1, "Hi"], or ["<s>Hi"] if special is False."""
        names, patterns = (self.named, self.find_named) if special else (self.words, self.find_words)
        parts: list[int | str] = [text]
        for pattern in patterns:
            if pattern is not None:
                parts = [names.get(p, names.get(p.strip(), p)) if isinstance(p, str) else p for part in parts
                         for p in (cut(pattern, part) if isinstance(part, str) else [part])]
        return parts

    def encode(self, text: str, special: bool = False, start: bool = True) -> list[int]:
        """Ids without BOS and EOS. special=True: names of special tokens in the text become these tokens; for
        templates, never for what a user typed. start=False: the text continues other text, no space goes in front."""
        if SURROGATE.search(text):                        # half a pair, from broken JSON, has no UTF-8: U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        for part in self.split(text, special):
            ids += [part] if isinstance(part, int) else self.core.encode(part, start)
            start = self.space_after and isinstance(part, int)
        return ids

    def bytes_of(self, i: int) -> bytes:
        token = self.token_of.get(i)
        if token is None:
            return b""                                    # padded vocabularies have ids without a token
        if i in self.named_ids:                           # Gemma lists runs of blocks as words: they are spaces
            return (token if isinstance(self.core, ByteBPE) else token.replace(BLOCK, " ")).encode("utf-8")
        return self.core.token_bytes(token)

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

    def prompt(self, text: str) -> torch.Tensor:
        """(1, T) ids of one user message, ready for model.generate."""
        return torch.tensor([self.render([{"role": "user", "content": text}], add_generation_prompt=True)[0]])


def name_pattern(names: dict[str, int], shapes: dict[str, str]) -> regex.Pattern | None:
    """The leftmost, then the longest name."""
    longest_first = sorted(names, key=len, reverse=True)
    return regex.compile("|".join(shapes.get(n, regex.escape(n)) for n in longest_first)) if names else None


class Stream:
    """Prints ids as they come: bytes that are only the beginning of a character wait for the rest of it."""
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.first = getattr(tokenizer.core, "prefix", False)  # the space that encode put in front is taken off
        self.held = b""                                   # a space that stands behind words, but not behind the last
        self.suffix = bool(getattr(tokenizer.core, "suffix", ""))

    def push(self, i: int) -> str:
        data = self.tokenizer.bytes_of(i)
        if self.first and i not in self.tokenizer.named_ids:
            data, self.first = data.removeprefix(b" "), self.first and not data
        if self.suffix:
            data = self.held + data
            self.held = b" " if data.endswith(b" ") else b""
            data = data.removesuffix(self.held)
        return self.decoder.decode(data)

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------- files

def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """A directory or a file -> Tokenizer, or None when there is none."""
    from data import tokenizer_files  # not at the top: it builds what stands above
    path = Path(path)
    if path.is_file():
        return tokenizer_files.from_file(path)
    for name in ("tokenizer.json", "tekken.json", "ice_text.model", "tokenizer.model", "spiece.model", "qwen.tiktoken",
                 "encoder.json", "vocab.json"):
        if (path / name).exists():
            return tokenizer_files.from_file(path / name)
    kinds = ("*.gguf", "*.tiktoken", "*.model", "*.model.v*", "tok*.bin", "rwkv_vocab*.txt", "vocab.txt")
    others = [file for kind in kinds for file in sorted(path.glob(kind))]
    if (path / "params.json").exists():                   # Meta's LLaMA: one tokenizer.model above 7B/, 13B/, ...
        others += path.resolve().parent.glob("tokenizer.model")
    return tokenizer_files.from_file(others[0]) if others else None
