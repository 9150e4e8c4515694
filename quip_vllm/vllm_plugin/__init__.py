# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: the only package that imports vllm."""

import logging


def register() -> None:
    """Registers our quantization methods with vLLM.

    This is the entry point of the group ``vllm.general_plugins``. vLLM calls it in each of its processes, possibly more
    than once, so it is idempotent and touches no device.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from quip_vllm.formats.spec import methods
    from quip_vllm.vllm_plugin.config import QuipConfig
    from quip_vllm.vllm_plugin.exl3 import METHOD, Exl3QuipConfig

    for method in methods():
        register_quantization_config(method)(QuipConfig)
    register_quantization_config(METHOD)(Exl3QuipConfig)
    # vLLM shows only what reaches its own logger, and the choice of a backend has to be seen.
    logging.getLogger("quip_vllm").parent = logging.getLogger("vllm")
