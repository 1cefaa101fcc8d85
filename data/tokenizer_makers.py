"""Tokenizer files that only one maker has.

    tekken.json                    Mistral: ranks of byte pairs, special tokens in front
    rwkv_vocab_v20230424.txt       RWKV's World vocabulary: the longest token that fits, byte by byte, nothing merges
    vocab.txt with jieba's words   CPM-Ant: words, of each the longest pieces
    *.model with jieba's words     CPM-Generate, PanGu-alpha: words with blanks between them, then SentencePiece

jieba cuts Chinese into words. It is no dependency; who loads one of these models installs it.
"""
import ast
import base64
import json
import unicodedata
from pathlib import Path

from common import UserError
from data.tokenizer import BLOCK, BYTE_TO_CHAR, ByteBPE, SentencePiece, Tokenizer
from data.tokenizer_files import build, collect, json_files, ranked_merges, read_settings

TEKKEN_SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                   "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                   "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]


def from_tekken(path: Path) -> Tokenizer:
    """Id = rank + number of special tokens. The file lists more ranks than the model has."""
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        config = spec["config"]
        front, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        ranks = {"".join(BYTE_TO_CHAR[b] for b in base64.b64decode(t["token_bytes"])): int(t["rank"])
                 for t in spec["vocab"][:max(0, size - front)]}
        names = [t["token_str"] for t in sorted(spec.get("special_tokens") or [], key=lambda t: t["rank"])]
        pattern = str(config["pattern"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no tekken.json: {type(error).__name__} {error}") from None
    names = (names or TEKKEN_SPECIALS)[:front]
    if not 3 <= len(names) <= front <= 100_000:
        raise UserError(f"{path}: {front} special tokens, of which {len(names)} have names")
    names += [f"<SPECIAL_{i}>" for i in range(len(names), front)]
    core = ByteBPE({t: rank + front for t, rank in ranks.items()}, lambda a, b: ranks.get(a + b), [pattern],
                   ignore_merges=True)
    at = {name: i for i, name in enumerate(names)}
    settings = read_settings(path.parent)
    settings["template"] = settings["template"] or ("mistral3" if "[INST]" in at else None)
    return build(core, [{"content": t, "id": i, "special": True} for t, i in at.items()], settings, bos=at.get("<s>"),
                 eos=[at["</s>"]] if "</s>" in at else [], pad=at.get("<pad>", at.get("<unk>")),
                 vocab_size=size, files=lambda t: json_files(t, ranked_merges(ranks)) | collect(path))


# ---------------------------------------------------------------- RWKV

class LongestMatch:
    """The longest token that the rest of the text begins with, again and again. Tokens are bytes; their names here are
    the same bytes as Latin-1 characters."""
    def __init__(self, vocab: dict[str, int]):
        self.vocab = vocab
        lengths: dict[str, set[int]] = {}                 # by the first two bytes
        for token in vocab:
            lengths.setdefault(token[:2], set()).add(len(token))
        self.lengths = {start: sorted(n, reverse=True) for start, n in lengths.items()}

    def encode(self, text: str, start: bool = True) -> list[int]:
        data, at, ids = text.encode("utf-8").decode("latin-1"), 0, []
        while at < len(data):
            ends = (*self.lengths.get(data[at:at + 2], ()), 1)
            token = next((t for n in ends if (t := data[at:at + n]) in self.vocab), None)
            if token is not None:                         # a vocabulary without some byte passes over it
                ids.append(self.vocab[token])
            at += len(token or " ")
        return ids

    def token_bytes(self, token: str) -> bytes:
        return token.encode("latin-1")


def from_rwkv(path: Path) -> Tokenizer:
    """Lines "id literal length"; id 0, which has no line, ends a text."""
    vocab: dict[str, int] = {}
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            i, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            token = ast.literal_eval(literal)
            data = token.encode("utf-8") if isinstance(token, str) else bytes(token)
            if len(data) != int(length) or not data or int(i) <= 0:
                raise ValueError(f"{len(data)} bytes, the line says {length}")
            vocab[data.decode("latin-1")] = int(i)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UserError(f"{path}:{n}: no line of RWKV's World vocabulary: {line[:60]!r} ({error})") from None
    if not vocab:
        raise UserError(f"{path} is empty")
    return build(LongestMatch(vocab), [{"content": "<|endoftext|>", "id": 0, "special": True}],
                 read_settings(path.parent), eos=[0], pad=0, add_bos=False,
                 vocab_size=65536 if len(vocab) == 65529 else 0, files=collect(path))


# ---------------------------------------------------------------- Chinese words: CPM, PanGu

BLANKS = str.maketrans(" \n", "\u2582\u2583")


def chinese_words(path: Path):
    try:
        import jieba
    except ImportError:
        raise UserError(f"{path}: this tokenizer cuts Chinese into words with jieba: pip install jieba") from None
    return lambda text: jieba.cut(text, cut_all=False)


class WordPieces:
    """CPM-Ant: words by jieba, of each the longest piece that is known, again and again; what is in none is unknown."""
    def __init__(self, vocab: dict[str, int], unk_id: int, cut):
        self.vocab, self.unk_id, self.cut = vocab, unk_id, cut
        self.longest = max(map(len, vocab), default=1)

    def encode(self, text: str, start: bool = True) -> list[int]:
        return [i for word in self.cut(text) for i in self.pieces(word)] if text else []

    def pieces(self, word: str) -> list[int]:
        if len(word) > 200:
            return [self.unk_id]
        ids, at = [], 0
        while at < len(word):
            ends = range(min(len(word), at + self.longest), at, -1)
            end = next((e for e in ends if word[at:e] in self.vocab), None)
            ids.append(self.unk_id if end is None else self.vocab[word[at:end]])
            at = at + 1 if end is None else end
        return ids

    def token_bytes(self, token: str) -> bytes:
        return token.encode("utf-8")


def from_cpm_ant(path: Path) -> Tokenizer:
    """vocab.txt: a token a line, its number the id. </_> is a blank and </n> a newline."""
    lines = path.read_text(encoding="utf-8").split("\n")
    vocab = {line: i for i, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    if not {"<unk>", "</_>", "</n>", "<s>", "</s>", "<pad>"} <= vocab.keys():
        raise UserError(f"{path} is no vocabulary of CPM-Ant (<unk>, </_>, </n>, <s>, </s>, <pad>); BERT's WordPiece "
                        "is not supported")
    vocab[" "], vocab["\n"] = vocab.pop("</_>"), vocab.pop("</n>")
    core = WordPieces(vocab, vocab["<unk>"], chinese_words(path))
    added = [{"content": t, "id": vocab[t], "special": True} for t in ("<d>", "</d>", "<s>", "</s>", "<unk>", "<pad>")
             if t in vocab]
    return build(core, added, read_settings(path.parent), bos=vocab["<s>"], eos=[vocab["</s>"]], pad=vocab["<pad>"],
                 files=collect(path))


class ChineseWords(SentencePiece):
    """CPM-Generate (XLNet's cleaning) and PanGu-alpha: words with blanks between them; real blanks are U+2582."""
    def __init__(self, data: bytes, cut, cleaned: bool):
        super().__init__(data)
        self.cut, self.cleaned, self.prefix = cut, cleaned, False

    def encode(self, text: str, start: bool = True) -> list[int]:
        text = " ".join(word.translate(BLANKS) for word in self.cut(text))
        if not self.cleaned:
            return self.sp.encode(text)
        text = " ".join(text.split()).replace("``", '"').replace("''", '"')
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        pieces: list[str] = []
        for piece in self.sp.encode(text, out_type=str):
            pieces += self.without_comma(piece) if piece[-1] == "," and piece[-2:-1].isdigit() else [piece]
        return [self.sp.piece_to_id(piece) for piece in pieces]

    def without_comma(self, piece: str) -> list[str]:
        """XLNet takes the comma off a number: "9," -> "9" ","."""
        parts = self.sp.encode(piece[:-1].replace(BLOCK, ""), out_type=str)
        if not piece.startswith(BLOCK) and parts[0].startswith(BLOCK):
            parts = parts[1:] if parts[0] == BLOCK else [parts[0][1:], *parts[1:]]
        return [*parts, ","]

    def token_bytes(self, token: str) -> bytes:
        if self.sp.is_control(self.vocab[token]):
            return b""
        return token.replace(BLOCK, "").replace("\u2582", " ").replace("\u2583", "\n").encode("utf-8")


def from_chinese_words(path: Path, data: bytes) -> Tokenizer:
    settings = read_settings(path.parent)
    core = ChineseWords(data, chinese_words(path), cleaned="<eot>" not in SentencePiece(data).vocab)
    added = [{"content": core.sp.id_to_piece(i), "id": i, "special": True} for i in range(core.sp.vocab_size())
             if core.sp.is_control(i)] + settings["added"]
    end = next((core.vocab[t] for t in ("<eot>", "<eod>", "</s>") if t in core.vocab), None)
    return build(core, added, settings, eos=[] if end is None else [end], pad=core.vocab.get("<pad>"), add_bos=False,
                 files=collect(path))
