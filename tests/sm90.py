"""Compiles for an H100 every kernel that the public functions would launch there, on a machine without a card:

    python tests/sm90.py        one JSON object a line: case, kernel, shared bytes, registers, stack bytes, wgmma

The functions run on small CPU tensors, but each launch is written down instead: which kernel, with which types,
constants, tile sizes, and which numbers are 1 or multiples of 16 (triton makes versions of its own for those).
It is a program by itself because triton's interpreter, which all other tests use, is switched on for a whole process.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import attention, decode, gae, glu, head, nf4, norm, rope, sample  # noqa: E402

MODULES = (attention, decode, gae, glu, head, nf4, norm, rope, sample)
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
         torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8"}
LAUNCHES = []                          # (kernel, positional arguments, constants and options)


class Recorder:
    """Stands where a kernel stands; a launch is remembered, nothing runs."""
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: LAUNCHES.append((self.kernel, args, kwargs))


def describe(kernel, args, kwargs):
    """What triton's launcher would ask its compiler for: signature, constants, attributes."""
    options = {k: kwargs[k] for k in ("num_warps", "num_stages") if k in kwargs}
    given = {**dict(zip(kernel.arg_names, args)), **{k: v for k, v in kwargs.items() if k not in options}}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = given[name]
        special = not kernel.params[i].do_not_specialize
        if kernel.params[i].is_constexpr or (isinstance(value, int) and value == 1 and special):
            signature[name], constants[(i,)] = "constexpr", value
        elif torch.is_tensor(value):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2 ** 31 else "i64"
            if value % 16 == 0 and special:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes, options


def compile_one(kernel, args, kwargs) -> dict:
    signature, constants, attributes, options = describe(kernel, args, kwargs)
    done = triton.compile(ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
                          target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(done.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return {"kernel": kernel.__name__, "shared": done.metadata.shared, "registers": registers, "stack": stack,
            "wgmma": "wgmma" in done.asm["ptx"], "stages": options.get("num_stages")}


# ---------------------------------------------------------------- what is called

def random(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype).requires_grad_(grad)


def run_attention(D: int, everything: bool, dtype: torch.dtype) -> None:
    q, k = (random(2, 64, heads, D, dtype=dtype).transpose(1, 2) for heads in (8, 2))
    slopes = torch.ones(8) if everything else None
    spans = attention.spans(64, docs=torch.ones(2, 64, dtype=torch.int64))
    out = attention.attention(q, k, k, spans, slopes, 30.0 if everything else 0.0)
    out.backward(torch.empty_like(out))


def run_decode(D: int, group: int, dtype: torch.dtype) -> None:
    q, k = random(16, 2 * group, D, dtype=dtype, grad=False), random(16, 512, 2, D, dtype=dtype, grad=False)
    bounds = torch.zeros(2, 16, dtype=torch.int32)
    decode.decode(q, k.transpose(1, 2), k.transpose(1, 2), *bounds, torch.ones(2 * group), 30.0)


def run_head(V: int, dtype: torch.dtype) -> None:
    h, w, targets = random(64, 16, dtype=dtype), random(V, 16, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    head.linear_cross_entropy(h, w, targets)
    head.linear_ppo(h, w, targets, torch.zeros(64), torch.zeros(64), temperature=0.7, softcap=30.0)
    with torch.no_grad():
        head.linear_logprobs(h, w, targets)


def run_norm(C: int, layer: bool, dtype: torch.dtype) -> None:
    x, w = random(32, C, dtype=dtype), random(C, dtype=dtype)
    y, s = norm.norm(x, w, random(C, dtype=dtype) if layer else None, 1e-5, layer, random(32, C, dtype=dtype))
    torch.autograd.backward((y, s), (x.detach(), x.detach()))


def run_rope(D: int, R: int, dtype: torch.dtype) -> None:
    q, k, table = random(2, 32, 64, D, dtype=dtype), random(2, 8, 64, D, dtype=dtype), torch.ones(1, 1, 64, R).to(dtype)
    rope.rope(q, k, table, table)
    rope.rope_(q.detach(), k.detach(), table, table)


def run_glu(kind: str, dtype: torch.dtype) -> None:
    gate, up, w = random(64, 2048, dtype=dtype), random(64, 2048, dtype=dtype), random(16, 2048, dtype=dtype)
    glu.glu_linear(gate, up, w, kind).backward(random(64, 16, dtype=dtype, grad=False))
    glu.glu(gate[:, :500], up[:, :500], kind)


def run_sample(V: int, dtype: torch.dtype) -> None:
    sample.sample(random(4, V, dtype=dtype, grad=False), torch.zeros(4), 0.7, 50, 0.9)
    sample.sample(random(4, V, dtype=dtype, grad=False), torch.zeros(4))


def run_gae(R: int) -> None:
    gae.gae(torch.zeros(4, R), torch.zeros(4, R), torch.ones(4, R, dtype=torch.int64))


def run_nf4(double: bool, dtype: torch.dtype) -> None:
    nf4.dequantise(nf4.quantise(torch.ones(64, 64, dtype=dtype), double))


def cases() -> dict:
    half, full = torch.bfloat16, torch.float32
    out = {}
    for D in (32, 64, 80, 128, 256):
        for everything in (False, True) if D in (64, 128, 256) else (True,):
            out[f"attention {D} {'everything' if everything else 'plain'}"] = (run_attention, D, everything, half)
        out[f"decode {D}"] = run_decode, D, 4, half
    out["attention 128 fp32"] = run_attention, 128, True, full
    out["decode 128 fp32, groups of 32"] = run_decode, 128, 32, full
    for V in (32000, 128256, 1000):
        out[f"head {V}"] = run_head, V, half
    out["head 151936 fp32"] = run_head, 151936, full
    for C in (576, 4096, 8192):
        out[f"norm {C}"] = run_norm, C, C == 4096, half
    out["norm 8192 fp32"] = run_norm, 8192, True, full
    out["rope 128"], out["rope 80 of 128"] = (run_rope, 128, 128, half), (run_rope, 128, 80, half)
    for V in (1000, 128256):
        out[f"sample {V}"] = run_sample, V, half
    for R in (53, 8192):
        out[f"gae {R}"] = run_gae, R
    for double in (False, True):
        out[f"nf4 {double}"] = run_nf4, double, half
    for kind in glu.KINDS:
        out[f"glu {kind}"] = run_glu, kind, half
    return out


def main() -> None:
    for module in MODULES:
        module.use_triton = lambda x: True
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                setattr(module, name, Recorder(value))
    os.environ["CHATPIXIU_KERNELS"] = "triton"
    for case, (function, *args) in cases().items():
        LAUNCHES.clear()
        function(*args)
        seen = set()
        for launch in LAUNCHES:
            key = repr((launch[0].__name__, describe(*launch)))
            if key not in seen:
                seen.add(key)
                print(json.dumps({"case": case, **compile_one(*launch)}), flush=True)


if __name__ == "__main__":
    main()
