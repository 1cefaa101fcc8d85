"""data/tokenizer_glm.py and data/tokenizer_makers.py: files that only one maker has.

The references: sentencepiece and tiktoken for what these files hold, with the ids of names and blanks counted by hand;
and of ChatGLM-6B's own file, where it lies beside the repository (../shared), ids that others have published.
"""
import base64
import json
import struct
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import SHARED, TEXTS, sentencepiece_model, texts, trained
from test_tokenizer_json import MORE

from common import UserError
from data import splits
from data import tokenizer as tk
from data.tokenizer_glm import ICE_BLANKS, ICE_SPECIALS

SAMPLES = [*TEXTS, *MORE]


def turns(*words: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(words)]


def processor(data: bytes):
    import sentencepiece
    return sentencepiece.SentencePieceProcessor(model_proto=data)


# ---------------------------------------------------------------- ChatGLM

@pytest.fixture(scope="module")
def ice(tmp_path_factory):
    """(ours, the bare vocabulary): ChatGLM-6B's first release, whose file lacks the names that its code adds."""
    folder = tmp_path_factory.mktemp("ice")
    data = sentencepiece_model("unigram", byte_fallback=False, user_defined_symbols=["<n>"], bos_id=1, eos_id=2)
    (folder / "ice_text.model").write_bytes(data)
    return tk.load_tokenizer(folder), processor(data)


def test_chatglm_6b_s_ids(ice):
    """The vocabulary, 8 special tokens, <|tab|>, <|blank_2|> to 80, 256 bytes; 20000 ids of images in front of all."""
    ours, bare = ice
    n, images = bare.vocab_size(), 20000
    names = {t: images + n + i for i, t in enumerate([*ICE_SPECIALS, *ICE_BLANKS])}
    assert ours.specials == {t: names[t] for t in ICE_SPECIALS} | {"<s>": images + 1, "</s>": images + 2}
    assert ours.eos_ids == [names["<eop>"]] and ours.vocab_size == 150528 and not ours.add_bos
    for text in ("hello world", "the quick", "hello\nworld", "1234"):
        assert ours.encode(text) == [images + i for i in bare.encode(text.replace("\n", "<n>"))], text
    hello = [images + i for i in bare.encode("hello")]
    fox = [images + i for i in bare.encode("<n>fox")[2:]]                # inside a text: no space in front
    bytes_of = {b: images + n + 88 + b for b in range(256)}
    for k in (2, 3, 79, 80):
        assert ours.encode("hello" + " " * k + "fox") == [*hello, names[f"<|blank_{k}|>"], *fox], k
    blanks = [names["<|blank_80|>"], names["<|blank_3|>"], names["<|tab|>"]]
    assert ours.encode("hello" + " " * 83 + "\tfox") == [*hello, *blanks, *fox]
    assert ours.encode("hello\U0001f600") == [*hello, *(bytes_of[b] for b in "\U0001f600".encode())]
    assert names["[gMASK]"] not in ours.encode("[gMASK]") and ours.encode("[gMASK]", special=True) == [names["[gMASK]"]]


@given(text=st.one_of(texts, st.sampled_from(SAMPLES)))
def test_chatglm_6b_gives_the_text_back(text, ice):
    ours = ice[0]
    if not any(name in text for name in ("<n>", "<|", "\u2581", "\0")):                 # typed, they mean what they say
        assert ours.decode(ours.encode(text)) == text
        assert ours.decode(ours.encode("hello") + ours.encode(text, start=False)) == "hello" + text


def test_chatglm_6b_s_prompt_ends_with_gmask_sop(ice):
    """What the model reads: words [gMASK] <sop> answer <eop>. Each side begins as a text of its own."""
    ours, s = ice[0], ice[0].specials
    question, answer = ours.encode("hello"), ours.encode("the quick fox")
    assert ours.render(turns("hello"), True) == ([*question, s["[gMASK]"], s["<sop>"]], [0] * (len(question) + 2))
    ids, mask = ours.render(turns("hello", "the quick fox"))
    assert ids == [*question, s["[gMASK]"], s["<sop>"], *answer, s["<eop>"]]
    assert mask == [0] * (len(question) + 2) + [1] * (len(answer) + 1)


def test_how_many_ids_of_images_stand_in_front(ice, tmp_path):
    """What the settings say, else the size of the model, else whether the file has the names already."""
    ours, bare = ice
    (tmp_path / "ice_text.model").write_bytes(ours.files["ice_text.model"])
    hello = bare.encode("hello")
    for name, said, images in (("config.json", {"vocab_size": 130528}, 0), ("config.json", {"vocab_size": 150528},
                               20000), ("tokenizer_config.json", {"num_image_tokens": 0}, 0)):
        (tmp_path / name).write_text(json.dumps(said), encoding="utf-8")
        assert tk.load_tokenizer(tmp_path).encode("hello") == [images + i for i in hello], said
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": "many"}), encoding="utf-8")
    with pytest.raises(UserError, match="num_image_tokens is 'many'"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "ice_text.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="no SentencePiece model"):
        tk.load_tokenizer(tmp_path)


def test_chatglm_6b_s_own_file():
    """Ids that the tests of chatglm.cpp expect of the later release, whose ids are smaller by the 20000 of images."""
    path = SHARED / "research_only" / "tok_chatglm6b" / "ice_text.model"
    if not path.exists():
        pytest.skip("ChatGLM-6B's ice_text.model does not lie beside the repository")
    ours = tk.load_tokenizer(path)
    talk = ("\u4f60\u597d", "\u4f60\u597d\U0001f44b\uff01\u6211\u662f\u4eba\u5de5\u667a\u80fd\u52a9\u624b ChatGLM-6B"
            "\uff0c\u5f88\u9ad8\u5174\u89c1\u5230\u4f60\uff0c\u6b22\u8fce\u95ee\u6211\u4efb\u4f55\u95ee\u9898\u3002",
            "\u665a\u4e0a\u7761\u4e0d\u7740\u5e94\u8be5\u600e\u4e48\u529e")
    for words, expected in (
            (talk[:1], [5, 74874, 130001, 130004]),
            (["def main():\n    print('hello world')\t# greeting"], [
                1616, 594, 125936, 4, 130011, 2274, 89, 7283, 398, 125686, 130008, 61, 25672, 130001, 130004]),
            (talk, [53, 6945, 5, 8, 42, 4, 64286, 12, 74874, 4, 67342, 12, 74874, 130328, 130247, 130233, 130227, 35,
                    65806, 68241, 75890, 14132, 5388, 340, 11, 21, 222, 6, 76693, 66877, 63852, 6, 66430, 68747, 102501,
                    63823, 4, 52, 6945, 5, 9, 42, 4, 64286, 12, 65450, 83400, 64213, 66846, 4, 67342, 12, 130001,
                    130004])):
        assert ours.render(turns(*words), True)[0] == [20000 + i for i in expected]


@pytest.mark.parametrize("third", [False, True], ids=["2", "3"])
def test_chatglm_2_and_3(third, tmp_path):
    """tokenizer.model and the names behind its last id: [MASK] [gMASK] [sMASK] sop eop, then those of the roles."""
    data = sentencepiece_model("bpe")
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm3-6b" if third else ""}),
        encoding="utf-8")
    ours, sp = tk.load_tokenizer(tmp_path), processor(data)
    n = sp.vocab_size()
    for text in SAMPLES:
        assert ours.encode(text) == sp.encode(text), repr(text)
    assert [ours.specials[t] for t in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>")] == \
        list(range(n, n + 7)) and not ours.add_bos
    ids, mask = ours.render(turns("hello", "the fox"))
    if third:                                             # each role: its name, the line, the words; spaces in front
        user, assistant, line = n + 6, n + 7, sp.encode("\n")
        answer = [*line, *sp.encode("the fox"), user]
        assert ids == [n + 1, n + 3, user, *line, *sp.encode("hello"), assistant, *answer]
        assert ours.eos_ids == [sp.eos_id(), user, n + 8]
    else:
        prompt = sp.encode("[Round 1]\n\n\u95ee\uff1ahello\n\n\u7b54\uff1a")
        answer = [*sp.encode("the fox"), sp.eos_id()]
        assert ids == [n + 1, n + 3, *prompt, *answer] and ours.eos_ids == [sp.eos_id()]
    assert mask == [0] * (len(ids) - len(answer)) + [1] * len(answer)


def ranks_of(kind: str = "gpt2") -> dict[bytes, int]:
    """A trained vocabulary as tiktoken has it: the rank of a merge is the id of its result."""
    vocab = json.loads(trained(kind).to_str())["model"]["vocab"]
    data = {bytes(tk.CHAR_TO_BYTE[c] for c in token): i for token, i in vocab.items()}
    order = [bytes([b]) for b in range(256)] + [t for t in sorted(data, key=data.get) if len(t) > 1]
    return {t: i for i, t in enumerate(order)}


def test_glm_4_s_ranks(tmp_path):
    import tiktoken
    ranks = ranks_of()
    lines = b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in ranks.items())
    (tmp_path / "tokenizer.model").write_bytes(lines)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLM4Tokenizer"}),
                                                    encoding="utf-8")
    ours, n = tk.load_tokenizer(tmp_path), len(ranks)
    theirs = tiktoken.Encoding("glm4", pat_str=splits.LLAMA3, mergeable_ranks=ranks, special_tokens={})
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=()), repr(text)
    assert (ours.specials["[gMASK]"], ours.specials["<sop>"], ours.specials["<|user|>"]) == (n + 2, n + 4, n + 7)
    ids, mask = ours.render(turns("hello", "yes", "hello"), True)
    line = theirs.encode("\nhello")
    assert ids[:3] == [n + 2, n + 4, n + 7] and ids[3:3 + len(line)] == line
    assert ids.count(n + 7) == 2 and mask[ids.index(n + 7, 3)] == 1, "the next role's name ends an answer"


# ---------------------------------------------------------------- Tekken

def tekken_file(folder: Path, front: int = 20, kept: int = 40) -> dict[bytes, int]:
    ranks = ranks_of()
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, i in ranks.items()]
    config = {"pattern": splits.TEKKEN, "default_num_special_tokens": front, "num_vocab_tokens": len(vocab),
              "default_vocab_size": front + len(vocab) - kept, "version": "v3"}
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}), encoding="utf-8")
    return dict(list(ranks.items())[:len(ranks) - kept])


def test_tekken(tmp_path):
    """Special tokens in front of the ranks, of which the last ones are not used."""
    import tiktoken
    ranks = tekken_file(tmp_path)
    ours = tk.load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding("tekken", pat_str=splits.TEKKEN, mergeable_ranks=ranks, special_tokens={})
    for text in SAMPLES:
        assert ours.encode(text) == [20 + i for i in theirs.encode(text, disallowed_special=())], repr(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, [2], 20 + len(ranks)) and ours.add_bos
    ids, mask = ours.render(turns("Hi", "Yes"))
    assert ids == [1, 3, *ours.encode("Hi"), 4, *ours.encode("Yes"), 2] and mask[-1] == 1
    again = tmp_path / "again"
    again.mkdir()
    (again / "tokenizer.json").write_bytes(ours.files["tokenizer.json"])
    for text in SAMPLES:
        assert tk.load_tokenizer(again).encode(text) == ours.encode(text)


@pytest.mark.parametrize("change", [
    {"config": None}, {"vocab": [None]}, {"vocab": [{"rank": 0}]}, {"config": {"pattern": "("}}, {"special_tokens": 3},
    {"config": {"default_num_special_tokens": -1, "default_vocab_size": 10, "pattern": "a"}},
    {"config": {"default_num_special_tokens": 10**9, "default_vocab_size": 10, "pattern": "a"}}])
def test_a_damaged_tekken_file(change, tmp_path):
    tekken_file(tmp_path)
    spec = json.loads((tmp_path / "tekken.json").read_text(encoding="utf-8"))
    (tmp_path / "tekken.json").write_text(json.dumps(spec | change), encoding="utf-8")
    with pytest.raises(UserError, match="tekken.json"):
        tk.load_tokenizer(tmp_path)


# ---------------------------------------------------------------- RWKV

WORLD = [*(bytes([b]) for b in range(256)), b"the", b"the quick", b"hello", b"hell", b" wor", b"  ", b"\r\n",
         "\u4f60".encode(), "\u4f60\u597d".encode(), "\u4f60".encode()[:2]]


def world_file(folder: Path) -> Path:
    def literal(token: bytes) -> str:
        try:
            return repr(token.decode())
        except UnicodeDecodeError:
            return repr(token)

    path = folder / "rwkv_vocab_small.txt"
    lines = [f"{i} {literal(t)} {len(t)}" for i, t in enumerate(WORLD, 1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tk.load_tokenizer(world_file(tmp_path_factory.mktemp("world")).parent)


@given(text=st.one_of(texts, st.sampled_from([*SAMPLES, "the quickest hell hello", "\u4f60 \u4f60\u597d \u4f61"])))
def test_rwkv_s_world_takes_the_longest_token(text, world):
    data, ids = text.encode(), []
    while data:
        best = max((t for t in WORLD if data.startswith(t)), key=len)
        ids.append(WORLD.index(best) + 1)
        data = data[len(best):]
    assert world.encode(text) == ids and world.decode(ids) == text


def test_rwkv_s_file(world, tmp_path):
    assert world.eos_ids == [0] and world.specials == {"<|endoftext|>": 0} and not world.add_bos
    path = world_file(tmp_path)
    good = path.read_text(encoding="utf-8")
    for bad in ("7 'a' 2", "7 'a'", "x 'a' 1", "7 __import__('os') 1", "7 'a 1", "0 'a' 1", "7 [1] 1 1"):
        path.write_text(good + bad + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=f":{len(WORLD) + 1}: no line of RWKV's"):
            tk.load_tokenizer(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is empty"):
        tk.load_tokenizer(path)


# ---------------------------------------------------------------- jieba's words

@pytest.fixture
def jieba(monkeypatch):
    """jieba, as far as these tests need it: words end at blanks and behind Chinese characters."""
    import regex
    module = types.ModuleType("jieba")
    module.cut = lambda text, cut_all=False: regex.findall(r"\s|\p{Han}{1,2}|[^\s\p{Han}]+", text)
    monkeypatch.setitem(sys.modules, "jieba", module)


def test_cpm_ant_takes_the_longest_pieces_of_words(jieba, tmp_path):
    """Only within a word: of three characters, cut in two and one, the piece of the last two is not found."""
    names = ["<pad>", "<unk>", "<s>", "</s>", "<d>", "</d>", "</n>", "</_>", "\u4f60", "\u4f60\u597d", "\u4e16\u754c",
             "\u754c\u4f60", "he", "hell", "o"]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    ours, at = tk.load_tokenizer(tmp_path), {t: i for i, t in enumerate(names)}
    for text, pieces in (("\u4f60\u597d", ["\u4f60\u597d"]), ("\u4e16\u754c\u4f60", ["\u4e16\u754c", "\u4f60"]),
                         ("hello \n\u4f60", ["hell", "o", "</_>", "</n>", "\u4f60"]),
                         ("help", ["he", "<unk>", "<unk>"]), ("o" * 201, ["<unk>"]), ("", [])):
        assert ours.encode(text) == [at[p] for p in pieces], text
    assert ours.decode(ours.encode("hello \n\u4f60\u597d")) == "hello \n\u4f60\u597d"
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (2, [3], 0) and 3 not in ours.encode("</s>")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n", encoding="utf-8")
    with pytest.raises(UserError, match="no vocabulary of CPM-Ant"):
        tk.load_tokenizer(tmp_path)


@pytest.mark.parametrize("end", ["<eot>", "<eod>"])
def test_pangu_and_cpm_join_words_by_blanks(end, jieba, tmp_path):
    """PanGu has <eot>, CPM <eod>; real blanks are U+2582, newlines U+2583. CPM cleans as XLNet does: full-width letters
    become plain ones, accents go."""
    data = sentencepiece_model("unigram", user_defined_symbols=["\u2582", "\u2583", end], byte_fallback=False)
    (tmp_path / "vocab.model").write_bytes(data)
    ours, sp = tk.load_tokenizer(tmp_path), processor(data)
    assert ours.encode("hello the\n\u4f60\u597d") == sp.encode("hello \u2582 the \u2583 \u4f60\u597d")
    assert ours.decode(ours.encode("hello the\n\u4f60\u597d")) == "hello the\n\u4f60\u597d"
    assert ours.eos_ids == [sp.piece_to_id(end)] and not ours.add_bos
    clean = "quick the" if end == "<eod>" else "\uff51uick th\u00e9"
    assert ours.encode("\uff51uick th\u00e9") == sp.encode(clean.replace(" ", " \u2582 "))


def test_without_jieba_the_error_tells_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jieba", None)
    (tmp_path / "vocab.txt").write_text("<unk>\n</_>\n</n>\n<s>\n</s>\n<pad>\n", encoding="utf-8")
    with pytest.raises(UserError, match="pip install jieba"):
        tk.load_tokenizer(tmp_path)


# ---------------------------------------------------------------- the user's own symbols

def test_roles_inside_a_sentencepiece_vocabulary_are_text_when_typed(tmp_path):
    """Gemma's and InternLM's files list them as the user's own symbols, which the library finds wherever they stand."""
    symbols = ["<start_of_turn>", "<end_of_turn>", "<eoh>", "<reserved_7>", "<hm>"]
    data = sentencepiece_model("bpe", user_defined_symbols=symbols, add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    ours, sp = tk.load_tokenizer(tmp_path), processor(data)
    ids = {t: sp.piece_to_id(t) for t in symbols}
    for text in ("a<eoh>b", "<start_of_turn>user\nhello<end_of_turn>", "<<eoh>>", "<eoh><eoh>", "<reserved_7>"):
        typed = ours.encode(text)
        assert not set(typed) & (set(ids.values()) - {ids["<hm>"]}) and ours.decode(typed) == text
        assert ours.encode(text, special=True) == sp.encode(text)
    assert ours.encode("a <hm> b") == sp.encode("a <hm> b") and ids["<hm>"] in ours.encode("<hm>")
    for text in SAMPLES:
        assert ours.encode(text) == sp.encode(text), repr(text)


# ---------------------------------------------------------------- damaged files

def whole_files(kind: str, folder: Path) -> dict[str, bytes]:
    """A small tokenizer of each kind of file; the first of its files is the one that gets damaged."""
    if kind in ("ice_text.model", "tokenizer.model"):
        return {kind: sentencepiece_model("unigram", user_defined_symbols=["<n>"])}
    if kind == "tekken.json":
        tekken_file(folder)
        return {kind: (folder / kind).read_bytes()}
    if kind == "rwkv_vocab_small.txt":
        return {kind: world_file(folder).read_bytes()}
    if kind == "vocab.txt":
        return {kind: b"<unk>\n</_>\n</n>\n<s>\n</s>\n<pad>\nhello\n"}
    if kind == "qwen.tiktoken":
        return {kind: b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in ranks_of().items())}
    if kind == "tok512.bin":
        tokens = [b"<unk>", b"<s>", b"</s>", *(bytes([b]) for b in range(256)), b" ", b"a", b" a"]
        return {kind: struct.pack("<i", 5) + b"".join(struct.pack("<fi", -i, len(t)) + t for i, t in enumerate(tokens))}
    spec = json.loads(trained("gpt2").to_str())["model"]
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in spec["merges"])
    files = {"encoder.json": json.dumps(spec["vocab"]).encode(), "vocab.bpe": b"#version: 0.2\n" + merges.encode()}
    return {kind: files[kind], **files}


@pytest.mark.parametrize("kind", ["ice_text.model", "tokenizer.model", "tekken.json", "rwkv_vocab_small.txt",
                                  "vocab.txt", "qwen.tiktoken", "tok512.bin", "encoder.json", "vocab.bpe"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused(kind, data, jieba, tmp_path_factory):
    """Bytes overwritten, or the end cut off: an error for the user or a tokenizer that works, no other exception."""
    folder = tmp_path_factory.getbasetemp() / f"damaged {kind}"
    folder.mkdir(exist_ok=True)
    if kind not in WHOLE:
        WHOLE[kind] = whole_files(kind, folder)
    for name, content in WHOLE[kind].items():
        (folder / name).write_bytes(content)
    raw = bytearray(WHOLE[kind][kind])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(300, len(raw) - 1)) | st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from(list(b' 0a"[]{}:,\n')) | st.integers(0, 255))
    (folder / kind).write_bytes(bytes(raw[:data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]))
    try:
        ours = tk.load_tokenizer(folder / (kind if kind != "vocab.bpe" else "encoder.json"))
        assert isinstance(ours.decode(ours.encode("hello \u4f60\n  12")), str)
    except UserError:
        pass


WHOLE: dict[str, dict[str, bytes]] = {}


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "tekken.json"])
def test_json_that_nests_too_deep(name, tmp_path):
    (tmp_path / name).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match=name):
        tk.load_tokenizer(tmp_path)
