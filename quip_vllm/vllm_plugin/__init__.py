# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: the only package that imports vllm."""

import logging


def register() -> None:
    """Registers the quantization methods ``qtip`` and ``quip_sharp`` with vLLM.

    The entry point of the group ``vllm.general_plugins``. vLLM calls it in each of its processes, possibly more than
    once, so it is idempotent and touches no device.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from quip_vllm.vllm_plugin.config import QtipConfig, QuipSharpConfig

    for config in (QtipConfig, QuipSharpConfig):
        register_quantization_config(config.method)(config)
    # vLLM shows what reaches its own logger only, and the choice of a backend has to be seen.
    logging.getLogger("quip_vllm").parent = logging.getLogger("vllm")
