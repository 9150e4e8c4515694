# SPDX-License-Identifier: Apache-2.0
"""``import quip_vllm.hf_plugin`` lets transformers run quantized checkpoints; vLLM is not needed.

From then on ``AutoModelForCausalLM.from_pretrained(OUT)`` keeps the weights quantized. Without the import, transformers
does not know the method and would fill the layers at random, with a warning.
"""

from quip_vllm.hf_plugin.modules import train_vectors
from quip_vllm.hf_plugin.quantizer import register

__all__ = ["register", "train_vectors"]

register()
