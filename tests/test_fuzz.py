"""Hostile and damaged files: whatever stands in them, the outcome is a model or a UserError that names the file; no
code of a file runs, little memory is touched, and it takes no time worth mentioning.

Each format has a small real file, written by somebody else's code where there is somebody (transformers, peft, torch).
hypothesis damages it; the cleverer lies are written by hand.
"""
import contextlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import test_t5
import torch
from conftest import tiny_config, twins
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from remote_cases import CASES, tensors
from safetensors.torch import load_file, save_file
from test_adapters import adapted
from test_checkpoints import write_meta
from test_gguf import write_other

import checkpoints
from checkpoints import formats
from checkpoints.convert import convert
from common import UserError

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2,
         "num_kv_heads": 2}
FEW = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 80)),
               suppress_health_check=[HealthCheck.function_scoped_fixture])


class Files(dict):
    """name -> bytes of a directory."""
    def __repr__(self):
        return f"<{', '.join(f'{name}: {len(data)}' for name, data in self.items())}>"


def read_files(folder: Path) -> Files:
    return Files({p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})


# ---------------------------------------------------------------- a small one of each

def llama(folder: Path):
    theirs, _ = twins(tiny_config(**SMALL))
    theirs.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return theirs


def make_safetensors(folder: Path) -> None:
    llama(folder)


def make_shards(folder: Path) -> None:
    llama(folder).save_pretrained(folder, max_shard_size="4KB")
    for name in ("model.safetensors", "generation_config.json"):
        (folder / name).unlink()


def make_bin(folder: Path, zipped: bool = True) -> None:
    state = llama(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def make_old_bin(folder: Path) -> None:
    make_bin(folder, zipped=False)


def make_meta(folder: Path) -> None:
    theirs, _ = twins(config := tiny_config(**SMALL))
    folder.rmdir()
    write_meta(folder, theirs, config, 2, 1)


def make_llama2c(folder: Path) -> None:
    numbers = 32 * 16 + 2 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 16 + 64 * 8
    (folder / "model.bin").write_bytes(struct.pack("<7i", 16, 24, 1, 2, 2, 32, 64) + bytes(4 * numbers))


def make_nanogpt(folder: Path) -> None:
    args = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False, "vocab_size": 32}
    state = {"transformer.wte.weight": torch.rand(32, 16), "transformer.wpe.weight": torch.rand(8, 16),
             "transformer.ln_f.weight": torch.rand(16)}
    for name, shape in (("ln_1", (16,)), ("ln_2", (16,)), ("attn.c_attn", (48, 16)), ("attn.c_proj", (16, 16)),
                        ("mlp.c_fc", (64, 16)), ("mlp.c_proj", (16, 64))):
        state[f"transformer.h.0.{name}.weight"] = torch.rand(shape)
    torch.save({"model": state, "model_args": args, "iter_num": 3}, folder / "ckpt.pt")


def make_gguf(folder: Path) -> None:
    write_other(folder / "m.gguf", "gemma2")


def make_gguf_split(folder: Path) -> None:
    write_other(folder / "m.gguf", "chatglm")


def make_t5(folder: Path) -> None:
    test_t5.theirs(folder, vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    (folder / "generation_config.json").unlink()


def make_blinkdl(folder: Path) -> None:
    C = 16
    matrix, row = torch.rand(C, C), torch.rand(C)
    state = {"emb.weight": torch.rand(32, C), "head.weight": torch.rand(32, C)}
    norms = ["ln_out", *(f"blocks.0.{x}" for x in ("ln0", "ln1", "ln2"))]
    state |= {f"{name}.{x}": row.clone() for name in norms for x in ("weight", "bias")}
    for part, mixes, matrices in (("att", "kvr", ("key", "value", "receptance", "output")),
                                  ("ffn", "kr", ("key", "value", "receptance"))):
        state |= {f"blocks.0.{part}.time_mix_{x}": row.clone().view(1, 1, C) for x in mixes}
        state |= {f"blocks.0.{part}.{x}.weight": matrix.clone() for x in matrices}
    state |= {f"blocks.0.att.time_{x}": row.clone() for x in ("decay", "first")}
    torch.save(state, folder / "RWKV-4-Tiny-ctx16.pth")


def make_nested(folder: Path) -> None:
    """Fused q, k, v; tables in tables; a name that is nobody's."""
    case = CASES["chatglm-6b"]
    (folder / "config.json").write_text(json.dumps(case.raw), encoding="utf-8")
    state: dict = {}
    for name, t in tensors(case).items():
        table, *rest = name.split(".", 1)
        state.setdefault(table, {}).update({rest[0]: t}) if rest else state.update({name: t})
    torch.save({"module": state}, folder / "mp_rank_00_model_states.pt")


def make_adapter(folder: Path) -> None:
    model = adapted(llama(folder / "base"), target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"],
                    use_dora=True, alpha_pattern={"q_proj": 3})
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()


def make_delta(folder: Path) -> None:
    llama(folder / "base")
    make_bin(folder / "delta")


FORMATS = {"safetensors": make_safetensors, "shards": make_shards, "bin": make_bin, "old bin": make_old_bin,
           "meta": make_meta, "llama2c": make_llama2c, "nanogpt": make_nanogpt, "t5": make_t5, "blinkdl": make_blinkdl,
           "nested": make_nested, "gguf": make_gguf, "gguf with fused qkv": make_gguf_split, "adapter": make_adapter,
           "delta": make_delta}


def patches(name: str, folder: Path) -> dict:
    return {"adapter": {"lora": [folder / "adapter"]}, "delta": {"delta": folder / "delta"}}.get(name, {})


def open_everything(name: str, folder: Path) -> None:
    """What a user does with it: look, load; and read every tensor as the file has it."""
    base = folder / "base" if (folder / "base").exists() else folder
    checkpoints.load(base, **patches(name, folder))
    source = checkpoints.open_any(base)[0]
    for tensor in source.entries:
        source.read(tensor)


@pytest.fixture(scope="module", params=FORMATS)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "m"
    folder.mkdir()
    FORMATS[request.param](folder)
    open_everything(request.param, folder)                   # undamaged, it loads
    return request.param, read_files(folder)


# ---------------------------------------------------------------- trying

@contextlib.contextmanager
def bounds(memory: int = 300_000_000, seconds: int = 20):
    """More memory than that cannot be had, and after the time the test fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0])

    def late(*_):
        raise AssertionError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)


def attempt(name: str, files: Files, folder: Path) -> str | None:
    """None: it was read. Else what the UserError says; anything else that is raised fails the test."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    try:
        with bounds():
            open_everything(name, folder)
        return None
    except UserError as error:
        said = str(error)
        assert str(folder) in said or any(Path(f).name in said for f in files), f"names no file: {said}"
        assert len(said) < 1500 and "allocate" not in said and "MemoryError" not in said, said
        # Files from before 2020 say how much to allocate. It is never touched: the file ends first.
        assert name == "old bin" or "more memory than there is" not in said, said
        return said


if not sys.platform.startswith("linux"):
    pytest.skip("limits memory through /proc and rlimit", allow_module_level=True)

# Where numbers stand that a reader trusts: 0, the edges of 31, 32 and 63 bits, and what no file can hold.
NUMBERS = [0, 1, 2**7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


def damage(draw, data: bytes) -> bytes:
    """One wound: flipped bits, a number overwritten, an end cut off, a piece lost, doubled or moved."""
    if not data:
        return data
    # Most of a small file are weights, which may be anything: half of the wounds go to its head or tail.
    ends = st.one_of(st.integers(0, min(600, len(data) - 1)), st.integers(max(0, len(data) - 600), len(data) - 1))
    at = draw(st.one_of(ends, st.integers(0, len(data) - 1)))
    kind = draw(st.sampled_from(["bits", "u32", "u64", "cut", "lose", "double", "insert"]))
    if kind == "bits":
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1:]
    if kind in ("u32", "u64"):
        size, code = (4, "<I") if kind == "u32" else (8, "<Q")
        number = struct.pack(code, draw(st.sampled_from(NUMBERS)) % (1 << 8 * size))
        return (data[:at] + number + data[at + size:])[:max(len(data), at + size)]
    if kind == "cut":
        return data[:at]
    length = draw(st.integers(1, 40))
    if kind == "lose":
        return data[:at] + data[at + length:]
    if kind == "double":
        return data[:at + length] + data[at:]
    return data[:at] + bytes(length) + data[at:]


@FEW
@given(data=st.data())
def test_damaged_files_are_read_or_refused(whole, tmp_path_factory, data):
    name, files = whole
    changed, victim = Files(files), data.draw(st.sampled_from(sorted(files)))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[victim] = damage(data.draw, changed[victim])
    attempt(name, changed, tmp_path_factory.mktemp("hostile"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
@example(share=0.0)
@example(share=0.999)
def test_truncated_weights_never_load(whole, tmp_path_factory, share):
    name, files = whole
    victim = max((f for f in files if not f.startswith("base/")), key=lambda f: len(files[f]))
    changed = Files(files) | {victim: files[victim][:int(share * len(files[victim]))]}
    said = attempt(name, Files(changed), tmp_path_factory.mktemp("cut"))
    assert said is not None, victim


# ---------------------------------------------------------------- JSON whose values have another type or size

VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from([-1, 0, 1, 2**31, 2**60, 10**400, 0.0, -0.5, 1e308,
                                                             float("inf"), float("nan"), "", "x", "../x", "\0"]),
                   st.sampled_from([[], {}, [1], ["x"], {"x": 1}, {"rope_type": "x"}, [[[[[]]]]], "9" * 5000]))


def places(value, path=()):
    """Every place of a JSON document: ("rope_parameters", "rope_theta") and so on."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def test_files_from_before_2020_that_ask_for_much(tmp_path):
    """A tensor of 2^38 numbers in 16 KB: an error, whatever the system promised."""
    make_old_bin(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    data = file.read_bytes()
    number = data.index(b"cpu") + 3                              # behind it: the storage's size, BININT1 or BININT2
    at = next(i for i in range(number, number + 12) if data[i:i + 1] in b"KM")
    size = 2 if data[at:at + 1] == b"K" else 3
    file.write_bytes(data[:at] + b"\x8a\x06" + (1 << 38).to_bytes(6, "little") + data[at + size:])      # LONG1
    with bounds(), pytest.raises(UserError, match=r"pytorch_model\.bin .*more memory than there is"):
        checkpoints.load(tmp_path)


@FEW
@given(data=st.data())
def test_json_of_other_types_and_sizes(whole, tmp_path_factory, data):
    name, files = whole
    documents = sorted(f for f in files if f.endswith(".json"))
    if not documents:
        pytest.skip(f"{name} has no JSON")
    victim = data.draw(st.sampled_from(documents))
    value = json.loads(files[victim])
    for _ in range(data.draw(st.integers(1, 2))):
        value = replaced(value, data.draw(st.sampled_from(list(places(value)))), data.draw(VALUES))
    changed = Files(files) | {victim: json.dumps(value).encode()}
    attempt(name, Files(changed), tmp_path_factory.mktemp("json"))


NO_JSON = {"empty": b"", "list": b"[]", "null": b"null", "half": b"{", "other letters": b"\xff\xfe", "infinite":
           b'{"a": 1e999}', "deep": b'{"model_type": ' + b"[" * 100_000, "long": b'{"a": ' + b"9" * 10_000 + b"}"}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_documents_that_are_none(whole, text, tmp_path):
    name, files = whole
    for i, victim in enumerate(f for f in files if f.endswith(".json") and f != "delta/config.json"):  # that may be so
        folder = tmp_path / str(i)
        folder.mkdir()
        assert attempt(name, Files(Files(files) | {victim: text}), folder), victim


# ---------------------------------------------------------------- lies written by hand: safetensors

def header(entries: dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [4]}
SAFETENSORS = {
    "2^60 bytes of header": header({}, length=1 << 60), "2^63": header({}, length=1 << 63),
    "header longer than the file": header({}, length=9), "half a length": b"\x01\0\0",
    "overlapping": header({"a": {**F32, "data_offsets": [0, 16]}, "b": {**F32, "data_offsets": [8, 24]}}, bytes(24)),
    "a hole": header({"a": {**F32, "data_offsets": [8, 24]}}, bytes(24)),
    "behind the end": header({"a": {**F32, "data_offsets": [0, 1 << 40]}}, bytes(16)),
    "backwards": header({"a": {**F32, "data_offsets": [16, 0]}}, bytes(16)),
    "negative": header({"a": {**F32, "data_offsets": [-16, 0]}}, bytes(16)),
    "shape and bytes differ": header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, bytes(16)),
    "shape that overflows": header({"a": {"dtype": "F32", "shape": [1 << 62, 4, 1 << 62], "data_offsets": [0, 0]}}),
    "unknown type": header({"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
    "no JSON": struct.pack("<Q", 8) + b"{{{{{{{{", "deep": struct.pack("<Q", 90_000) + b"[" * 90_000,
    "list": header([1])}                                                                  # type: ignore[arg-type]


@pytest.mark.parametrize("lie", SAFETENSORS)
def test_lies_of_safetensors(lie, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS[lie])
    with bounds(), pytest.raises(UserError, match=r"model\.safetensors: .*damaged or incomplete .*download it again"):
        formats.open_source(tmp_path)


@pytest.mark.parametrize("there", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.py",
                                   "a\0b.safetensors", 3, None, ["model.safetensors"]])
def test_indexes_that_point_elsewhere(there, tmp_path):
    (tmp_path / "m").mkdir()
    llama(tmp_path / "m")
    index = {"weight_map": {"model.norm.weight": there}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="outside of its folder or no file of weights"):
        checkpoints.load(tmp_path / "m")


# ---------------------------------------------------------------- lies written by hand: pickles and archives

class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


PICKLES = {"pytorch_model.bin": "config.json", "consolidated.00.pth": "params.json", "ckpt.pt": None,
           "adapter_model.bin": "adapter_config.json"}


@pytest.mark.parametrize("how", ["zip", "before 2020", "bare pickle", "named like a tensor"])
@pytest.mark.parametrize("file", PICKLES)
def test_code_in_a_pickle_does_not_run(file, how, tmp_path):
    base, trapped = tmp_path / "base", tmp_path / "m"
    llama(base)
    trapped.mkdir()
    if PICKLES[file]:
        text = '{"peft_type": "LORA", "lora_alpha": 1, "dim": 4, "n_layers": 1, "n_heads": 1, "norm_eps": 1e-5}'
        (trapped / PICKLES[file]).write_text(text, encoding="utf-8")
    trap = Trap(tmp_path / "ran")
    state = {"model.norm.weight": trap, "model_args": {}, "model": {"x": trap}}
    if how == "bare pickle":
        (trapped / file).write_bytes(pickle.dumps(trap))
    else:
        state = torch.nn.ParameterDict({"x": torch.ones(1)}) if how == "named like a tensor" else state
        if how == "named like a tensor":
            state.trap = trap
        torch.save(state, trapped / file, _use_new_zipfile_serialization=how != "before 2020")
    with pytest.raises(UserError, match="it could run code|cannot be read"):
        if file == "adapter_model.bin":
            checkpoints.load(base, lora=[trapped])
        else:
            checkpoints.load(trapped)
    assert not (tmp_path / "ran").exists()


def archive(members: dict[str, bytes], compression: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out.getvalue()


def repacked(data: bytes, compression: int, more: dict[str, bytes]) -> bytes:
    """torch's archive again, with other compression and further members."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {m.filename: file.read(m) for m in file.infolist()}
    return archive(members | more, compression)


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    """1 GB of zeros in 1 MB; and a table of contents in which a hundred members are the same 8 KB."""
    make_bin(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    original = file.read_bytes()
    inside = zipfile.ZipFile(io.BytesIO(original)).namelist()[0].split("/")[0]
    file.write_bytes(repacked(original, zipfile.ZIP_DEFLATED, {f"{inside}/data/bomb": bytes(100_000_000)}))
    assert file.stat().st_size < 1_000_000
    with bounds(), pytest.raises(UserError, match=r"pytorch_model\.bin: its member .* is compressed \("):
        checkpoints.load(tmp_path)
    end = original.rindex(b"PK\x05\x06")
    n, size, start = struct.unpack_from("<HII", original, end + 10)
    if start == 0xFFFFFFFF or n == 0xFFFF:
        pytest.skip("torch wrote zip64")
    table = original[start:start + size]
    file.write_bytes(original[:start] + table * 100 + b"PK\x05\x06" + struct.pack(
        "<4H2IH", 0, 0, n * 100, n * 100, size * 100, start, 0))
    with bounds(), pytest.raises(UserError, match=r"its members claim \d+ bytes, the file has|cannot be read"):
        checkpoints.load(tmp_path)


HOLLOW = {
    "expanded": (torch.zeros(1).expand(1 << 40), r"norm\.weight \(1099511627776,\) claims more numbers than the 4 by"),
    "expanded twice": (torch.zeros(1, 4).expand(1 << 30, 4), "claims more numbers than the 16 bytes"),
    "sparse": (torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (1 << 40,)),
               r"torch\.sparse_coo.* only plain tensors are supported|cannot be read"),
    "quantised": (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "only plain tensors|could run code"),
    "no numbers": (torch.empty(1 << 40, device="meta"), "only plain tensors are supported")}


@pytest.mark.parametrize("kind", HOLLOW)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_larger_than_their_bytes(kind, tmp_path):
    make_bin(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    hollow, words = HOLLOW[kind]
    torch.save(state | {"model.norm.weight": hollow}, tmp_path / "pytorch_model.bin")
    with bounds(), pytest.raises(UserError, match=words):
        checkpoints.load(tmp_path)


def test_a_pattern_that_never_ends(tmp_path):
    """Nested repetitions on forty letters take years. The file is refused before a weight is read."""
    make_adapter(tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    data = json.loads(config.read_text(encoding="utf-8"))
    data["alpha_pattern"] = {r"(?:(?:.|..)+)+[A-Z]": 3}
    config.write_text(json.dumps(data), encoding="utf-8")
    with bounds(seconds=20), pytest.raises(UserError, match="a pattern of alpha_pattern does not come to an end"):
        checkpoints.load(tmp_path / "base", lora=[tmp_path / "adapter"])


# ---------------------------------------------------------------- errors name tensor and file, from the first reader on

def test_what_is_refused_is_not_converted_either(whole, tmp_path):
    """convert stands on the same readers; of a truncated file nothing is left that loads."""
    name, files = whole
    victim = max((f for f in files if not f.startswith("base/")), key=lambda f: len(files[f]))
    for path, data in (files | {victim: files[victim][:len(files[victim]) // 2]}).items():
        (tmp_path / "m" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / path).write_bytes(data)
    base = tmp_path / "m" / "base" if name in ("adapter", "delta") else tmp_path / "m"
    with bounds(), pytest.raises(UserError):
        convert(base, tmp_path / "out", **patches(name, tmp_path / "m"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_small_files_are_what_they_seem(tmp_path):
    """The damage above would prove nothing on files that never loaded."""
    make_safetensors(tmp_path / "a")
    assert len(load_file(tmp_path / "a" / "model.safetensors")) == 12
    save_file(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / "a" / "model.safetensors")
    assert checkpoints.load(tmp_path / "a")[0].config.hidden_size == 16
