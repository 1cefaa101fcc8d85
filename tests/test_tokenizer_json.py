"""data/tokenizer_json.py against the tokenizers package: for every step that public families put into a tokenizer.json
a small tokenizer is trained here, and the ids of any text must be the package's."""
import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import CORPUS, TEXTS, sentencepiece_model, texts, trained

from common import UserError
from data import splits
from data import tokenizer as tk
from data.tokenizer_files import proto_fields

MORE = ["camelCase HTTPServer iPhone", "\u4f60\u597d,\u4e16\u754c!\u3002\u3001 ok", "a--b -- c...d", "1234567 12,345.6",
        "x\u0301\u0302 e\u0301", "  a", "a  ", "\u3000\u3000x", "<|user|>x", "# def\n\n\n  f(x)\r\n\t",
        "\u0639\u0631\u0628\u06d4\u060c \u0939\u093f\u0964",
        "\u01c5 \u02b0 \u1d2c", "  \u4f60  \u597d  ", "see ./a/b//c\n/ !//\n/",
        "don't DON'T we'LL", "$100 a+b=c ^~`|<>"]
SAMPLES = TEXTS + MORE
DEEPSEEK = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
            for p in splits.DEEPSEEK[:-1]] + [{"type": "Digits", "individual_digits": True}]


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


# What stands in front of ByteLevel in the files of each family; and NFC where they have it.
BYTE_KINDS = {
    "bloom": [split(splits.BLOOM)], "tekken": [split(splits.TEKKEN)], "gpt4o": [split(splits.GPT4O)],
    "qwen2": [split(splits.QWEN2)], "cl100k removed": [split(splits.CL100K, "Removed", True)], "deepseek": DEEPSEEK,
    "deepseek3": [split(p) for p in splits.DEEPSEEK3], "deepseek-coder": [split(p) for p in splits.DEEPSEEK_CODER],
    "starcoder": [{"type": "Digits", "individual_digits": True}],
    "digits": [{"type": "Digits", "individual_digits": False}],
    "previous": [split("-|\\s", "MergedWithPrevious")], "next": [split("-|\\s", "MergedWithNext")],
    "contiguous": [split("[-.]", "Contiguous")], "inverted": [split("[a-z]+", "MergedWithNext", True)],
    "punctuation": [{"type": "Punctuation", "behavior": "Isolated"}], "line ends": [split("[a-z]$|\\s+$")],
    "merged punctuation": [{"type": "Punctuation", "behavior": "MergedWithPrevious"}],
    "string": [{"type": "Split", "pattern": {"String": "."}, "behavior": "Isolated", "invert": False}]}


def byte_spec(kind: str) -> dict:
    spec = json.loads(trained("gpt2").to_str())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": kind in ("starcoder", "digits", "punctuation")}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*BYTE_KINDS[kind], level]}
    return spec


def neox_spec() -> dict:
    """GPT-NeoX (Pythia, Dolly, MPT, OLMo): NFC, GPT-2's words, runs of 2 to 24 blanks as words."""
    spec = json.loads(trained("gpt2").to_str())
    n = max(t["id"] for t in spec["added_tokens"]) + 1
    plain = {**spec["added_tokens"][0], "special": False}
    spec["added_tokens"] += [{**plain, "id": n + i, "content": " " * k, "normalized": k % 2 == 0}
                             for i, k in enumerate(n for n in range(24, 1, -1) if n != 4)]
    spec["added_tokens"].append({**plain, "id": n + 22, "content": "<x>", "normalized": True})
    return {**spec, "normalizer": {"type": "NFC"}}


def gpt1_spec() -> dict:
    """GPT-1: BERT's cleaning and words, and </w> at the end of words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    t = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.BPEDecoder(suffix="</w>")
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False,
                                                      end_of_word_suffix="</w>"))
    return json.loads(t.to_str())


def unigram_spec(kind: str) -> dict:
    """T5 and XLM-R: SentencePiece's map of characters, words at blanks, then the most probable pieces."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    data = sentencepiece_model("unigram", normalization_rule_name="nmt_nfkc", byte_fallback=kind == "unigram bytes")
    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.vocab_size())]
    charsmap = dict((n, v) for n, v, _ in proto_fields(dict((n, v) for n, v, _ in proto_fields(data))[3]))[2]
    t = Tokenizer(models.Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=kind == "unigram bytes"))
    block = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "unigram first" else "always")
    clean = normalizers.Precompiled(charsmap)
    if kind == "unigram first":
        clean = normalizers.Sequence([clean, normalizers.Strip(left=False), normalizers.Lowercase(), normalizers.NFD(),
                                      normalizers.StripAccents()])
    t.normalizer, t.decoder = clean, decoders.Metaspace()
    t.pre_tokenizer = block if kind == "unigram first" else pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), block])
    return json.loads(t.to_str())


def normalized_words_spec() -> dict:
    """LLaMA fine-tunes whose added words are normalised like text: found only behind a space or at the beginning."""
    spec = json.loads(trained("llama").to_str())
    n = max(t["id"] for t in spec["added_tokens"]) + 1
    word = {**spec["added_tokens"][-1], "single_word": False, "normalized": True, "special": False}
    spec["added_tokens"] += [{**word, "id": n, "content": "<x>"}, {**word, "id": n + 1, "content": "two w"}]
    return spec


SPECS = {**{kind: (lambda kind=kind: byte_spec(kind)) for kind in BYTE_KINDS}, "neox": neox_spec, "gpt-1": gpt1_spec,
         **{kind: (lambda kind=kind: unigram_spec(kind)) for kind in ("unigram", "unigram bytes", "unigram first")},
         "normalized words": normalized_words_spec}
OWN = [*SAMPLES, "  <x>", " <x>\n", "<x> a<x> <x>  <x>b two words two w",
       "\uff21\u0301\u0302\u0303 x", "Caf\u00e9 \ufb01 \uff21\u2460 \u0410\u0301", "\u0000\u0007x\ufffdy \u2028z"]


@pytest.fixture(scope="module", params=SPECS)
def pair(request, tmp_path_factory):
    """(ours, the original, its kind)."""
    from tokenizers import Tokenizer
    folder, spec = tmp_path_factory.mktemp("json"), SPECS[request.param]()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    theirs = Tokenizer.from_str(json.dumps(spec))
    theirs.encode_special_tokens = True
    return tk.load_tokenizer(folder), theirs, request.param


def test_ids_equal_the_original(pair):
    ours, theirs, _ = pair
    for text in OWN:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@given(text=st.one_of(texts, st.lists(st.sampled_from(OWN), max_size=3).map("".join)))
def test_any_text(text, pair):
    ours, theirs, kind = pair
    if kind != "normalized words":
        text = text.replace("<unk>", "")                  # they read a typed <unk> as the unknown token; a name, to us
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_decode_equals_the_original(pair):
    ours, theirs, kind = pair
    for text in OWN:
        ids = ours.encode(text)
        expected = theirs.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == expected or "unk" in expected, repr(text)
        if kind in BYTE_KINDS:
            assert ours.decode(ids) == text


def test_gpt_1_in_its_own_files(tmp_path):
    """vocab.json and merges.txt, told apart from GPT-2's by the settings beside them."""
    from tokenizers import Tokenizer
    spec = gpt1_spec()
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in spec["model"]["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openai-gpt"}), encoding="utf-8")
    ours, theirs = tk.load_tokenizer(tmp_path), Tokenizer.from_str(json.dumps(spec))
    for text in OWN:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
    assert ours.decode(ours.encode("Hello  World!")) == "hello world !" and ours.specials == {"<unk>": 0}


def test_a_word_splitter_of_another_behavior_keeps_the_text():
    """The worked examples of `Splitting`, and each behaviour as the package has it."""
    from tokenizers import Regex, pre_tokenizers
    assert splits.Splitting("-")("a--b") == ["a", "-", "-", "b"]
    names = {"Isolated": "isolated", "Removed": "removed", "MergedWithPrevious": "merged_with_previous",
             "MergedWithNext": "merged_with_next", "Contiguous": "contiguous"}
    for behavior, theirs in names.items():
        for invert in (False, True):
            for text in ("a--b", "--", "-a-", "", "abc", "a-b--c---"):
                expected = pre_tokenizers.Split(Regex("-"), theirs, invert).pre_tokenize_str(text)
                pieces = splits.Splitting("-", behavior, invert)(text)
                assert pieces == [piece for piece, _ in expected], (behavior, invert, text)


@pytest.mark.parametrize("change, says", [
    ({"normalizer": {"type": "Nmt"}}, "Nmt"), ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "UnicodeScripts"),
    ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}, "no regular expression"),
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"), ({"model": {"type": "WordLevel"}}, "WordLevel"),
    ({"model": {"type": "BPE", "vocab": {"a": None}, "merges": []}}, "'a' with id None"),
    ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "'a' with id -1"),
    ({"model": {"type": "BPE", "vocab": ["a"], "merges": []}}, "damaged"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "damaged: KeyError 'merges'"), ({"model": 3}, "no tokenizer.json"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [None]}}, "damaged"),
    ({"added_tokens": [{"id": 1}]}, "damaged"),
    ({"added_tokens": [{"id": "1", "content": "x"}]}, "no text or no id"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "##"}}, "continuing"),
    ({"model": {"type": "Unigram", "vocab": [[None, 0.0]]}}, "None with id 0"),
    ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}, "normalizer":
      {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff\xff\xff\x7f1234").decode()}}, "claims"),
    ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}, "pre_tokenizer":
      {"type": "Metaspace", "replacement": "_"}}, "'_' for a space")])
def test_damaged_or_unknown_parts_are_named(change, says, tmp_path):
    spec = json.loads(trained("gpt2").to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match=says):
        tk.load_tokenizer(tmp_path)


def test_a_regex_that_would_never_end_is_stopped(tmp_path, monkeypatch):
    """A pattern comes from a file. This one tries every way to cut a row of letters in two, and those again."""
    bomb = splits.Splitting(r"(x+x+)+y")
    with pytest.raises(UserError, match="takes too long"):
        monkeypatch.setattr(splits, "PATIENCE", 0.2)
        bomb("x" * 3000)


@pytest.mark.parametrize("kind", ["bloom", "unigram", "gpt-1"])
@given(data=st.data())
def test_files_with_one_place_damaged_are_read_or_refused(kind, data, tmp_path_factory):
    """Any value replaced by something else: an error for the user or a tokenizer that works, no other exception."""
    spec = SPECS[kind]() if kind not in CACHE else json.loads(CACHE[kind])
    CACHE.setdefault(kind, json.dumps(spec))
    at, key = spec, None
    while isinstance(at, (dict, list)) and at and (key is None or data.draw(st.integers(0, 3))):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        owner, key = at, data.draw(st.sampled_from(keys[:40]))
        at = at[key]
    owner[key] = data.draw(st.sampled_from([None, -1, 0, 10**12, "", "x", "\udc00", [], {}, [[]], True, 1.5,
                                            {"type": "Sequence"}]))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    try:
        ours = tk.load_tokenizer(folder)
        ours.decode(ours.encode("Hello \u4f60\u597d 12"))
    except UserError:
        pass


CACHE: dict[str, str] = {}
