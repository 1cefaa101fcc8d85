"""Where public byte-level tokenizers cut a text into words before any pair merges, and how they clean it beforehand.

A splitter is a list of regexes, each applied to the pieces of the one before it. tokenizer.json spells them out; GGUF
files give a name (`tokenizer.ggml.pre`), some old ones not even that. The patterns are data: a model has learned the
words that its own pattern makes, and merges nothing across them.

    "I'm 1234"    GPT2: I | 'm | 1234    LLAMA3: I | 'm | (blank) | 123 | 4    QWEN2: I | 'm | (blank) | 1 | 2 | 3 | 4
"""
from typing import NamedTuple

import regex

from common import UserError

BYTES = ""                                # in a list of splits: from here on words are bytes

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Qwen 3.5: a mark belongs to the letter in front of it.
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
          r"\s+(?!\S)|\s+")
# Words by case: "camelCase" is two. Tekken (Mistral) takes digits one by one, GPT-4o three and keeps 's with its word.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = ("[^\\r\\n\\p{L}\\p{N}]?" + f"{UPPER}*{LOWER}+|" + "[^\\r\\n\\p{L}\\p{N}]?" + f"{UPPER}+{LOWER}*|"
          r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4O = TEKKEN.replace(f"{LOWER}+|", f"{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|").replace(
    f"{LOWER}*|", f"{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|").replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BLOOM = r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
PUNCTUATION = r"[\p{P}$+<=>^`|~]"        # what Unicode calls so, and the ASCII signs that it calls symbols
FALCON = [PUNCTUATION + "+", GPT2, BYTES, r"\p{N}+", r"[0-9][0-9][0-9]"]   # the byte b2, say, is printed as a digit
CASED = (                                 # cased letters as DeepSeek lists them
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-"
    r"ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-"
    r"ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CHINESE = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK = [r"[\r\n]", rf"\s?[{CASED}]+", r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
            CHINESE, r"\p{N}"]
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, r"\p{N}"]
DEEPSEEK3 = [r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
             r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
             r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]

KNOWN = {GPT2, LLAMA3, QWEN2, QWEN35, CL100K, TEKKEN, GPT4O, BLOOM, PUNCTUATION, r"\p{N}", r"\p{N}+", *FALCON,
         *DEEPSEEK, *DEEPSEEK_CODER, *DEEPSEEK3}

PATIENCE = 20.0                           # seconds for a regex that is not ours


def cut(pattern: regex.Pattern, text: str, timeout: float | None = None) -> list[str]:
    """The matches and what lies between them, in order: the pieces join to the text."""
    pieces, last = [], 0
    for m in pattern.finditer(text, timeout=timeout):
        if m.start() > last:
            pieces.append(text[last:m.start()])
        if m.end() > m.start():
            pieces.append(m.group())
        last = m.end()
    return pieces + ([text[last:]] if last < len(text) else [])


class Splitting:
    """One step of a splitter. `behavior` is what becomes of the matches: Isolated (words of their own), Removed,
    MergedWithPrevious, MergedWithNext, Contiguous (neighbours together); invert: of what lies between them.
    "a--b" at "-": Isolated a | - | - | b, Contiguous a | -- | b, MergedWithPrevious a- | - | b, Removed a | b"""
    def __init__(self, pattern: str, behavior: str = "Isolated", invert: bool = False):
        if isinstance(pattern, tuple):
            pattern, behavior, invert = pattern
        self.pattern, self.behavior, self.invert = pattern, behavior, invert
        try:
            # V1: sets inside sets, [^a[bc]]. MULTILINE: in tokenizer.json's dialect (Ruby's) $ is the end of any line.
            self.regex = regex.compile(pattern, regex.V1 | regex.MULTILINE)
        except (regex.error, OverflowError, RecursionError) as error:
            raise UserError(f"the word splitter {pattern[:80]!r} is no regular expression: {error}") from None

    def __call__(self, text: str) -> list[str]:
        if self.pattern in KNOWN and self.behavior == "Isolated":
            return cut(self.regex, text)
        try:                                              # a regex that came in a file may take forever; watching costs
            return self.watched(text, PATIENCE + len(text) / 50_000)
        except TimeoutError:
            raise UserError(f"the word splitter {self.pattern[:80]!r} takes too long on {text[:40]!r}") from None

    def watched(self, text: str, timeout: float) -> list[str]:
        if self.behavior == "Isolated":
            return cut(self.regex, text, timeout)
        pieces: list[tuple[str, bool]] = []               # and whether it is a match
        at = 0
        for m in self.regex.finditer(text, timeout=timeout):
            if m.end() > m.start():
                pieces += [(text[at:m.start()], False)] * (m.start() > at) + [(m.group(), True)]
                at = m.end()
        pieces += [(text[at:], False)] * (at < len(text))
        pieces = [(piece, match != self.invert) for piece, match in pieces]
        if self.behavior == "Removed":
            return [piece for piece, match in pieces if not match]
        return joined(pieces, self.behavior)


def joined(pieces: list[tuple[str, bool]], behavior: str) -> list[str]:
    """(piece, is a match) -> pieces, some of them with their neighbours."""
    if behavior == "MergedWithNext":
        backwards = joined([(piece[::-1], match) for piece, match in reversed(pieces)], "MergedWithPrevious")
        return [piece[::-1] for piece in reversed(backwards)]
    out: list[str] = []
    before = False
    for piece, match in pieces:
        if out and (match == before if behavior == "Contiguous" else match and not before):
            out[-1] += piece
        else:
            out.append(piece)
        before = match
    return out


# ---------------------------------------------------------------- GGUF

class Splitter(NamedTuple):
    """What a name in `tokenizer.ggml.pre` stands for: the regexes, and what the original does besides."""
    splits: list[str]
    nfc: bool = False                     # composes accents first
    ignore_merges: bool = False           # a word that is a token stays whole
    add_bos: bool = False


# llama.cpp's own table has the regexes alone; NFC is what the originals' tokenizer.json says.
GGUF_SPLITS = {name: splitter for names, splitter in (
    ("gpt-2 phi-2 jais jina-v2-en jina-v2-de jina-v2-es jina-es jina-de jina-v1-en jina-v2-code roberta-bpe gigachat "
     "trillion granite-docling exaone4 mellum a.x-4.0 modern-bert", Splitter([GPT2])),
    ("mpt olmo gpt-neox", Splitter([GPT2], nfc=True)),
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", Splitter([r"\p{N}", GPT2])),
    ("command-r", Splitter([r"\p{N}", GPT2], nfc=True)),
    ("falcon", Splitter(FALCON)),
    ("bloom poro-chat gpt3-finnish", Splitter([BLOOM])),
    ("viking", Splitter([BLOOM, r"\p{N}"])),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", Splitter([LLAMA3], ignore_merges=True,
                                                                                  add_bos=True)),
    ("dbrx smaug-bpe", Splitter([LLAMA3])),
    ("chatglm-bpe glm4", Splitter([LLAMA3], ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen megrez", Splitter([QWEN2], nfc=True)),
    ("qwen35", Splitter([QWEN35])),
    ("stablelm2 hunyuan grok-2 solar-open", Splitter([QWEN2])),
    ("tekken", Splitter([TEKKEN], ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2", Splitter([GPT4O], ignore_merges=True)),
    ("deepseek-llm", Splitter(DEEPSEEK)),
    ("deepseek-coder", Splitter(DEEPSEEK_CODER)),
    ("deepseek-v3 hunyuan-dense", Splitter(DEEPSEEK3)),
    ("seed-coder", Splitter([QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")])),
    ("bailingmoe bailingmoe2 llada-moe", Splitter([CL100K.replace(r"\p{N}{1,3}", r"\p{N}")])),
    ("superbpe", Splitter([r"\p{N}+", r"(?=(\d{3})+(?!\d))"])),
) for name in names.split()}

# Files from before April 2024 name no splitter ("default"), and llama.cpp cuts them by a mixture that is nobody's own.
# What the model learned follows from its architecture, and for LLaMA's from the tokens that its family invented.
OLD_ARCHITECTURES = {"gptneox": "gpt-neox", "olmo": "olmo", "mpt": "mpt", "falcon": "falcon", "bloom": "bloom",
                     "starcoder": "starcoder", "starcoder2": "starcoder", "refact": "refact", "codeshell": "codeshell",
                     "command-r": "command-r", "dbrx": "dbrx", "qwen": "qwen2", "qwen2": "qwen2"}
OLD_TOKENS = {"<|begin_of_text|>": "llama-bpe", "<|EOT|>": "deepseek-coder",
              "<\uff5cbegin\u2581of\u2581sentence\uff5c>": "deepseek-llm"}


def gguf_splitter(pre: str, architecture: str, tokens: list[str]) -> Splitter | None:
    """By name; where the file has none by family, and where that tells nothing GPT-2's."""
    if pre == "default":
        there = set(tokens)
        own = next((name for token, name in OLD_TOKENS.items() if token in there), "gpt-2")
        pre = OLD_ARCHITECTURES.get(architecture, own)
    return GGUF_SPLITS.get(pre)
