"""Triton where there is one, and the one decision that every operation makes: its kernel or its PyTorch definition.

    CHATPIXIU_KERNELS=auto      the kernel on an NVIDIA GPU of capability 8.0 or more, the definition everywhere else
    CHATPIXIU_KERNELS=torch     the definition everywhere: is a strange result the kernel's fault?
    CHATPIXIU_KERNELS=triton    the kernel or an error, never a silent way out: the tests, in triton's interpreter

Triton is optional: without it `triton.jit` below hands the function back as it is, and nobody ever launches it.
"""
from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from common import UserError

try:
    import triton
    import triton.language as tl
    INSTALLED = True
except ImportError:
    INSTALLED = False
    triton = SimpleNamespace(jit=lambda fn=None, **_: fn if fn else lambda f: f)
    tl = SimpleNamespace()             # kernels name its types in annotations only, and those are never evaluated

# Read by triton when a kernel is decorated, that is, when its file is imported. The interpreter runs a kernel on a CPU,
# program by program in numpy: right in fp32 and fp16, garbage without an error in bf16.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = 1.4426950408889634             # the GPU's exponential has base 2: exp(x) = exp2(x * LOG2E)


def constant(function: Callable) -> Callable:
    """A cached question to the card; torch.compile asks it once and takes the answer for a constant. The attribute is
    what torch.compiler.assume_constant_result sets, which imports the compiler: 1.5 s at every start."""
    known = functools.cache(function)

    def ask(device: int):
        return known(device)
    ask._dynamo_marked_constant = True
    return ask


@constant
def capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def choice() -> str:
    mode = os.environ.get("CHATPIXIU_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton"):
        raise UserError(f"CHATPIXIU_KERNELS={mode!r}: known are auto, torch and triton")
    return mode


def use_triton(x: Tensor) -> bool:
    """The decision for an operation whose first argument is x. Cards before 8.0 only pretend to have bf16."""
    mode = choice()
    if mode == "torch" or not (INSTALLED or mode == "triton"):
        return False
    if mode == "triton":
        if not INSTALLED:
            raise UserError("CHATPIXIU_KERNELS=triton, but triton is not installed: pip install triton, or set it to "
                            "auto")
        if not (x.is_cuda or INTERPRETED):
            raise UserError(f"CHATPIXIU_KERNELS=triton, but this tensor is on {x.device}: move the model to a GPU, or "
                            "set TRITON_INTERPRET=1 before the program starts (slow, for tests)")
        if INTERPRETED and x.dtype == torch.bfloat16:
            raise UserError("triton's interpreter computes garbage in bfloat16: use float32 or float16 there")
        return True
    return x.is_cuda and x.dtype in DTYPES and torch.version.hip is None and capability(x.device.index) >= (8, 0)


def architecture(x: Tensor) -> int:
    """The key of the tables of tile sizes: 80, 86, 89, 90, 100 ...; the interpreter takes those of 90."""
    if not x.is_cuda:
        return 90
    major, minor = capability(x.device.index)
    return 10 * major + minor


def tiles(table: dict, arch: int, size: int) -> tuple:
    """The entry of the largest known architecture up to `arch`, and in it of the smallest known size from `size` on."""
    known = max((a for a in table if a <= arch), default=min(table))
    fits = [s for s in sorted(table[known]) if s >= size]
    if not fits:
        raise UserError(f"no tile sizes for a row of {size} numbers; the largest known is {max(table[known])}")
    return table[known][fits[0]]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: the only lengths that a block of a kernel can have."""
    return 1 << max(0, n - 1).bit_length()


@constant
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1   # libdevice has one, but not in the interpreter
