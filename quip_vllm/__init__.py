# SPDX-License-Identifier: Apache-2.0
"""QuIP# and QTIP weight quantization for vLLM.

Importing this package imports neither vllm nor triton, and builds nothing.
"""

__version__ = "0.1.0"
