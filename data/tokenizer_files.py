"""The files that tokenizers come in -> data/tokenizer.py's Tokenizer, and back to files that other tools read.

    tokenizer.json          byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) or SentencePiece-like BPE (LLaMA 1/2, Mistral)
    tokenizer.model         SentencePiece (a protobuf), or tiktoken ranks (Llama 3: one "base64 rank" per line)
    *.tiktoken              tiktoken ranks (Qwen)
    *.gguf                  the tokenizer inside the weights: merges, or scores
    tok*.bin                llama2.c
    encoder.json vocab.bpe  GPT-2's first release, and vocab.json merges.txt (OPT)

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
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>")


def from_file(path: Path) -> Tokenizer | None:
    if path.suffix == ".gguf":
        from data.tokenizer_gguf import from_gguf  # not at the top: it builds on what stands below
        return from_gguf(path)
    if path.suffix == ".json":
        from data.tokenizer_json import from_tokenizer_json
        return from_gpt2_files(path) if path.name in ("encoder.json", "vocab.json") else from_tokenizer_json(path)
    if path.suffix in (".tiktoken", ".model"):
        data = path.read_bytes()
        return from_ranks(path, data) if is_ranks(data) else from_sentencepiece(path, data)
    if path.suffix == ".bin" and path.name.startswith("tok"):
        return from_llama2c(path.read_bytes())
    raise UserError(f"{path} is no tokenizer that is known: tokenizer.json, tokenizer.model, *.tiktoken, encoder.json, "
                    "tok*.bin or *.gguf")


def read_settings(folder: Path) -> dict:
    """What stands beside a tokenizer: names of special tokens, stop tokens (ids or names), added tokens, the chat
    template, add_bos."""
    def read(name: str) -> dict:
        file = folder / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file} is no JSON: {error}") from None

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
    return {"names": names, "eos": eos, "template": template, "added": added, "add_bos": config.get("add_bos_token")}


def build(core, added: list[dict], settings: dict, *, bos: int | None = None, eos: tuple | list = (),
          pad: int | None = None, **more) -> Tokenizer:
    """A tokenizer from its core, its named tokens and what the settings say; bos, eos and pad are what the file itself
    says where there are no settings."""
    def is_special(t: dict) -> bool:
        return bool(t.get("special")) or bool(STEERING.fullmatch(t["content"]))

    specials, words = ({t["content"]: t["id"] for t in added if is_special(t) == kind} for kind in (True, False))
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
    for t in specials:                                    # what steers the model can only be asked for by name
        core.vocab.pop(t, None)
    return Tokenizer(core, specials, words=words, shapes=shapes, bos_id=known.get(names.get("bos"), bos),
                     eos_ids=stops, pad_id=known.get(names.get("pad"), pad), chat_template=template, **more)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe")


def collect(path: Path) -> dict[str, bytes]:
    """The files that export writes out again, as they were."""
    there = [path.parent / name for name in TOKENIZER_FILES]
    return {file.name: file.read_bytes() for file in [*there, path] if file.exists()}


def from_sentencepiece(path: Path, data: bytes) -> Tokenizer:
    settings = read_settings(path.parent)
    try:
        core = SentencePiece(data)
    except RuntimeError as error:
        raise UserError(f"{path} is no SentencePiece model and no list of tiktoken ranks: {error}") from None
    sp = core.sp
    controls = [{"content": sp.id_to_piece(i), "id": i, "special": True} for i in range(sp.vocab_size())
                if sp.is_control(i)]
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
    pairs = (line.split() for line in data.splitlines() if line)
    vocab = {"".join(BYTE_TO_CHAR[b] for b in base64.b64decode(token)): int(rank) for token, rank in pairs}
    n, settings, qwen = len(vocab), read_settings(path.parent), path.suffix == ".tiktoken"
    if qwen:
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]
        bos, eos, pad = None, [n + 2, n], n
    else:                                                 # Llama 3
        reserved = "<|reserved_special_token_{}|>".format
        names = ["<|begin_of_text|>", "<|end_of_text|>", reserved(0), reserved(1), "<|finetune_right_pad_id|>",
                 reserved(2), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
        names += [reserved(i) for i in range(3, 3 + 256 - len(names))]
        bos, eos, pad = n, [n + 1, n + 9, n + 8], n + 4
    core = ByteBPE(vocab, lambda a, b: vocab.get(a + b), [QWEN2 if qwen else LLAMA3], nfc=qwen, ignore_merges=True)

    def merges() -> list[list[str]]:
        """A token is made of the two parts that are left when merging stops in front of it."""
        def parts(token: str, own: int) -> list[str]:
            return merge_pairs(list(token), lambda a, b: r if (r := vocab.get(a + b, own)) < own else None)
        made = (parts(t, i) for t, i in sorted(vocab.items(), key=lambda item: item[1]))
        return [p for p in made if len(p) == 2]           # single bytes are not made

    settings["template"] = settings["template"] or ("chatml" if qwen else "llama3")
    return build(core, [{"content": t, "id": n + i, "special": True} for i, t in enumerate(names)], settings, bos=bos,
                 eos=eos, pad=pad, files=lambda t: json_files(t, merges()) | collect(path))


def from_gpt2_files(path: Path) -> Tokenizer:
    """encoder.json / vocab.json with its list of merges: GPT-2, OPT."""
    vocab, settings = json.loads(path.read_text(encoding="utf-8")), read_settings(path.parent)
    merges_file = path.with_name("vocab.bpe" if path.name == "encoder.json" else "merges.txt")
    if not merges_file.exists():
        raise UserError(f"{path} needs {merges_file.name} beside it")
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
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
NO_SETTINGS = {"names": {}, "eos": [], "template": None, "added": [], "add_bos": None}


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
        splits = [{"type": "Split", "pattern": {"Regex": s.pattern}, "behavior": s.behavior, "invert": s.invert}
                  for s in core.splits]
        pre, normalizer = {"type": "Sequence", "pretokenizers": [*splits, level]}, {"type": "NFC"} if core.nfc else None
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
