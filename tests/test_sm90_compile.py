"""Every kernel compiles for an H100 without one: it fits the shared memory, spills no register, and where its tiles are
large enough for the warpgroup products they are used. tests/sm90.py writes down what the public functions launch."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install -r requirements-test.txt")
KERNELS = {"attention": {"forward_kernel", "dkv_kernel", "dq_kernel"},
           "decode": {"part_kernel", "join_kernel"}, "head": {"row_kernel"},
           "norm": {"forward_kernel", "backward_kernel"}, "rope": {"rope_kernel"},
           "glu": {"forward_kernel", "backward_kernel"}, "sample": {"sample_kernel"}, "gae": {"gae_kernel"},
           "nf4": {"unpack_kernel"}}
# Warpgroup products need 64 rows: fp32 ("ieee") has none, 16 queries of a decoding step are too few, and at head dim
# 256 dK and dV fill the registers at 32 keys.
NO_WGMMA = {"attention 256 plain dkv_kernel", "attention 256 everything dkv_kernel"}


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run([sys.executable, "-W", "ignore", Path(__file__).with_name("sm90.py")], capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_was_launched(compiled):
    for module, kernels in KERNELS.items():
        assert {c["kernel"] for c in compiled if c["case"].split()[0] == module} == kernels
        source = (Path(__file__).resolve().parents[1] / "kernels" / f"{module}.py").read_text(encoding="utf-8")
        assert kernels == {line.split("(")[0][4:] for line in source.splitlines()
                           if line.startswith("def ") and line.split("(")[0].endswith("_kernel")}


def test_everything_fits_and_nothing_spills(compiled):
    for c in compiled:
        assert c["shared"] <= 227 * 1024, c
        assert c["stack"] == 0, c


def test_tensor_cores_of_hopper_are_used(compiled):
    for c in compiled:
        name = f"{c['case']} {c['kernel']}"
        if c["kernel"] in ("forward_kernel", "dkv_kernel", "dq_kernel") and name.startswith("attention") and \
                "fp32" not in name:
            assert c["wgmma"] == (name not in NO_WGMMA), c
