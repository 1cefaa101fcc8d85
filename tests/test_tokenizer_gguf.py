"""data/tokenizer_gguf.py and data/splits.py: tokenizers inside GGUF files.

The references: llama.cpp's test vocabularies with 47 strings and their expected ids each, where they lie beside the
repository (../shared), or in the folder that GGML_VOCAB names; and the tokenizers and sentencepiece packages, on small
vocabularies that are written into GGUF files here.
"""
import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import CORPUS, SHARED, TEXTS, check, reread, sentencepiece_model, texts, trained
from test_tokenizer_json import MORE, SPECS

from common import UserError
from data import splits
from data import tokenizer as tk
from data.tokenizer_files import proto_fields

VOCABULARIES = sorted(Path(os.environ.get("GGML_VOCAB", SHARED / "models" / "vocab")).glob("*.gguf"))


@pytest.mark.parametrize("path", VOCABULARIES or [None], ids=lambda p: p.stem if p else "none")
def test_llama_cpp_s_47_strings(path, tmp_path):
    """Expected ids come with the files; and once more from the tokenizer.json that we write."""
    if path is None:
        pytest.skip("llama.cpp's vocabularies do not lie beside the repository")
    if "bert" in path.stem and "nomic" not in path.stem:
        with pytest.raises(UserError, match="'bert' is not supported"):
            tk.load_tokenizer(path)
        return
    ours, expected = tk.load_tokenizer(path), Path(f"{path}.out")
    strings = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n") if expected.exists() \
        else []
    lines = expected.read_text(encoding="utf-8").split("\n") if expected.exists() else []
    for text, line in zip(strings, lines):
        ids = [int(i) for i in line.split()]
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == text, repr(text)
    if ours.files:                                        # a unigram model is not written as tokenizer.json
        check(ours, reread(ours, tmp_path)[0], [*TEXTS, *strings])
    if "qwen" in path.stem and "35" not in path.stem:     # llama.cpp does not normalise, the original does
        assert ours.encode("e\u0301") == ours.encode("\u00e9") and not ours.add_bos
    assert ours.add_bos or "llama" not in path.stem


def small_gguf(path: Path, kind: str, tokens: list[tuple[str, int]], scores=None, merges=(), **more) -> None:
    """A GGUF file with a tokenizer and no weights; tokens with their types, scores fall with the id."""
    from gguf import GGUFWriter
    writer = GGUFWriter(str(path), more.pop("architecture", "llama"))
    writer.add_tokenizer_model(kind)
    writer.add_token_list([t for t, _ in tokens])
    writer.add_token_types([k for _, k in tokens])
    writer.add_token_scores(scores or [-float(i) for i in range(len(tokens))])
    writer.add_token_merges(list(merges))
    for key, value in more.items():
        add = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array, int: writer.add_uint32}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_token_types_of_gguf(tmp_path):
    """3 = control, named by templates only; 4 = a word everywhere; 6 = bytes, which nobody can type; [PAD9] is air."""
    parts = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256)), ("<hm>", 4),
             ("[PAD260]", 4), *((t, 1) for t in ("\u2581", "a", "s", "<", ">", "<s", "s>", "as", "\u2581as"))]
    small_gguf(tmp_path / "m.gguf", "llama", parts, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    ours = tk.load_tokenizer(tmp_path / "m.gguf")
    at = {t: i for i, (t, _) in enumerate(parts)}
    assert ours.specials == {"<s>": 1, "</s>": 2} and ours.words == {"<hm>": 259} and ours.add_bos
    assert ours.encode("as") == [at["\u2581as"]] and ours.encode("as", start=False) == [at["as"]]
    assert ours.encode("<s>", start=False) == [at["<s"], at[">"]] and ours.encode("<s>", special=True) == [1]
    assert ours.encode("<0x0A>")[-6:] != [13] and ours.encode("\n") == [at["\u2581"], 3 + 10]
    assert ours.encode("a<hm>") == [at["\u2581"], at["a"], 259] and 260 not in ours.encode("[PAD260]")
    small_gguf(tmp_path / "n.gguf", "llama", parts, bos_token_id=1, add_space_prefix=False, add_bos_token=False)
    other = tk.load_tokenizer(tmp_path / "n.gguf")
    assert other.encode("as") == [at["as"]] and not other.add_bos
    small_gguf(tmp_path / "o.gguf", "bert", parts)
    with pytest.raises(UserError, match="'bert' is not supported"):
        tk.load_tokenizer(tmp_path / "o.gguf")


def test_roles_that_a_file_calls_ordinary_are_text_when_typed(tmp_path):
    """Baichuan's <reserved_102> begins a question; its files list it among the words."""
    parts = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256)), ("<reserved_102>", 1),
             ("\u2581", 1), ("a", 1)]
    small_gguf(tmp_path / "m.gguf", "llama", parts, bos_token_id=1, eos_token_id=2)
    ours = tk.load_tokenizer(tmp_path / "m.gguf")
    assert ours.specials["<reserved_102>"] == 259 and 259 not in ours.encode("<reserved_102>")
    assert ours.encode("<reserved_102>a", special=True) == [259, 260, 261]


# `tokenizer.ggml.pre` and the steps of tokenizer.json that it stands for.
PRE = {"gpt-2": "gpt2", "falcon": "falcon", "starcoder": "starcoder", "bloom": "bloom", "tekken": "tekken",
       "gpt-4o": "gpt4o", "qwen2": "qwen2", "deepseek-llm": "deepseek", "deepseek-coder": "deepseek-coder",
       "deepseek-v3": "deepseek3", "llama-bpe": "llama3"}


@pytest.mark.parametrize("pre", PRE)
def test_word_splitters_by_name(pre, tmp_path):
    """The same vocabulary as GGUF and in the tokenizers package, with the family's own steps."""
    from tokenizers import Tokenizer
    kind = PRE[pre]
    spec = SPECS[kind]() if kind in SPECS else json.loads(trained(kind).to_str())
    theirs = Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
    vocab = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    small_gguf(tmp_path / "m.gguf", "gpt2", [(t, 1) for t, _ in vocab], merges=merges, pre=pre)
    ours = tk.load_tokenizer(tmp_path / "m.gguf")
    for text in (unicodedata.normalize("NFC", text) for text in [*TEXTS, *MORE, *CORPUS[:7]]):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == text


# How a family cuts, by hand. A dot stands for a blank, N for a newline.
WORDS = {
    "gpt-2": ("I'm 1234 a  b!!N/x", "I|'m|.1234|.a|.|.b|!!|N|/|x"),
    "llama-bpe": ("I'm 1234 a  b!!N/x", "I|'m|.|123|4|.a|.|.b|!!N|/x"),
    "qwen2": ("I'M 1234!!N/x", "I|'M|.|1|2|3|4|!!N|/x"),
    "tekken": ("HTTPServer isOK I'm 12!!N/x", "HTTPServer|.is|OK|.I|'m|.|1|2|!!N/|x"),
    "gpt-4o": ("HTTPServer isOK I'm 1234!!N/x", "HTTPServer|.is|OK|.I'm|.|123|4|!!N/|x"),
    "bloom": ("Hi,you (a|b).N x12", "Hi|,|you|.(|a|||b|).N|.x12"),       # signs stay together
    "viking": ("Hi,you x12", "Hi|,|you|.x|1|2"),
    "falcon": ("a--b 12345 x+y", "a|--|b|.|123|45|.x|+|y"),
    "starcoder": ("ab12 34", "ab|1|2|.|3|4"),
    "deepseek-llm": ("Hi,you 12N x", "Hi|,|you|.|1|2|N|.x"),
    "deepseek-coder": ("Hi!you 12N x", "Hi|!|you|.|1|2|N|.x"),
    "deepseek-v3": ("Hi,you 1234!N x", "Hi|,you|.|123|4|!N|.x")}


@pytest.mark.parametrize("pre", WORDS)
def test_worked_examples_of_splitters(pre):
    text, expected = WORDS[pre]
    core = tk.ByteBPE({}, lambda a, b: None, splits.GGUF_SPLITS[pre].splits)
    words = core.words(text.replace("N", "\n"))
    assert "|".join(words).replace("\u0120", ".").replace("\u010a", "N") == expected


def test_files_without_a_splitter_tell_by_their_family(tmp_path):
    """Before April 2024 files named none: the architecture tells, and of LLaMA's kind the tokens."""
    assert splits.gguf_splitter("default", "gptneox", []).nfc and splits.gguf_splitter("default", "llama", []) == \
        splits.GGUF_SPLITS["gpt-2"]
    assert splits.gguf_splitter("default", "llama", ["<|begin_of_text|>"]).splits == [splits.LLAMA3]
    assert splits.gguf_splitter("default", "falcon", []).splits == splits.FALCON
    small_gguf(tmp_path / "m.gguf", "gpt2", [("a", 1)], merges=["a a"], pre="of-tomorrow", architecture="gpt2")
    with pytest.raises(UserError, match="tokenizer.ggml.pre = 'of-tomorrow' is unknown; known: default"):
        tk.load_tokenizer(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """(ours out of GGUF, the sentencepiece library): a unigram model that normalises as T5's does."""
    import sentencepiece
    data = sentencepiece_model("unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True,
                               byte_fallback=False)
    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    charsmap = dict((n, v) for n, v, _ in proto_fields(dict((n, v) for n, v, _ in proto_fields(data))[3]))[2]
    n = sp.vocab_size()
    path = tmp_path_factory.mktemp("t5") / "m.gguf"
    small_gguf(path, "t5", [(sp.id_to_piece(i), 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 1)
                            for i in range(n)], [sp.get_score(i) for i in range(n)], architecture="t5",
               precompiled_charsmap=list(charsmap), remove_extra_whitespaces=True, add_space_prefix=True,
               unknown_token_id=sp.unk_id(), eos_token_id=sp.eos_id())
    return tk.load_tokenizer(path), sp


@given(text=st.one_of(texts, st.sampled_from([*TEXTS, *MORE])))
def test_unigram_in_gguf_equals_sentencepiece(text, t5):
    ours, theirs = t5
    assert ours.encode(text) == theirs.encode(text) and not ours.add_bos


def test_gemma_4_merges_characters(tmp_path):
    """Merges as in byte-level BPE, characters and blocks as in SentencePiece, bytes for what has no token."""
    parts = [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2), *((f"<0x{b:02X}>", 6) for b in range(256)),
             *((t, 1) for t in ("\u2581", "a", "b", "ab", "\u2581ab", "\n"))]
    small_gguf(tmp_path / "m.gguf", "gemma4", parts, merges=["a b", "\u2581 ab"], bos_token_id=2, eos_token_id=1,
               unknown_token_id=3)
    ours, at = tk.load_tokenizer(tmp_path / "m.gguf"), {t: i for i, (t, _) in enumerate(parts)}
    assert ours.encode("ab ab\n\u00e9") == [at["ab"], at["\u2581ab"], at["\n"], 4 + 0xc3, 4 + 0xa9]
    assert ours.add_bos and ours.decode(ours.encode(" ab ab")) == " ab ab"


@given(data=st.data())
def test_a_damaged_tokenizer_in_gguf_is_refused(data, tmp_path_factory):
    """Bytes of the header overwritten: an error for the user or a tokenizer that works, no other exception."""
    path = tmp_path_factory.getbasetemp() / "small.gguf"
    if not path.exists():
        small_gguf(path, "llama", [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("\u2581", 1), ("a", 1), ("\u2581a", 1)],
                   bos_token_id=1, eos_token_id=2)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 4, 8, 9, 127, 255]))
    damaged = path.with_name("damaged.gguf")
    damaged.write_bytes(bytes(raw[:data.draw(st.integers(8, len(raw)))]) if data.draw(st.booleans()) else bytes(raw))
    try:
        ours = tk.load_tokenizer(damaged)
        assert ours is None or isinstance(ours.decode(ours.encode("a a\n\u4f60")), str)
    except UserError:
        pass
