"""tokenizer.json -> data/tokenizer.py's Tokenizer. The file is a program in three steps, and each has to be followed:

    normalizer       cleans the text: NFC, lower case, a block for each space, SentencePiece's map of characters
    pre_tokenizer    cuts it into words: regexes, digits, punctuation, blanks
    model            cuts each word into tokens: BPE by merges, or unigram by probabilities

Three shapes cover public models: words as bytes (ByteBPE: GPT-2, Llama 3, Qwen, BLOOM, Falcon ...), blocks for spaces
(CharBPE: LLaMA, Mistral, Gemma), and words as they are (Words: GPT-1, T5). Ids must be exact: the first step that is
not known is an error that names it.
"""
import functools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex

from common import UserError
from data.splits import BYTES, GPT2, PUNCTUATION, Splitting
from data.tokenizer import BLOCK, BYTE_TOKEN, ByteBPE, CharBPE, Tokenizer, merge_pairs, name_pattern
from data.tokenizer_files import PREPEND, REPLACE, build, collect, from_file, read_settings
from data.unigram import Charsmap, Viterbi, bert_normalize, lowercase, strip_accents

Rank = Callable[[str, str], float | None]


def from_tokenizer_json(path: Path) -> Tokenizer:
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        kind = spec["model"].get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no tokenizer.json: {type(error).__name__} {error}") from None
    if kind != "BPE":                                     # the library that made the file knows best
        for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
            if (other := path.with_name(name)).exists():
                return from_file(other)
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"{path}: a tokenizer of type {kind!r}; BPE and Unigram are read from tokenizer.json. If a "
                        "SentencePiece .model file belongs to it, put it beside it as tokenizer.model")
    return read(spec, path)


def read(spec: dict, path: Path) -> Tokenizer:
    model, settings, added = spec["model"], read_settings(path.parent), spec.get("added_tokens") or []
    for t in added:
        if not isinstance(t["content"], str) or not isinstance(t["id"], int):
            raise UserError(f"{path}: the added token {t} has no text or no id")
    if model.get("byte_fallback"):                        # some files list the byte tokens as special: they are text
        added = [t for t in added if not BYTE_TOKEN.fullmatch(t["content"])]
    core, space_after = json_core(spec, path)
    post = flatten(spec.get("post_processor"), "processors")
    front = next((s["single"][0].get("SpecialToken", {}).get("id") for s in post if s["type"] == "TemplateProcessing"
                  and s["single"]), None)
    bos = settings["names"].setdefault("bos", front)
    if settings["add_bos"] is None:                       # then the post-processor tells whether BOS goes in front
        settings["add_bos"] = front is not None and front == bos
    if isinstance(core, CharBPE) and core.double and core.prefix:
        # A word that is normalised like the text around it is only found behind a space: "a <x>", not "a<x>".
        late = [t for t in added if t.get("normalized") and not t.get("special")]
        core.late = {BLOCK + t["content"].replace(" ", BLOCK): t["id"] for t in late}
        core.find_late = name_pattern(core.late, {})
        added, core.vocab = [t for t in added if t not in late], core.vocab | core.late
    known = core.vocab | {t["content"]: t["id"] for t in added}
    usual = [known[t] for t in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>") if t in known]
    return build(core, added, settings, eos=usual[:1], pad=known.get(settings["names"].get("unk")),
                 add_bos=settings["add_bos"], files=collect(path), space_after=space_after)


def flatten(step: dict | None, key: str) -> list[dict]:
    """A normalizer or pre_tokenizer as a list of steps."""
    if step is None:
        return []
    return [s for inner in step[key] for s in flatten(inner, key)] if step["type"] == "Sequence" else [step]


def json_core(spec: dict, path: Path) -> tuple["ByteBPE | CharBPE | Words", bool]:
    """What does the work, and whether a named token is followed by a new start."""
    model = spec["model"]
    steps, normal = flatten(spec.get("pre_tokenizer"), "pretokenizers"), flatten(spec.get("normalizer"), "normalizers")
    if model.get("type", "BPE") == "Unigram":
        return unigram_core(model, normal, steps, path)
    vocab = read_vocab(model["vocab"].items(), path)
    ranks = {tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m): i for i, m in enumerate(model["merges"])}

    def rank(a: str, b: str) -> int | None:
        return ranks.get((a, b))

    by_bytes = any(s["type"] == "ByteLevel" for s in [*steps, *flatten(spec.get("decoder"), "decoders")])
    if model.get("continuing_subword_prefix") or (model.get("end_of_word_suffix") and by_bytes):
        raise UserError(f"{path}: continuing_subword_prefix is not supported, end_of_word_suffix not with bytes")
    if model.get("end_of_word_suffix"):
        bpe = WordBPE(vocab, rank, model["end_of_word_suffix"], vocab.get(model.get("unk_token")))
        return Words(vocab, [normalizer(s, path) for s in normal], [pre_tokenizer(s, path) for s in steps], bpe,
                     suffix=bpe.suffix), False
    if not by_bytes:
        return block_core(model, vocab, rank, normal, steps, path)
    if bad := next((s["type"] for s in normal if s["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "Replace", "Strip")),
                   None):
        raise UserError(f"{path}: normalizer {bad} is not supported for tokens made of bytes")
    level = next((s for s in steps if s["type"] == "ByteLevel"), {})
    space, clean = level.get("add_prefix_space", False), [normalizer(s, path) for s in normal]
    return ByteBPE(vocab, rank, json_splits(steps, path), [s["type"] for s in normal] == ["NFC"],
                   model.get("ignore_merges", False), space, in_turn(clean) if clean else None), space


def read_vocab(pairs, path: Path) -> dict[str, int]:
    vocab = {}
    for token, i in pairs:
        if not isinstance(token, str) or not isinstance(i, int) or i < 0:
            raise UserError(f"{path}: the token {token!r} with id {i!r} in its vocabulary")
        vocab[token] = i
    return vocab


def block_core(model: dict, vocab: dict[str, int], rank: Rank, normal: list[dict], steps: list[dict], path: Path):
    """LLaMA's kind: a block for each space, by the normalizer or by a pre_tokenizer called Metaspace."""
    meta = next((s for s in steps if s["type"] == "Metaspace"), None)
    for s in steps:                                       # Gemma splits at spaces when there are none any more
        if s is not meta and not (s["type"] == "Split" and s["pattern"] == {"String": " "} and REPLACE in normal):
            raise UserError(f"{path}: pre_tokenizer {s['type']} is not supported without ByteLevel; known: Metaspace")
    names = ", ".join(s["type"] for s in normal)
    if meta is None and REPLACE not in normal:
        raise UserError(f"{path}: no ByteLevel, no Metaspace and no Replace of spaces (normalizer: {names}): an "
                        "unknown kind of tokenizer")
    if bad := next((s for s in normal if s not in (REPLACE, PREPEND)), None):
        raise UserError(f"{path}: normalizer {bad['type']} is not supported among {names}")
    scheme = "always" if PREPEND in normal else "never"
    if meta is not None:
        scheme = metaspace(meta, path)
    return CharBPE(vocab, rank, vocab.get(model.get("unk_token")), scheme != "never", model.get("byte_fallback", False),
                   model.get("fuse_unk", False), double=meta is None,
                   by_word=meta is not None and meta.get("split", True)), scheme == "always"


def metaspace(step: dict, path: Path) -> str:
    """When a block goes in front: always, first, never."""
    if step.get("replacement", BLOCK) != BLOCK:
        raise UserError(f"{path}: Metaspace with {step['replacement']!r} for a space is not supported")
    return step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")


def json_splits(steps: list[dict], path: Path) -> list:
    """The pre_tokenizer of byte-level BPE as regexes (pattern, or pattern, behavior and invert)."""
    splits: list = []
    for s in steps:
        if s["type"] == "ByteLevel":
            splits += [GPT2, BYTES] if s.get("use_regex", True) else [BYTES]
        elif s["type"] in ("Split", "Digits", "Punctuation"):
            splits.append(split_at(s, path))
        else:
            raise UserError(f"{path}: pre_tokenizer {s['type']} is not supported for tokens made of bytes; known: "
                            "Split, Digits, Punctuation, ByteLevel")
    for split in splits:
        if not isinstance(split, str) and split[1] == "Removed":
            raise UserError(f"{path}: pre_tokenizer Split with behavior Removed would lose text")
    return splits


BEHAVIORS = ("Isolated", "Contiguous", "Removed", "MergedWithPrevious", "MergedWithNext")


def split_at(s: dict, path: Path) -> str | tuple[str, str, bool]:
    """One step Split, Digits or Punctuation as (pattern, behavior, invert), the pattern alone where it isolates."""
    if s["type"] == "Digits":
        return r"\p{N}" if s.get("individual_digits") else r"\p{N}+"
    pattern, invert = PUNCTUATION, False
    if s["type"] == "Split":
        pattern, invert = s["pattern"].get("Regex") or regex.escape(s["pattern"]["String"]), bool(s.get("invert"))
    if (behavior := s.get("behavior", "Isolated")) not in BEHAVIORS:
        raise UserError(f"{path}: pre_tokenizer {s['type']} with behavior {behavior} is not supported")
    if behavior == "Isolated" or (behavior, invert) == ("Removed", True):
        # "Keep only the matches" is the same as long as the regex matches everything, which those of public files do.
        return pattern
    return pattern, behavior, invert


# ---------------------------------------------------------------- words as they are

class Words:
    """Clean, cut into words, cut each word: for tokenizers whose words are neither bytes nor joined by blocks."""
    def __init__(self, vocab: dict[str, int], normal: list[Callable], steps: list[Callable], model: Callable,
                 suffix: str = "", prefix: bool = False):
        self.vocab, self.normalize, self.steps, self.model = vocab, in_turn(normal), steps, model
        self.suffix, self.prefix = suffix, prefix         # suffix: of a word's last token, printed as a space
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str, start: bool = True) -> list[int]:
        ids: list[int] = []
        text = self.normalize(text)
        pieces, start = [text] if text else [], start or text[:1].isspace()
        for step in self.steps:
            pieces = step(pieces, start)
        for piece in pieces:
            if piece not in self.cache:
                if len(self.cache) > 100_000:
                    self.cache.clear()
                self.cache[piece] = self.model(piece)
            ids += self.cache[piece]
        return ids

    def token_bytes(self, token: str) -> bytes:
        if self.suffix and token.endswith(self.suffix):
            token = token.removesuffix(self.suffix) + " "
        return token.replace(BLOCK, " ").encode("utf-8")


class WordBPE:
    """GPT-1's BPE: the last character of a word carries </w>, so "er" at the end is another token than inside.
    "lower" -> l o w e r</w> -> low er</w>"""
    def __init__(self, vocab: dict[str, int], rank: Rank, suffix: str, unk_id: int | None):
        self.vocab, self.rank, self.suffix, self.unk_id = vocab, rank, suffix, unk_id

    def __call__(self, word: str) -> list[int]:
        parts = merge_pairs([*word[:-1], word[-1] + self.suffix], self.rank)
        ids = [self.vocab.get(p, self.unk_id) for p in parts]
        return [i for i in ids if i is not None]


def openai_gpt(vocab: dict[str, int], rank: Rank) -> Words:
    """GPT-1, whose files are vocab.json and merges.txt: BERT's cleaning and words, then BPE with </w>."""
    clean, cut_words = functools.partial(bert_normalize, step={}), pre_tokenizer({"type": "BertPreTokenizer"}, Path())
    return Words(vocab, [clean], [cut_words], WordBPE(vocab, rank, "</w>", vocab.get("<unk>")), suffix="</w>")


def unigram_core(model: dict, normal: list[dict], steps: list[dict], path: Path) -> tuple[Words, bool]:
    if not model["vocab"]:
        raise UserError(f"{path}: a Unigram tokenizer without a vocabulary")
    vocab = read_vocab(((piece, i) for i, (piece, _) in enumerate(model["vocab"])), path)
    viterbi = Viterbi({piece: float(score) for piece, score in model["vocab"] if piece})
    unk_id, fallback = model.get("unk_id"), model.get("byte_fallback", False)

    def cut(word: str) -> list[int]:
        ids: list[int] = []
        for piece in viterbi.cut(word):
            names = [f"<0x{b:02X}>" for b in piece.encode("utf-8")] if fallback and piece not in vocab else [piece]
            ids += [vocab.get(name, unk_id) for name in names] if names[0] in vocab else [unk_id]
        return [i for i in ids if i is not None]

    meta = next((s for s in steps if s["type"] == "Metaspace"), None)
    scheme = "never" if meta is None else metaspace(meta, path)
    return Words(vocab, [normalizer(s, path) for s in normal], [pre_tokenizer(s, path) for s in steps], cut,
                 prefix=scheme != "never"), scheme == "always"


def in_turn(steps: list[Callable[[str], str]]) -> Callable[[str], str]:
    return lambda text: functools.reduce(lambda t, step: step(t), steps, text)


def normalizer(s: dict, path: Path) -> Callable[[str], str]:
    """One normalizer as a function."""
    kind = s["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return functools.partial(unicodedata.normalize, kind)
    if kind == "Precompiled":
        import base64
        return Charsmap(base64.b64decode(s["precompiled_charsmap"] or "")).by_grapheme
    if kind == "Replace":
        pattern, content = s["pattern"], s["content"]
        if "Regex" not in pattern:
            return lambda text: text.replace(pattern["String"], content)
        compiled = Splitting(pattern["Regex"]).regex
        return lambda text: compiled.sub(lambda m: content, text, timeout=20)
    if kind == "BertNormalizer":
        return functools.partial(bert_normalize, step=s)
    if kind == "Strip":
        left, right = s.get("strip_left", True), s.get("strip_right", True)
        return lambda text: text.strip() if left and right else text.lstrip() if left else text.rstrip() if right \
            else text
    simple = {"Lowercase": lowercase, "StripAccents": strip_accents,
              "Prepend": lambda text: s["prepend"] + text if text else text}
    if kind not in simple:
        raise UserError(f"{path}: normalizer {kind} is not supported")
    return simple[kind]


def pre_tokenizer(s: dict, path: Path) -> Callable[[list[str], bool], list[str]]:
    """One pre_tokenizer as a function of (pieces, whether the first may get a block in front)."""
    kind = s["type"]
    if kind == "Metaspace":
        scheme, at_blocks = metaspace(s, path), Splitting(BLOCK, "MergedWithNext")

        def blocks(pieces: list[str], start: bool) -> list[str]:
            out: list[str] = []
            for i, piece in enumerate(pieces):
                piece = piece.replace(" ", BLOCK)
                wanted = scheme == "always" and (i or start) or scheme == "first" and not i and start
                piece = BLOCK + piece if wanted and not piece.startswith(BLOCK) else piece
                out += at_blocks(piece) if s.get("split", True) else [piece]
            return out
        return blocks
    known = {"WhitespaceSplit": [(r"\s", "Removed", False)], "Whitespace": [(r"\w+|[^\w\s]+", "Removed", True)],
             "BertPreTokenizer": [(r"\s", "Removed", False), PUNCTUATION]}
    if kind in ("Split", "Digits", "Punctuation"):
        known[kind] = [split_at(s, path)]
    if kind not in known:
        raise UserError(f"{path}: pre_tokenizer {kind} is not supported")
    cuts = [Splitting(p) for p in known[kind]]

    def words(pieces: list[str], start: bool) -> list[str]:
        for cut in cuts:
            pieces = [part for piece in pieces for part in cut(piece)]
        return pieces
    return words
