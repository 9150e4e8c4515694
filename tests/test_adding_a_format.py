# SPDX-License-Identifier: Apache-2.0
"""docs/adding_a_format.md, followed: a toy code and a toy method in a copy of the sources, and no file that it omits.

The toy code's weight is the low byte of the state, less 128. The toy method stores each weight as a whole number.
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

Edits = dict[str, list[tuple[str, str]]]  # file -> what is there, what is put before it
CODE_EDITS: Edits = {
    "quip_vllm/formats/trellis_codes.py": [
        (
            "for _code in (ONE_MAD,",
            "def _toy(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:\n"
            "    return ((state & 255) - 128).to(torch.float32)[:, None]\n\n\n"
            'register(TrellisCode("toy", _toy))\n',
        ),
    ],
    "kernels/cpu/codes.h": [('  CODE(kLut, "lut")', '  CODE(kToy, "toy")              \\\n')],
    "kernels/cpu/float/decode_trellis.h": [
        (
            "template <Code code, int bits>\ninline Values value(",
            "inline Values toy(States x) { return __builtin_convertvector((Integers)(x & 255u) - 128, Values); }\n\n",
        ),
        ("  return look_up(x, table);\n}", "  if constexpr (code == Code::kToy) return toy(x);\n"),
    ],
    "quip_vllm/ops/triton/codes.py": [
        (
            "@triton.jit\ndef lut(",
            "@triton.jit\ndef toy(state, table):\n    return (state & 255).to(tl.float16) - 128\n\n\n",
        ),
        ("    else:\n        return lut(state, table)", '    elif CODE == "toy":\n        return toy(state, table)\n'),
    ],
}
CODE_FILES = {
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
namespace {

constexpr int kFirst = 1, kLast = 8;
const Register toy("toy", {gemm_entry<Toy, Toy, kFirst, kLast>, XOrder::kTrellis, 1,
                           [](int) { return 1152.0f; }, 0, false, kFirst, kLast});

}  // namespace
}  // namespace quip
""",
}
METHOD_EDITS: Edits = {
    "quip_vllm/formats/__init__.py": [
        ("from quip_vllm.formats import", "from quip_vllm.formats import whole  # noqa: F401\n")
    ],
    "quip_vllm/quantizer/rounding/encoders.py": [
        (
            "ENCODERS: dict[",
            "class WholeEncoder:\n"
            "    columns, rows, rms = 8, 1, 2.0\n\n"
            "    def __init__(self, format: Whole, bits: int) -> None:\n"
            "        self.limit = 2 ** (bits - 1)\n\n"
            "    def encode(self, block: Tensor) -> tuple[Tensor, dict[str, Tensor]]:\n"
            "        values = block.round().clamp(-self.limit, self.limit)\n"
            '        return values, {"whole": values.to(torch.int8)}\n\n'
            "    def stored(self, codes: dict[str, Tensor]) -> dict[str, Tensor]:\n"
            "        return codes\n\n\n",
        ),
        ("    TrellisCode: TrellisEncoder,\n", "    Whole: WholeEncoder,\n"),
        ("from quip_vllm.ops import", "from quip_vllm.formats.whole import Whole\n"),
    ],
}
METHOD_FILES = {
    "quip_vllm/formats/whole.py": '''# SPDX-License-Identifier: Apache-2.0
"""A toy method."""

import torch

from quip_vllm.formats.spec import Format, TileOrder, register
from quip_vllm.formats.tensors import Follows, TensorSpec


class Whole(Format):
    """Each weight is a whole number."""

    name, method = "whole", "toy_method"
    bits = (2, 3)
    multiple_in, multiple_out = 8, 1

    def tensors(self, bits: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("whole", Follows.BOTH, (torch.int8,)),)

    def decode(self, tensors: dict[str, torch.Tensor], bits: int, tile_order: TileOrder) -> torch.Tensor:
        return tensors["whole"].float()


register(Whole())
''',
}
CODE_CHECK = """
import importlib.util, pathlib, sys
sys.path.insert(0, "tests")
import torch
from numerics import HALF_ACTIVATIONS, relative
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
        spec = LinearSpec("toy", bits, 80, (48, 16))
        assert backend.refusal(spec) is None, backend.refusal(spec)
        tensors = random_layer(spec)
        x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1))
        wanted = x.double() @ dequantize(spec, tensors).double().T
        assert relative(backend.prepare(spec, tensors).linear(x), wanted) < HALF_ACTIVATIONS, (backend.name, bits)
    print(backend.name)
"""
METHOD_CHECK = """
import importlib.util, pathlib, sys
sys.path.insert(0, "tests")
import tiny_models
from quip_vllm import cli
folder = pathlib.Path(sys.argv[1])
text = folder / "text.txt"
text.write_text(tiny_models.text(), encoding="utf-8")
model = tiny_models.save_model(folder / "model", "Llama")
options = ["--method", "toy_method", "--code", "whole", "--bits", "3", "--sequences", "4"]
options += ["--calibration", str(text), "--sequence-length", "32", "--tune", "none"]
windows = ["--text", str(text), "--sequence-length", "32", "--windows", "2"]
assert cli.main(["quantize", str(model), str(folder / "out"), *options]) == 0
assert cli.main(["inspect", str(folder / "out")]) == 0
assert cli.main(["evaluate", str(folder / "out"), *windows]) == 0
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.cpu import CpuBackend
assert CpuBackend().refusal(LinearSpec("whole", 2, 64, (32,))) == (
    "code whole has no kernels: only the reference backend runs it"
)
if importlib.util.find_spec("vllm") is not None:
    from vllm.model_executor.layers.quantization import get_quantization_config
    from quip_vllm.vllm_plugin import register
    register()
    assert get_quantization_config("toy_method").__name__ == "QuipConfig"
print("method")
"""


def edited(folder: Path, edits: Edits, files: dict[str, str]) -> Path:
    """A copy of the sources in which the page's places are changed."""
    for part in ("quip_vllm", "kernels", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in edits.items():
        text = (folder / name).read_text()
        for anchor, addition in changes:
            assert text.count(anchor) == 1, f"{name}: {anchor!r} is there {text.count(anchor)} times"
            text = text.replace(anchor, addition + anchor)
        (folder / name).write_text(text)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def run(folder: Path, program: str, *arguments: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1", "QUIP_VLLM_ACTIVATIONS": "exact"}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout.split()


@pytest.mark.long
@pytest.mark.exhaustive
def test_every_backend_runs_the_toy_code(tmp_path):
    folder = edited(tmp_path, CODE_EDITS, CODE_FILES)
    for unit in (folder / "kernels" / "cuda").glob("gemm_*.cu"):
        if unit.name != "gemm_toy.cu":
            unit.write_text("")  # the other codes would be compiled again for nothing
    presets = folder / "kernels" / "CMakePresets.json"
    text = presets.read_text()
    assert '"Release"' in text and '"-O2"' in text
    presets.write_text(text.replace('"Release"', '""').replace('"-O2"', '""'))  # what it computes, at any speed
    compiled("cpu", folder)
    compiled("emulator", folder)
    assert run(folder, CODE_CHECK)[:2] == ["cpu", "cuda"]


def test_the_toy_method_is_quantized_and_evaluated(tmp_path):
    pytest.importorskip("transformers")
    folder = edited(tmp_path / "sources", METHOD_EDITS, METHOD_FILES)
    (tmp_path / "run").mkdir()
    assert run(folder, METHOD_CHECK, str(tmp_path / "run"))[-1] == "method"


def test_the_page_names_every_place_and_has_few():
    code, method = PAGE.read_text().split("## A method")
    for text, names, most in ((code, [*CODE_EDITS, *CODE_FILES], 6), (method, [*METHOD_EDITS, *METHOD_FILES], 8)):
        rows = [line for line in text.splitlines() if line.startswith("| `")]
        assert len(names) <= most
        for name in names:
            assert any(name.replace("toy", "<name>").replace("whole", "<name>") in row for row in rows), name
