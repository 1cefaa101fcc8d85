"""The files that tokenizers come in -> data/tokenizer.py's Tokenizer, and back to files that other tools read.

    tokenizer.json          what the tokenizers package writes (data/tokenizer_json.py)
    tokenizer.model         SentencePiece (a protobuf), or tiktoken ranks (Llama 3: one "base64 rank" per line)
    *.tiktoken              tiktoken ranks (Qwen)
    *.gguf                  the tokenizer inside the weights (data/tokenizer_gguf.py)
    tok*.bin                llama2.c
    encoder.json vocab.bpe  GPT-2's first release, and vocab.json merges.txt (OPT, GPT-1)
    ice_text.model          ChatGLM-6B; ChatGLM2 and 3 have a tokenizer.model (data/tokenizer_glm.py)
    tekken.json             Mistral; World vocabulary (.txt), CPM and PanGu: data/tokenizer_makers.py

Ids must be the original's to the last one: a model that reads other ids than it learned writes nonsense without any
error. So whatever a file asks for that is not known here is an error that names it.
"""
import base64
import json
import re
import struct
from pathlib import Path

import regex

from common import UserError
from data.tokenizer import (
    BLOCK,
    BYTE_TO_CHAR,
    GPT2,
    LLAMA3,
    QWEN2,
    ByteBPE,
    CharBPE,
    SentencePiece,
    Tokenizer,
    merge_pairs,
)

# These names steer the model, even where a file lists them as ordinary words.
STEERING = re.compile("<[|\uff5c].+[|\uff5c]>|<(start|end)_of_turn>")
# These as well (Gemma, InternLM, MOSS, Baichuan), and files list them among the pieces of words.
ROLES = re.compile(r"<(start|end)_of_turn>|<eo[ahm]>|<reserved_\d+>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>")


NOT_READ = {".pkl": "a Python pickle could run any code: write nanoGPT's or nanochat's vocabulary as tokenizer.json"}


def from_file(path: Path) -> Tokenizer | None:
    """The tokenizer, and one trial: what is damaged shows here, not in the middle of a training."""
    try:
        tokenizer = read_file(path)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("Hello, world 12\n\u4f60\u597d e\u0301 <0x41>", special=True))
        return tokenizer
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None


def read_file(path: Path) -> Tokenizer | None:
    """By the name of the file; which tokenizer is in a .model file, its content and the settings beside it tell."""
    from data import tokenizer_gguf, tokenizer_json, tokenizer_makers  # they build on what stands below
    if path.suffix == ".gguf":
        return tokenizer_gguf.from_gguf(path)
    if path.name == "tekken.json":
        return tokenizer_makers.from_tekken(path)
    if path.suffix == ".json":
        named = path.name in ("encoder.json", "vocab.json")
        return from_gpt2_files(path) if named else tokenizer_json.from_tokenizer_json(path)
    if path.suffix == ".txt":
        return tokenizer_makers.from_rwkv(path) if "rwkv" in path.name else tokenizer_makers.from_cpm_ant(path)
    if path.suffix in (".tiktoken", ".model") or re.search(r"\.model\.v\d+\w*$", path.name):
        return from_model(path, path.read_bytes())
    if path.suffix == ".bin" and path.name.startswith("tok"):
        return from_llama2c(path.read_bytes())
    raise UserError(f"{path} is no tokenizer that is known: " + NOT_READ.get(
        path.suffix, "tokenizer.json, tokenizer.model, *.tiktoken, tekken.json, encoder.json, tok*.bin or *.gguf"))


def from_model(path: Path, data: bytes) -> Tokenizer:
    from data import tokenizer_glm, tokenizer_makers
    if is_ranks(data):
        return from_ranks(path, data)
    if path.name == "ice_text.model":
        return tokenizer_glm.from_ice_text(path, data)
    try:
        core = SentencePiece(data)
    except RuntimeError as error:
        raise UserError(f"{path} is no SentencePiece model and no list of tiktoken ranks: {error}") from None
    if tokenizer_glm.is_chatglm(path.parent):
        return tokenizer_glm.from_chatglm(path, data)
    if "\u2582" in core.vocab and "\u2583" in core.vocab and ("<eot>" in core.vocab or "<eod>" in core.vocab):
        return tokenizer_makers.from_chinese_words(path, data)
    return from_sentencepiece(path, core)


def proto_fields(data: bytes):
    """The fields of a protobuf message: (number, content, the whole field as it stands). Numbers come as b""."""
    at = 0
    while at < len(data):
        start, (key, at) = at, read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            size, at = 0, read_varint(data, at)[1]
        elif kind == 2:
            size, at = read_varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {start}")
        if at + size > len(data):
            raise ValueError(f"field {number} at byte {start} claims {size} bytes of {len(data)}")
        yield number, data[at:at + size], data[start:at + size]
        at += size


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, the lowest first -> (it, the place behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError(f"truncated at byte {at}")
        value, at = value | (data[at] & 127) << shift, at + 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError(f"a number of more than ten bytes at byte {at - 10}")


def read_settings(folder: Path) -> dict:
    """What stands beside a tokenizer: names of special tokens, stop tokens (ids or names), added tokens, the chat
    template, add_bos."""
    def read(name: str) -> dict:
        file = folder / name
        try:
            raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is no JSON: {error}") from None
        if not isinstance(raw, dict):
            raise UserError(f"{file} is no JSON object but a {type(raw).__name__}")
        return raw

    config, special_map, generation, model, old = (read(f"{n}.json") for n in (
        "tokenizer_config", "special_tokens_map", "generation_config", "config", "added_tokens"))
    names = {**special_map, **{k: v for k, v in config.items() if v is not None}}
    names = {k.removesuffix("_token"): v["content"] if isinstance(v, dict) else v for k, v in names.items()
             if k in ("bos_token", "eos_token", "pad_token", "unk_token") and v}
    eos: list = [names["eos"]] if "eos" in names else []
    for source in (generation, model):
        if (stop := source.get("eos_token_id")) is not None:
            eos += stop if isinstance(stop, list) else [stop]
            break                                         # generation_config knows better than config
    template = config.get("chat_template")
    if isinstance(template, list):                        # several named ones: {"name": "default", "template": ...}
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    added = [{"content": t, "id": i, "special": True} for t, i in old.items()]
    added += [{**t, "id": int(i)} for i, t in (config.get("added_tokens_decoder") or {}).items()]
    if not all(isinstance(t.get("content"), str) and isinstance(t["id"], int) for t in added):
        raise UserError(f"{folder}: an added token without text or id in tokenizer_config.json or added_tokens.json")
    extra = config.get("extra_ids", 100 if config.get("tokenizer_class") in ("T5Tokenizer", "T5TokenizerFast") else 0)
    name = f"{config.get('name_or_path')} {model.get('_name_or_path')} {folder.name}".lower()
    return {"names": names, "eos": eos, "template": template, "added": added, "add_bos": config.get("add_bos_token"),
            "extra_ids": extra if isinstance(extra, int) and 0 <= extra <= 10_000 else 0, "name": name,
            "class": config.get("tokenizer_class"), "model_type": model.get("model_type")}


def build(core, added: list[dict], settings: dict, *, bos: int | None = None, eos: tuple | list = (),
          pad: int | None = None, **more) -> Tokenizer:
    """A tokenizer from its core, its named tokens and what the settings say; bos, eos and pad are what the file itself
    says where there are no settings."""
    def is_special(t: dict) -> bool:
        return bool(t.get("special")) or bool(STEERING.fullmatch(t["content"]))

    specials, words = ({t["content"]: t["id"] for t in added if is_special(t) == kind} for kind in (True, False))
    if not isinstance(core, ByteBPE):
        specials |= {t: i for t, i in core.vocab.items() if t[:1] == "<" and t not in specials and ROLES.fullmatch(t)}
        words = {t: i for t, i in words.items() if t not in specials}
    shapes = {}
    for t in added:
        edge = (r"(?<!\w)", r"(?!\w)") if t.get("single_word") else ("", "")
        left, right = (r"\s*" if t.get("lstrip") else "") + edge[0], edge[1] + (r"\s*" if t.get("rstrip") else "")
        if left or right:
            shapes[t["content"]] = left + regex.escape(t["content"]) + right
    known, names, template = core.vocab | words | specials, settings["names"], settings["template"]
    stops = [s if isinstance(s, int) else known.get(s) for s in settings["eos"]]
    stops = [s for s in stops if s is not None] or list(eos)
    if template:                                          # a model that was taught to chat also stops after its turn
        stops += [specials[t] for t in TURN_ENDS if t in specials and (t in template or t == "<|end_of_text|>")]
    if isinstance(core, SentencePiece):
        core.hide(specials)
    for t in specials:                                    # what steers the model can only be asked for by name
        core.vocab.pop(t, None)
    second = {t["content"] for t in added if t.get("normalized") and not is_special(t)}
    tokenizer = Tokenizer(core, specials, words=words, shapes=shapes, second=second,
                          bos_id=known.get(names.get("bos"), bos), eos_ids=stops,
                          pad_id=known.get(names.get("pad"), pad), chat_template=template, **more)
    tokenizer.origin = settings["name"]
    return tokenizer


TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "encoder.json",
                   "vocab.bpe")


def collect(path: Path) -> dict[str, bytes]:
    """The files that export writes out again, as they were."""
    there = [path.parent / name for name in TOKENIZER_FILES]
    return {file.name: file.read_bytes() for file in [*there, path] if file.exists()}


def from_sentencepiece(path: Path, core: SentencePiece) -> Tokenizer:
    settings, sp = read_settings(path.parent), core.sp
    controls = [{"content": sp.id_to_piece(i), "id": i, "special": True} for i in range(sp.vocab_size())
                if sp.is_control(i)]
    if settings["extra_ids"]:                             # T5's <extra_id_0> is the last one
        n, known = settings["extra_ids"], {t["content"] for t in settings["added"]} | core.vocab.keys()
        extra = [f"<extra_id_{n - 1 - i}>" for i in range(n)]
        controls += [{"content": t, "id": sp.vocab_size() + i, "special": True} for i, t in enumerate(extra)
                     if t not in known]
    added = controls + [t for t in settings["added"] if t["id"] >= sp.vocab_size() or t.get("special")]
    bos, eos, pad, unk = (i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id(), sp.pad_id(), sp.unk_id()))
    return build(core, added, settings, bos=bos, eos=[] if eos is None else [eos], pad=unk if pad is None else pad,
                 files=lambda t: sentencepiece_as_json(t) | collect(path), add_bos=settings["add_bos"],
                 space_after=core.prefix)


def sentencepiece_as_json(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The file once more as tokenizer.json (transformers reads .model only beside another package), if that is exact:
    not where the file normalises, not for unigram, whose scores are no whole numbers, nor with the user's own symbols,
    whose score is 0, as only that of the first merge should be."""
    core, sp = tokenizer.core, tokenizer.core.sp
    tokens, scores = ([f(i) for i in range(sp.vocab_size())] for f in (sp.id_to_piece, sp.get_score))
    types = [3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 6 if sp.is_byte(i) else 1
             for i in range(sp.vocab_size())]
    probe = "\uff21\uff42 ff  x\n\t " + "".join(tokens[::7]).replace(BLOCK, " ")
    twin, merges, _ = scored(tokens, scores, types, sp.unk_id(), core.prefix)
    plain = [score for score, kind in zip(scores, types) if kind == 1]
    if any(score % 1 for score in plain) or plain.count(0) > 1 or twin.encode(probe) != sp.encode(probe):
        return {}
    return json_files(tokenizer, merges(), twin)


def is_ranks(data: bytes) -> bool:
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data[:200] + b"\n") is not None


def from_ranks(path: Path, data: bytes) -> Tokenizer:
    """tiktoken's format. The rank of a merge is the id of its result; special tokens follow the last rank."""
    try:
        pairs = [line.split() for line in data.splitlines() if line]
        vocab = {"".join(BYTE_TO_CHAR[b] for b in base64.b64decode(token)): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise UserError(f"{path}: a line that is not \"base64 rank\": {error}") from None
    n, settings = max(vocab.values()) + 1, read_settings(path.parent)
    kind = "qwen" if path.suffix == ".tiktoken" else "llama3"
    if n == 151329 or settings["class"] == "ChatGLM4Tokenizer" or settings["model_type"] == "chatglm":
        kind = "glm4"
    elif kind == "qwen" and "qwen" not in path.name:
        raise UserError(f"{path}: these ranks do not tell how words are split; only Qwen's are known: qwen.tiktoken")
    names, bos, eos, pad = rank_specials(kind, n)
    core = ByteBPE(vocab, lambda a, b: vocab.get(a + b), [QWEN2 if kind == "qwen" else LLAMA3], nfc=kind == "qwen",
                   ignore_merges=True)
    known = {t["content"] for t in settings["added"]}
    added = [{"content": t, "id": n + i, "special": True} for i, t in enumerate(names) if t not in known]
    settings["template"] = settings["template"] or {"qwen": "chatml"}.get(kind, kind)
    return build(core, added + [t for t in settings["added"] if t["id"] >= n], settings, bos=bos, eos=eos, pad=pad,
                 add_bos=False if kind == "glm4" else None,
                 files=lambda t: json_files(t, ranked_merges(vocab)) | collect(path))


def rank_specials(kind: str, n: int) -> tuple[list[str], int | None, list[int], int]:
    """Names of special tokens from id n on, bos, eos, pad."""
    if kind == "qwen":
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]
        return names, None, [n + 2, n], n
    if kind == "glm4":
        from data.tokenizer_glm import GLM4_SPECIALS
        return GLM4_SPECIALS, None, [n, n + 7, n + 9], n
    reserved = "<|reserved_special_token_{}|>".format
    names = ["<|begin_of_text|>", "<|end_of_text|>", reserved(0), reserved(1), "<|finetune_right_pad_id|>",
             reserved(2), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    names += [reserved(i) for i in range(3, 3 + 256 - len(names))]
    return names, n, [n + 1, n + 9, n + 8], n + 4


def ranked_merges(vocab: dict[str, int]) -> list[list[str]]:
    """A token is made of the two parts that are left when merging stops in front of it."""
    def parts(token: str, own: int) -> list[str]:
        return merge_pairs(list(token), lambda a, b: r if (r := vocab.get(a + b, own)) < own else None)
    made = (parts(t, i) for t, i in sorted(vocab.items(), key=lambda item: item[1]))
    return [p for p in made if len(p) == 2]               # single bytes are not made


def from_gpt2_files(path: Path) -> Tokenizer:
    """encoder.json / vocab.json with its list of merges: GPT-2, OPT."""
    vocab, settings = json.loads(path.read_text(encoding="utf-8")), read_settings(path.parent)
    merges_file = path.with_name("vocab.bpe" if path.name == "encoder.json" else "merges.txt")
    if not merges_file.exists():
        raise UserError(f"{path} needs {merges_file.name} beside it")
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
    if settings["model_type"] == "openai-gpt" or settings["class"] in ("OpenAIGPTTokenizer", "OpenAIGPTTokenizerFast"):
        from data.tokenizer_json import openai_gpt
        added = [{"content": "<unk>", "id": vocab["<unk>"], "special": True}] if "<unk>" in vocab else []
        return build(openai_gpt(vocab, lambda a, b: ranks.get((a, b))), added + settings["added"], settings,
                     add_bos=False, files=collect(path))
    names = ["<|endoftext|>", *settings["names"].values()]
    added = [{"content": t, "id": vocab[t], "special": True} for t in names if t in vocab] + settings["added"]
    return build(ByteBPE(vocab, lambda a, b: ranks.get((a, b)), [GPT2]), added, settings,
                 eos=[vocab[t] for t in names[:1] if t in vocab], add_bos=bool(settings["add_bos"]),
                 files=lambda t: json_files(t, list(ranks)) | collect(path))


def from_llama2c(data: bytes) -> Tokenizer:
    """llama2.c: longest length, then (score, length, bytes) per token; ids 0 unk, 1 bos, 2 eos, 3.. the 256 bytes."""
    at, tokens, scores = 4, [], []
    while at < len(data):
        if at + 8 > len(data):
            raise UserError(f"llama2.c tokenizer: truncated at byte {at} of {len(data)}")
        score, n = struct.unpack_from("<fi", data, at)
        if not 0 <= n <= len(data) - at - 8:
            raise UserError(f"llama2.c tokenizer: token {len(tokens)} claims {n} bytes at byte {at} of {len(data)}")
        tokens.append(data[at + 8:at + 8 + n].decode("utf-8", "replace").replace(" ", BLOCK))
        scores.append(score)
        at += 8 + n
    if len(tokens) < 259:
        raise UserError(f"llama2.c tokenizer: {len(tokens)} tokens, expected 3 special ones, 256 bytes and more")
    tokens[:259] = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]     # it wraps some in newlines
    core, merges, vocab = scored(tokens, scores, [2, 3, 3] + [6] * 256 + [1] * len(tokens[259:]), 0, True)
    return build(core, [{"content": t, "id": vocab[t], "special": True} for t in ("<s>", "</s>")], NO_SETTINGS, bos=1,
                 eos=[1, 2], pad=0, space_after=True, vocab_size=len(tokens),
                 files=lambda t: json_files(t, merges()))


def scored(tokens: list[str], scores: list[float], types: list[int], unk_id: int, prefix: bool):
    """SentencePiece's BPE from scores -> its core, the same as merges (made when called), its vocabulary. Only ordinary
    tokens (type 1) come from merging: whoever types "<s>" or "<0x0A>" has typed letters."""
    vocab = {t: i for i, t in enumerate(tokens)}
    score = {t: scores[i] for t, i in vocab.items() if types[i:i + 1] in ([], [1])}

    def merges() -> list[tuple[str, str]]:
        pairs = [(t[:k], t[k:]) for t in score for k in range(1, len(t)) if t[:k] in score and t[k:] in score]
        return sorted(pairs, key=lambda p: (-score[p[0] + p[1]], vocab[p[0]], vocab[p[1]]))

    def rank(a: str, b: str) -> float | None:
        return -score[a + b] if a + b in score else None

    return CharBPE(vocab, rank, unk_id, prefix), merges, dict(vocab)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLOCK}
PREPEND = {"type": "Prepend", "prepend": BLOCK}
NO_SETTINGS = {"names": {}, "eos": [], "template": None, "added": [], "add_bos": None, "extra_ids": 0,
               "name": "", "class": None, "model_type": None}


# ---------------------------------------------------------------- what other tools read

def json_files(tokenizer: Tokenizer, merges: list, core: ByteBPE | CharBPE | None = None) -> dict[str, bytes]:
    """tokenizer.json and its settings for a tokenizer that came in another kind of file."""
    core, vocab = core or tokenizer.core, {t: i for i, t in sorted(tokenizer.token_of.items())}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": t, **flags, "special": t in tokenizer.specials}
             for t, i in sorted(tokenizer.named.items(), key=lambda item: item[1])]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": [list(m) for m in merges]}
    if isinstance(core, ByteBPE):
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        steps = [level if s is None else {"type": "Split", "pattern": {"Regex": s.pattern}, "behavior": s.behavior,
                                          "invert": s.invert} for s in core.splits]
        steps += [] if level in steps else [level]
        pre, normalizer = {"type": "Sequence", "pretokenizers": steps}, {"type": "NFC"} if core.nfc else None
        model["ignore_merges"], decoder = core.ignore_merges, level
    else:
        model |= {"unk_token": tokenizer.token_of[core.unk_id], "fuse_unk": True, "byte_fallback": True}
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if core.prefix else []
        pre, normalizer = None, {"type": "Sequence", "normalizers": [PREPEND, REPLACE] if core.prefix else [REPLACE]}
        decoder = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": BLOCK}, "content": " "},
                                                    {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
             "pad": tokenizer.pad_id}
    named = {f"{k}_token": tokenizer.token_of[i] for k, i in names.items() if i is not None}
    named |= {"unk_token": model["unk_token"]} if model["unk_token"] else {}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre, "post_processor": bos_in_front(tokenizer), "decoder": decoder, "model": model}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "add_bos_token": tokenizer.add_bos, **named}
    files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(),
             "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode()}
    template = tokenizer.chat_template or ""              # a format chosen by name is for checkpoints/export.py
    return files | ({"chat_template.jinja": template.encode()} if "{" in template else {})


def bos_in_front(tokenizer: Tokenizer) -> dict | None:
    """The post-processor that other tools need to put BOS in front."""
    if not tokenizer.add_bos:
        return None
    name = tokenizer.token_of[tokenizer.bos_id]
    bos, a, b = {"SpecialToken": {"id": name, "type_id": 0}}, *({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    return {"type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, bos, b],
            "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}}}
