# SPDX-License-Identifier: Apache-2.0
"""What the built CUDA library takes of a GPU, and where its kernels wait for the launch before; no GPU is needed."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from release import kernel_resources
from release.kernel_resources import LIBRARY, faults, parse

TEXT = """arch = sm_80
 Function quip_rotate_in:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:616
arch = sm_90
 Function quip_rotate_in:
  REG:129 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:616
 Function decode_gemm_kernelINS_6OneMadILi2EEELi8ELi1ELb0EEEvNS_4GemmE:
  REG:254 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:616
"""


@pytest.fixture
def cuobjdump():
    tool = kernel_resources.find_cuobjdump()
    if tool is None or not LIBRARY.exists():
        pytest.skip("there is no cuobjdump, or no CUDA library: make build where nvcc is")
    return tool


def test_a_spill_and_too_many_registers_are_named():
    kernels = parse(TEXT)
    assert [kernel.architecture for kernel in kernels] == ["sm_80", "sm_90", "sm_90"]
    assert list(faults(kernels)) == [
        "quip_rotate_in on sm_90: 24 bytes of local memory per thread, where 0 are allowed.",
        "quip_rotate_in on sm_90: 129 registers per thread, where 128 are allowed.",
    ]


def test_no_kernel_of_the_built_library_spills(cuobjdump, capsys):
    assert kernel_resources.main([]) == 0, capsys.readouterr().out
    wanted = len(os.environ["CUDAARCHS"].split(";")) if "CUDAARCHS" in os.environ else 6
    assert len({kernel.architecture for kernel in kernel_resources.read(cuobjdump, LIBRARY)}) >= wanted


def test_kernels_wait_once_for_the_launch_before_and_then_write(cuobjdump, tmp_path):
    """Only a GPU from 9.0 on overlaps launches (ACQBULK waits), so the emulator misses no such wait.

    decode_gemm waits in two places: with experts it has to read first which rows are whose.
    """
    subprocess.run([cuobjdump, "-xelf", "sm_90", str(LIBRARY)], cwd=tmp_path, check=True, capture_output=True)
    disassembler, waiting = Path(cuobjdump).with_name("nvdisasm"), 0
    for cubin in tmp_path.iterdir():
        done = subprocess.run([str(disassembler), "-c", str(cubin)], check=True, capture_output=True, text=True)
        for name, body in re.findall(r"\.text\.(\w+):\n(.*?)(?=\n\.text\.|\Z)", done.stdout, re.DOTALL):
            if not re.search("route|rotate_in|rotate_out|_gemm_kernel|decode_dense|encode", name):
                continue
            *before, after = body.split("ACQBULK")
            only_launch = name.endswith("Lb1EEEvNS_4GemmE")  # the kernel's last template argument; a code has its own
            wanted = 2 if "decode_gemm_kernel" in name and not only_launch else 1
            assert len(before) == wanted, f"{name} waits {len(before)} times"
            assert "STG" not in "".join(before) and "STG" in after, name
            waiting += 1
    assert waiting > 100
