"""Unigram tokenizers: of all ways to cut a text into known pieces the most probable one (Kudo 2018, arXiv 1804.10959).

Each piece has a log-probability; a cut's score is the sum over its pieces. The best cut ends with some piece, and what
stands before it is cut in the best way as well (Viterbi): one pass over the text, and for each place the best way to
get there.

    best[0] = 0,    best[j] = max over pieces text[i:j] of best[i] + score(text[i:j])

SentencePiece does this for .model files by itself; here it is for GGUF files (T5) and for tokenizer.json (T5, mT5).
Both bring the map with which SentencePiece normalises, a table of byte strings and their replacements (`Charsmap`).
"""
import struct
import unicodedata

import numpy as np
import regex

from common import UserError

BLOCK = "\u2581"                          # SentencePiece's sign for a space
PENALTY = 10.0                            # an unknown character is this much worse than the worst piece
GRAPHEME = regex.compile(r"\X")


class Viterbi:
    """The best cut of a word. Scores of .model files are added in single precision, as their library does."""
    def __init__(self, scores: dict[str, float], single: bool = False):
        number = np.float32 if single else float
        self.scores = {piece: number(score) for piece, score in scores.items()}
        self.zero, self.unknown = number(0), number(min(scores.values(), default=0.0)) - number(PENALTY)
        lengths: dict[str, set[int]] = {}                 # by the first character: how long pieces are
        for piece in scores:
            lengths.setdefault(piece[:1], set()).add(len(piece))
        self.lengths = {first: sorted(n) for first, n in lengths.items()}

    def cut(self, text: str) -> list[str]:
        """Pieces; what is in no piece comes as runs of unknown characters."""
        best, came_from, known = [self.zero] + [None] * len(text), [0] * (len(text) + 1), [True] * (len(text) + 1)
        for i, first in enumerate(text):
            here, single = best[i], False
            for n in self.lengths.get(first, ()):
                if i + n > len(text):
                    break
                if (score := self.scores.get(text[i:i + n])) is not None:
                    single |= n == 1
                    if best[i + n] is None or here + score > best[i + n]:
                        best[i + n], came_from[i + n], known[i + n] = here + score, i, True
            if not single and (best[i + 1] is None or here + self.unknown > best[i + 1]):
                best[i + 1], came_from[i + 1], known[i + 1] = here + self.unknown, i, False
        pieces: list[str] = []
        j, after_unknown = len(text), False
        while j > 0:
            piece = text[came_from[j]:j]
            if after_unknown and not known[j]:
                pieces[-1] = piece + pieces[-1]
            else:
                pieces.append(piece)
            after_unknown, j = not known[j], came_from[j]
        return pieces[::-1]


class Charsmap:
    """SentencePiece's `precompiled_charsmap`: a double-array trie over UTF-8 bytes (Darts), then the replacements, each
    with a zero behind it. A unit of the trie: bits 0-7 its label, bit 8 "a key ends here", from bit 9 on an offset."""
    def __init__(self, data: bytes):
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        if len(data) < 8 or size % 4 or size > len(data) - 4:
            raise UserError(f"precompiled_charsmap: its trie claims {size} bytes of {len(data)}")
        self.units = memoryview(data[4:4 + size]).cast("I")
        self.texts = data[4 + size:]

    def longest(self, data: bytes, at: int = 0, first: bool = False) -> tuple[str, int] | None:
        """(replacement, how many bytes it replaces) of the longest key at this place (or the shortest), if there is
        one."""
        node, found = self.offset(self.units[0]) if self.units else 0, None
        for n, byte in enumerate(data[at:], 1):
            node ^= byte
            if node >= len(self.units) or self.units[node] & 0x800000ff != byte:
                break
            unit = self.units[node]
            node ^= self.offset(unit)
            if unit >> 8 & 1 and node < len(self.units):
                start = self.units[node] & 0x7fffffff
                end = self.texts.find(b"\0", start)
                found = self.texts[start:end if end >= 0 else None].decode("utf-8", "replace"), n
                if first:
                    break
        return found

    @staticmethod
    def offset(unit: int) -> int:
        return unit >> 10 << ((unit & 0x200) >> 6)

    def chunks(self, text: str):
        """What the library takes at once: the longest known key, else a character."""
        data, at = text.encode("utf-8"), 0
        while at < len(data):
            n = 1 if data[at] < 0x80 else 2 if data[at] < 0xe0 else 3 if data[at] < 0xf0 else 4
            replacement, n = self.longest(data, at) or (data[at:at + n].decode("utf-8"), n)
            yield replacement
            at += n

    def by_grapheme(self, text: str) -> str:
        """As the tokenizers package reads the same map: short graphemes as a whole, else character by character, and
        of several keys the shortest."""
        out = []
        for grapheme in GRAPHEME.findall(text):
            data = grapheme.encode("utf-8")
            if len(data) < 6 and (whole := self.longest(data, first=True)) is not None:
                out.append(whole[0])
            else:
                pairs = ((c, self.longest(c.encode("utf-8"), first=True)) for c in grapheme)
                out += [c if found is None else found[0] for c, found in pairs]
        return "".join(out)


def squeeze(chunks, prefix: bool, squeezed: bool) -> str:
    """SentencePiece's last step: a space in front, and of several in a row one, none at the ends (if squeezed).
    ["a", " ", " ", "b", " "] -> block a block b"""
    out, before = [], squeezed                            # whether the last character is a space
    for chunk in chunks:
        while squeezed and before and chunk.startswith(" "):
            chunk = chunk[1:]
        if chunk:
            out.append(chunk)
            before = chunk.endswith(" ")
    text = "".join(out).rstrip(" ") if squeezed else "".join(out)
    return (BLOCK if prefix and text else "") + text.replace(" ", BLOCK)


class Unigram:
    """A SentencePiece unigram model whose pieces came in another file than its own (GGUF)."""
    def __init__(self, vocab: dict[str, int], scores: dict[str, float], unk_id: int, charsmap: bytes = b"",
                 prefix: bool = True, squeezed: bool = True):
        self.vocab, self.unk_id, self.prefix, self.squeezed = vocab, unk_id, prefix, squeezed
        self.viterbi, self.charsmap = Viterbi(scores, single=True), Charsmap(charsmap) if charsmap else None

    def encode(self, text: str, start: bool = True) -> list[int]:
        chunks = self.charsmap.chunks(text) if self.charsmap else text
        text = squeeze(chunks, self.prefix and start, self.squeezed and start)
        return [self.vocab.get(piece, self.unk_id) for piece in self.viterbi.cut(text)]

    def token_bytes(self, token: str) -> bytes:
        return token.replace(BLOCK, " ").encode("utf-8")


# ---------------------------------------------------------------- normalisation in tokenizer.json

CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
       (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def strip_accents(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) != "Mn")


def lowercase(text: str) -> str:
    return "".join(c.lower() for c in text)               # one by one: no Greek final sigma


def bert_normalize(text: str, step: dict) -> str:
    """BERT's cleaning: no control characters, blanks around Chinese ones, no accents, small letters."""
    if step.get("clean_text", True):
        text = "".join(" " if c.isspace() or c in "\t\n\r" else c for c in text
                       if c in "\t\n\r" or (c not in "\0\ufffd" and unicodedata.category(c)[0] != "C"))
    if step.get("handle_chinese_chars", True):
        text = "".join(f" {c} " if any(a <= ord(c) <= b for a, b in CJK) else c for c in text)
    lower = step.get("lowercase", True)
    if lower if step.get("strip_accents") is None else step["strip_accents"]:
        text = strip_accents(unicodedata.normalize("NFD", text))
    return lowercase(text) if lower else text
