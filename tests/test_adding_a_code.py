# SPDX-License-Identifier: Apache-2.0
"""docs/adding_a_format.md, followed: a toy code in a copy of the sources, on every backend, and no file that it omits.

The toy's weight is the low byte of the state, less 128.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import compiled

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adding_a_format.md"

EDITS = {  # file -> what is there, what is put before it
    "quip_vllm/formats/methods.py": [('    LUT = "lut"\n', '    TOY = "toy"\n')],
    "quip_vllm/formats/trellis_codes.py": [
        (
            "_CODES: dict[",
            "def _toy(state: torch.Tensor, lut: torch.Tensor | None) -> torch.Tensor:\n"
            "    return ((state & 255) - 128).to(torch.float32)[:, None]\n\n\n",
        ),
        ("    "lut": _lut,\n", "    Code.TOY: _toy,\n"),
    ],
    "kernels/cpu/kernels.h": [("kE8p };", "kToy, ")],
    "kernels/cpu/float/decode_trellis.h": [
        (
            "template <Code code>\ninline Values value(",
            "inline Values toy(States x) { return __builtin_convertvector((Integers)(x & 255u) - 128, Values); }\n\n",
        ),
        ("  return look_up(x, table);\n}", "  if constexpr (code == Code::kToy) return toy(x);\n"),
        ("    case Code::kLut: return", "    case Code::kToy: return tile_decoder<Code::kToy>(bits);\n"),
    ],
    "kernels/cpu/bindings_linear.cpp": [('  if (name == "hyb") return', '  if (name == "toy") return Code::kToy;\n')],
    "kernels/cuda/decode_gemm.h": [("GemmEntry lut_entry(int bits);", "GemmEntry toy_entry(int bits);\n")],
    "kernels/cuda/bindings.cu": [
        ('  if (code == "lut")', '  if (code == "toy") return {toy_entry, XOrder::kTrellis, 1, 1024 + 128, 0, 1, 8};\n')
    ],
    "quip_vllm/ops/cuda.py": [('"lut": ', '"toy": 4.5, ')],
    "quip_vllm/ops/triton/codes.py": [
        (
            "@triton.jit\ndef lut(",
            "@triton.jit\ndef toy(state, table):\n    return (state & 255).to(tl.float16) - 128\n\n\n",
        ),
        ("    else:\n        return lut(state, table)", '    elif CODE == "toy":\n        return toy(state, table)\n'),
    ],
}
NEW = {
    "kernels/cuda/code_toy.h": """// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits>
struct Toy : TrellisCode<bits> {
  DEVICE Toy(const unsigned char*, const void*) {}

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    this->template join_pairs<half>(words, a, [](uint32_t first, uint32_t second) {
      return (0x6400 | (first & 255)) | (0x6400 | (second & 255)) << 16;
    });
  }
};

}  // namespace quip
""",
    "kernels/cuda/gemm_toy.cu": """// SPDX-License-Identifier: Apache-2.0
#include "code_toy.h"
#include "decode_gemm.h"

namespace quip {
GemmEntry toy_entry(int bits) { return gemm_entry<Toy, Toy, 1, 8>(bits); }
}  // namespace quip
""",
}
CHECK = """
import importlib.util, pathlib, sys
sys.path.insert(0, "tests")
import torch
from random_layers import random_layer
from quip_vllm.ops import LinearSpec, dequantize, extension
extension.CUDA_LIBRARY = pathlib.Path("build/emulator/libquip_vllm_cuda.so").resolve()
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.ops.cuda import CudaBackend
from quip_vllm.ops.triton.backend import TritonBackend
for backend in (CpuBackend(), CudaBackend(), TritonBackend()):
    if backend.name == "triton" and importlib.util.find_spec("triton") is None:
        continue
    for bits in (1, 2, 3, 8):
        spec = LinearSpec("qtip", Code("toy"), bits, 80, (48, 16))
        assert backend.refusal(spec) is None, backend.refusal(spec)
        tensors = random_layer(spec)
        x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1))
        wanted = x.double() @ dequantize(spec, tensors).double().T
        y = backend.linear(spec, x, backend.prepare(spec, tensors))
        error = float((y - wanted).norm() / wanted.norm())
        assert error < 4e-4, (backend.name, bits, error)
    print(backend.name)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The sources with the toy in them, built."""
    folder = tmp_path_factory.mktemp("toy")
    for part in ("quip_vllm", "kernels", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    for name, changes in EDITS.items():
        text = (folder / name).read_text()
        for anchor, addition in changes:
            assert text.count(anchor) == 1, f"{name}: {anchor!r} is there {text.count(anchor)} times"
            text = text.replace(anchor, addition + anchor)
        (folder / name).write_text(text)
    for name, text in NEW.items():
        (folder / name).write_text(text)
    compiled("cpu", folder)
    compiled("emulator", folder)
    return folder


def test_every_backend_runs_the_toy(copy):
    environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": "1", "QUIP_VLLM_ACTIVATIONS": "exact"}
    result = subprocess.run([sys.executable, "-c", CHECK], cwd=copy, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.split()[:2] == ["cpu", "cuda"]


def test_the_page_names_every_file():
    text = PAGE.read_text()
    for name in (*EDITS, *NEW):
        assert name.replace("toy", "<name>") in text, name
