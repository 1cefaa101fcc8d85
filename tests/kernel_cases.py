"""What the tests of all kernels share. On a CPU they run in triton's interpreter, in fp32 and fp16 only: it computes
garbage in bf16 without an error. On a GPU the same tests also run in bf16.

The measure is ||out - ref|| / ||ref||, per output and per gradient, with the reference in float64 on the same rounded
inputs. The interpreter sees no read outside a tensor and no output left unwritten, so inputs lie in the middle of
buffers full of NaN, and torch fills every empty tensor with NaN.
"""
import contextlib
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install -r requirements-test.txt")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # a GPU's library is deterministic only with this
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
names = {"argvalues": DTYPES, "ids": lambda dtype: str(dtype).removeprefix("torch.")}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """N(0, scale) numbers on the device, between NaNs on either side, and with NaNs behind each row."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(*shape, generator=generator) * scale
    room = torch.full((*shape[:-1], shape[-1] + 16), float("nan"), dtype=dtype) if len(shape) > 1 else \
        torch.full((shape[0] + 32,), float("nan"), dtype=dtype)
    room = room.to(DEVICE)
    view = room[..., 8:8 + shape[-1]] if len(shape) > 1 else room[16:16 + shape[0]]
    view.copy_(data)
    return view


def leaf(x: Tensor) -> Tensor:
    """The same memory as a leaf that collects a gradient."""
    return x.detach().requires_grad_()


def check(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert got.shape == expected.shape, (what, tuple(got.shape), tuple(expected.shape))
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"       # NaN fails as well


@contextlib.contextmanager
def poison():
    """Every torch.empty is full of NaN (and an operation without a deterministic algorithm is an error)."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch):
    """The kernel or an error."""
    monkeypatch.setenv("CHATPIXIU_KERNELS", "triton")
    with poison():
        yield
