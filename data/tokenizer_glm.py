"""ChatGLM's tokenizers. All end in SentencePiece; what is their own are the names of special tokens and blanks.

    ChatGLM-6B      ice_text.model: newline -> <n>, tab -> <|tab|>, 2 to 80 blanks -> <|blank_k|>. A prompt ends with
                    [gMASK] <sop>, an answer with <eop>. In its first release 20000 ids for images stand in front of
                    all others (vocabulary 150528); later there are none (130528), and the file carries the additions.
    ChatGLM2, 3     tokenizer.model (SentencePiece); special tokens follow its last id. A text begins with [gMASK] sop.
    GLM-4           tokenizer.model (tiktoken ranks); likewise, with <sop>.

`encode` gives the ids of the text alone; the prefix belongs to the prompt, which `render` makes (data/chat_formats.py).
"""
import json
import re
import struct
from pathlib import Path

from common import UserError
from data.tokenizer import BLOCK, SentencePiece, Tokenizer
from data.tokenizer_files import build, collect, proto_fields, read_settings

IMAGES = 20000
ICE_SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
ICE_BLANKS = ["<|tab|>"] + [f"<|blank_{k}|>" for k in range(2, 81)]
ICE_NAMES = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{k}|>": " " * k for k in range(2, 81)}
GLM_SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>",
                "<|observation|>"]
GLM4_SPECIALS = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
                 "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
                 "<|end_of_video|>"]


class IceText(SentencePiece):
    """ChatGLM-6B's text tokenizer; `images` is added to each of SentencePiece's ids."""
    def __init__(self, data: bytes, images: int):
        super().__init__(data)
        self.images, self.prefix = images, True
        self.vocab = {piece: i + images for piece, i in self.vocab.items()}

    def encode(self, text: str, start: bool = True) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,80}", lambda m: f"<|blank_{len(m.group())}|>", text)
        # Behind a <n> no space is put in front; it and the space before it are taken off again, as the original does.
        ids = self.sp.encode(text) if start else self.sp.encode("<n>" + text)[2:]
        return [i + self.images for i in ids]

    def token_bytes(self, token: str) -> bytes:
        if token in ICE_NAMES:
            return ICE_NAMES[token].encode()
        i = self.vocab[token] - self.images
        if self.sp.is_byte(i):
            return bytes([int(token[3:5], 16)])
        return b"" if self.sp.is_control(i) else token.replace(BLOCK, " ").encode("utf-8")


def complete_ice_text(data: bytes) -> tuple[bytes, bool]:
    """The file with its special tokens, blanks and bytes; and whether it had them (the later release). A field that is
    appended to a protobuf adds a piece (1: text, score, type) or overrides (2: trainer_spec, its 35: byte_fallback)."""
    def piece(text: str, kind: int) -> bytes:
        raw = b"\x0a" + varint(len(text.encode())) + text.encode() + b"\x15" + struct.pack("<f", 0)
        raw += b"\x18" + bytes([kind])
        return b"\x0a" + varint(len(raw)) + raw

    kept, names, later = [], set(ICE_SPECIALS + ICE_BLANKS), False
    for number, raw, whole in proto_fields(data):
        if number == 1:
            text = next((value for n, value, _ in proto_fields(raw) if n == 1), b"").decode("utf-8", "replace")
            # Dropped and added anew: whatever their type there, nobody shall type "[gMASK]".
            if text in names or re.fullmatch("<0x[0-9A-F]{2}>", text):
                later = True
                continue
        kept.append(whole)
    added = [piece(t, 3) for t in ICE_SPECIALS] + [piece(t, 4) for t in ICE_BLANKS]
    added += [piece(f"<0x{b:02X}>", 6) for b in range(256)]
    return b"".join(kept + added) + b"\x12\x03\x98\x02\x01", later


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def from_ice_text(path: Path, data: bytes) -> Tokenizer:
    settings = read_settings(path.parent)
    try:
        whole, later = complete_ice_text(data)
        core = IceText(whole, image_tokens(path.parent, later))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is no SentencePiece model: {error}") from None
    sp, shift = core.sp, core.images
    added = [{"content": sp.id_to_piece(i), "id": i + shift, "special": True} for i in range(sp.vocab_size())
             if sp.is_control(i)]
    eop = core.vocab["<eop>"]
    settings |= {"names": {}, "eos": [], "template": settings["template"] or "chatglm"}
    return build(core, added, settings, eos=[eop], pad=core.vocab.get("<pad>"), add_bos=False, space_after=True,
                 vocab_size=130528 + shift, files=collect(path))


def image_tokens(folder: Path, later: bool) -> int:
    """How many ids of images stand in front: what the settings say, else what the size of the model tells."""
    def read(name: str) -> dict:
        file = folder / name
        raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return raw if isinstance(raw, dict) else {}

    said = read("tokenizer_config.json").get("num_image_tokens")
    if said is None and (size := read("config.json").get("vocab_size")):
        said = IMAGES if size >= 150528 else 0
    if said is None:
        said = 0 if later else IMAGES
    if not isinstance(said, int) or not 0 <= said <= 10**6:
        raise UserError(f"{folder / 'tokenizer_config.json'}: num_image_tokens is {said!r}")
    return said


def is_chatglm(folder: Path) -> bool:
    """Whether the tokenizer.model in this folder is ChatGLM's: the file itself does not tell."""
    for name, key, values in (("tokenizer_config.json", "tokenizer_class", ("ChatGLMTokenizer", "ChatGLM4Tokenizer")),
                              ("config.json", "model_type", ("chatglm",))):
        file = folder / name
        try:
            if file.exists() and json.loads(file.read_text(encoding="utf-8")).get(key) in values:
                return True
        except (ValueError, AttributeError):
            pass                                          # read_settings tells what is wrong with it
    return False


def from_chatglm(path: Path, data: bytes) -> Tokenizer:
    """ChatGLM2 and 3. ChatGLM2 has the first five special tokens, ChatGLM3 nine, at the same places."""
    settings = read_settings(path.parent)
    core = SentencePiece(data)
    n = core.sp.vocab_size()
    specials = {t: n + i for i, t in enumerate(GLM_SPECIALS)}
    controls = [{"content": core.sp.id_to_piece(i), "id": i, "special": True} for i in range(n)
                if core.sp.is_control(i)]
    third = settings["template"] or any(t["content"] == "<|user|>" for t in settings["added"]) or \
        "chatglm3" in settings["name"]
    settings |= {"names": {}, "eos": [], "template": "chatglm3" if third else "chatglm2"}
    eos, pad = core.sp.eos_id(), core.sp.unk_id()
    stops = [eos, specials["<|user|>"], specials["<|observation|>"]] if third else [eos]
    return build(core, controls + [{"content": t, "id": i, "special": True} for t, i in specials.items()], settings,
                 eos=stops, pad=pad, add_bos=False, space_after=core.prefix, vocab_size=65024 if n == 64789 else n + 9,
                 files=collect(path))
