# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU: the emulated library, built once a session."""

import subprocess
import sys
from pathlib import Path

import pytest

from quip_vllm.ops import extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cuda(request):
    """A CudaBackend over the emulated library (--cuda-library names another build of it)."""
    from quip_vllm.ops.cuda import CudaBackend

    library = request.config.getoption("--cuda-library")
    if library is None:
        subprocess.run([sys.executable, "kernels/build.py", "emulator"], cwd=ROOT, check=True)
        library = ROOT / "build" / "emulator" / "libquip_vllm_cuda.so"
    extension.CUDA_LIBRARY = library.resolve()
    extension.cuda_library_problem.cache_clear()
    assert extension.cuda_library_problem() is None
    return CudaBackend()
