"""GGUF files (llama.cpp's format): header, tensor table, and the block formats that store 2 to 8 bits per weight.

    "GGUF" version | n tensors | n pairs | key, type, value ... | name, dims, type, offset ... | padding | tensor data

A quantised tensor is a row of blocks, and each block carries its own scale: 32 or 256 weights w = d * q (+ m). Every
`q*` function below turns blocks (n, bytes per block) into weights (n, weights per block). Nothing in the file is
believed: each length is compared with the bytes that are left before anything is allocated.
"""
import functools
import math
import mmap
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DEEPEST = 4                                # arrays inside arrays; the format allows it, no file does more than one
LONGEST = 1 << 24                          # items of an array; the longest are vocabularies
CHUNK = 1 << 18                            # weights that are unpacked at once: their temporaries stay in the cache


# ---------------------------------------------------------------- header

class Reader:
    """A cursor over the file that never reads past its end."""
    def __init__(self, path: Path):
        self.path, self.at = path, 0
        with open(path, "rb") as file:
            self.size = file.seek(0, 2)
            if self.size < 24:
                raise UserError(f"{path}: {self.size} bytes are too few for a GGUF file")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def fail(self, what: str):
        raise UserError(f"{self.path}: {what}, at byte {self.at} of {self.size}: the file is damaged or incomplete, "
                        "download it again")

    def take(self, code: str):
        n = struct.calcsize("<" + code)
        if self.at + n > self.size:
            self.fail("the file ends in the middle of its header")
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += n
        return value

    def string(self) -> str:
        n = self.take("Q")
        if n > self.size - self.at:
            self.fail(f"a text claims {n} bytes")
        self.at += n
        return self.data[self.at - n:self.at].decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0):
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth > DEEPEST:
            self.fail(f"unknown value type {kind}")
        inner, n = self.take("I"), self.take("Q")
        least = struct.calcsize("<" + SCALARS[inner]) if inner in SCALARS else 8
        if n > LONGEST or n * least > self.size - self.at:
            self.fail(f"an array claims {n} items")
        if inner in SCALARS:
            self.at += n * least
            kind = {"B": "u1", "b": "i1", "?": "u1", "H": "u2", "h": "i2", "I": "u4", "i": "i4", "f": "f4", "Q": "u8",
                    "q": "i8", "d": "f8"}[SCALARS[inner]]
            return np.frombuffer(self.data, "<" + kind, n, self.at - n * least).tolist()
        return [self.value(inner, depth + 1) for _ in range(n)]


@functools.lru_cache(maxsize=16)
def parse(path: Path, size: int, changed: int) -> tuple[dict, dict]:
    r = Reader(path)
    if (magic := r.data[:4]) != b"GGUF":
        r.fail(f"the file begins with {magic!r}, not with GGUF")
    r.at = 4
    version = r.take("I")
    if version not in (2, 3):
        kind = "a big-endian file" if version >> 24 else "a file of August 2023" if version == 1 else "a newer file"
        raise UserError(f"{path}: GGUF version {version} is not supported, only 2 and 3 ({kind}): convert the model "
                        "anew with llama.cpp, for a little-endian machine")
    n_tensors, n_pairs = r.take("Q"), r.take("Q")
    if 24 * n_tensors + 13 * n_pairs > r.size:               # the smallest entry of each table
        r.fail(f"the header claims {n_tensors} tensors and {n_pairs} pairs")
    metadata = {}
    for _ in range(n_pairs):
        key = r.string()
        metadata[key] = r.value(r.take("I"))
    table: dict[str, tuple] = {}
    for _ in range(n_tensors):
        name, n_dims = r.string(), r.take("I")
        if n_dims > 4 or name in table or len(name) > 200:
            what = (f"has {n_dims} dimensions" if n_dims > 4 else "is there twice" if name in table else
                    f"has a name of {len(name)} letters")
            r.fail(f"tensor {name[:60]!r} {what}")
        shape = tuple(r.take("Q") for _ in range(n_dims))[::-1]          # GGUF writes the fastest dimension first
        table[name] = (shape, r.take("I"), r.take("Q"))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or not 0 < align <= 1 << 20:
        r.fail(f"general.alignment is {align!r}")
    return metadata, locate(r, table, -(-r.at // align) * align)


def locate(r: Reader, table: dict[str, tuple], start: int) -> dict[str, tuple]:
    """name -> (shape, kind, first byte, bytes), after checking that each tensor lies in the file and on no other."""
    found, spans = {}, []
    for name, (shape, kind, offset) in table.items():
        if kind not in KINDS:
            known = ", ".join(k.__name__.upper() for _, _, k in KINDS.values())
            raise UserError(f"{r.path}: tensor {name} is stored as type {kind}, which is not supported; known: {known}"
                            ". Get the file in one of these (llama-quantize --allow-requantize makes one)")
        weights, size, _ = KINDS[kind]
        count = math.prod(shape)
        if not count or count % weights or (shape and shape[-1] % weights):
            r.fail(f"tensor {name} {shape} cannot be cut into blocks of {weights}")
        n = count // weights * size
        if start + offset + n > r.size:
            r.fail(f"tensor {name} {shape} needs {n} bytes from byte {start + offset} on")
        found[name] = (shape, kind, start + offset, n)
        spans.append((start + offset, start + offset + n, name))
    spans.sort()
    for (_, end, a), (begin, _, b) in zip(spans, spans[1:]):
        if begin < end:
            r.fail(f"tensors {a} and {b} overlap")
    return found


def read_header(path: str | Path) -> tuple[dict, dict]:
    """(metadata, {tensor name: (shape, type, first byte, bytes)}) of a GGUF file; tensors are not read."""
    path = Path(path)
    stat = path.stat()
    return parse(path, stat.st_size, stat.st_mtime_ns)


def read_model(path: Path) -> tuple[dict, dict[str, tuple[Path, tuple, str]]]:
    """(metadata, {tensor name: (file, shape, type)}) of a model in one file or in NAME-00001-of-00003.gguf ..."""
    metadata, tensors = read_header(path)
    count, files = metadata.get("split.count", 1), [path]
    if not isinstance(count, int) or count > 1:
        m = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
        if m is None or int(m[3]) != count:
            raise UserError(f"{path}: one of {count} parts, but it is not called NAME-00001-of-{count:05}.gguf: give "
                            "it back the name that it had")
        files = [path.with_name(f"{m[1]}-{i + 1:05}-of-{m[3]}.gguf") for i in range(count)]
        if missing := [f.name for f in files if not f.exists()]:
            raise UserError(f"{path}: one of {count} parts; {missing[0]} is missing ({len(missing)} missing): the "
                            "download is incomplete")
        metadata = read_header(files[0])[0]                  # the other parts have the tensors and nothing else
    found: dict[str, tuple] = {}
    for file in files:
        for name, (shape, kind, *_) in read_header(file)[1].items():
            if name in found:
                raise UserError(f"tensor {name} stands in {found[name][0]} and in {file.name}: parts of two models")
            found[name] = file, shape, KINDS[kind][2].__name__.upper()
    return metadata, found


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, dequantised to fp32 (F32, F16 and BF16 come as they are, straight from the mapped file)."""
    shape, kind, start, n = read_header(path)[1][name]
    begin = start - start % mmap.ALLOCATIONGRANULARITY       # a map of this tensor alone; whoever writes gets a copy
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), start + n - begin, access=mmap.ACCESS_COPY, offset=begin)
    raw = torch.frombuffer(data, dtype=torch.uint8, offset=start - begin)
    weights, size, unpack = KINDS[kind]
    if weights == 1:
        return unpack(raw if start % size == 0 else raw.clone()).reshape(shape)
    blocks, step = raw.view(-1, size), CHUNK // weights
    out = torch.empty(len(blocks), weights)
    for i in range(0, len(blocks), step):
        out[i:i + step] = unpack(blocks[i:i + step])
    return out.reshape(shape)


# ---------------------------------------------------------------- block formats: uint8 (n, bytes) -> (n, weights)

def half(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.float16).float()                          # (n, 2 k) bytes -> (n, k)


def nibbles(b: Tensor) -> Tensor:
    """(n, k) bytes -> (n, 2 k): all low halves, then all high halves."""
    return torch.cat((b & 15, b >> 4), dim=-1)


def bits(b: Tensor) -> Tensor:
    """(n, k) bytes -> (n, 8 k) single bits, lowest first."""
    return ((b[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)


def f32(b: Tensor) -> Tensor:
    return b.view(torch.float32)


def f16(b: Tensor) -> Tensor:
    return b.view(torch.float16)


def bf16(b: Tensor) -> Tensor:
    return b.view(torch.bfloat16)


def q4_0(b: Tensor) -> Tensor:             # d | 16 bytes of nibbles
    return half(b[:, :2]) * (nibbles(b[:, 2:]).float() - 8)


def q4_1(b: Tensor) -> Tensor:             # d, m | nibbles
    return half(b[:, :2]) * nibbles(b[:, 4:]).float() + half(b[:, 2:4])


def q5_0(b: Tensor) -> Tensor:             # d | 32 fifth bits | nibbles
    return half(b[:, :2]) * ((nibbles(b[:, 6:]) | bits(b[:, 2:6]) << 4).float() - 16)


def q5_1(b: Tensor) -> Tensor:             # d, m | 32 fifth bits | nibbles
    return half(b[:, :2]) * (nibbles(b[:, 8:]) | bits(b[:, 4:8]) << 4).float() + half(b[:, 2:4])


def q8_0(b: Tensor) -> Tensor:             # d | 32 signed bytes
    return half(b[:, :2]) * b[:, 2:].contiguous().view(torch.int8).float()


def planes(b: Tensor, width: int, steps: int) -> Tensor:
    """(n, k) bytes that hold `steps` layers of `width` bits each -> (n, steps, k): all lowest layers first."""
    shift = torch.arange(steps, dtype=torch.uint8)[:, None] * width
    return (b[:, None] >> shift) & (2 ** width - 1)


def q2_k(b: Tensor) -> Tensor:             # 16 x (scale, min) nibbles | 64 bytes of 2 bits | d, dmin
    scales, d, dmin = b[:, :16], half(b[:, 80:82]), half(b[:, 82:84])
    q = planes(b[:, 16:80].reshape(-1, 32), 2, 4).reshape(-1, 16, 16).float()  # 2 halves x 4 layers x 2 groups of 16
    low, high = d * (scales & 15).float(), dmin * (scales >> 4).float()
    return (low[..., None] * q - high[..., None]).flatten(1)


def q3_k(b: Tensor) -> Tensor:             # 32 bytes of third bits | 64 of 2 bits | 16 6-bit scales in 12 | d
    low, high = nibbles(b[:, 96:104]), planes(b[:, 104:108], 2, 4).flatten(1)  # (n, 16) each
    scales = (low | high << 4).float() - 32
    q = planes(b[:, 32:96].reshape(-1, 32), 2, 4).reshape(-1, 256)
    third = planes(b[:, :32], 1, 8).flatten(1)                                 # 0 means "minus 4"
    q = (q.float() - 4 * (1 - third.float())).view(-1, 16, 16)
    return ((half(b[:, 108:110]) * scales)[..., None] * q).flatten(1)


def k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits: four are whole, the others have their top bits in the first's."""
    a, m, top = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scale = torch.cat((a & 63, (top & 15) | (a >> 6) << 4), dim=1)
    least = torch.cat((m & 63, (top >> 4) | (m >> 6) << 4), dim=1)
    return scale.float(), least.float()


def q4_k(b: Tensor) -> Tensor:             # d, dmin | scales | 128 bytes of nibbles, 32 low then 32 high each
    scale, least = k_scales(b[:, 4:16])
    q = nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).float()
    return ((half(b[:, :2]) * scale)[..., None] * q - (half(b[:, 2:4]) * least)[..., None]).flatten(1)


def q5_k(b: Tensor) -> Tensor:             # as q4_k, and 32 bytes of fifth bits, one layer per group
    scale, least = k_scales(b[:, 4:16])
    q = nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | planes(b[:, 16:48], 1, 8) << 4
    return ((half(b[:, :2]) * scale)[..., None] * q.float() - (half(b[:, 2:4]) * least)[..., None]).flatten(1)


def q6_k(b: Tensor) -> Tensor:             # 128 bytes of 4 bits | 64 of 2 | 16 signed scales | d
    low = nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = planes(b[:, 128:192].reshape(-1, 32), 2, 4).reshape(-1, 256)
    scale = half(b[:, 208:210]) * b[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[..., None] * ((low | high << 4).float() - 32).view(-1, 16, 16)).flatten(1)


CODEBOOK = torch.tensor([-127., -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def iq4_nl(b: Tensor) -> Tensor:           # d | 16 bytes of nibbles, which number the values of a table
    return half(b[:, :2]) * CODEBOOK[nibbles(b[:, 2:]).int()]


def iq4_xs(b: Tensor) -> Tensor:           # d | 8 6-bit scales: 2 bytes of top bits, 4 of the rest | 128 of nibbles
    low, shift = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), dim=-1), torch.arange(0, 8, 2, dtype=torch.uint8)
    high = (b[:, 2:4, None] >> shift) & 3
    scale = half(b[:, :2]) * ((low.flatten(1) | high.flatten(1) << 4).float() - 32)
    return (scale[..., None] * CODEBOOK[nibbles(b[:, 8:].reshape(-1, 8, 16)).int()]).flatten(1)


# type number -> (weights per block, bytes per block, how to unpack)
KINDS = {0: (1, 4, f32), 1: (1, 2, f16), 30: (1, 2, bf16),
         2: (32, 18, q4_0), 3: (32, 20, q4_1), 6: (32, 22, q5_0), 7: (32, 24, q5_1), 8: (32, 34, q8_0),
         10: (256, 84, q2_k), 11: (256, 110, q3_k), 12: (256, 144, q4_k), 13: (256, 176, q5_k), 14: (256, 210, q6_k),
         20: (32, 18, iq4_nl), 23: (256, 136, iq4_xs)}
