# SPDX-License-Identifier: Apache-2.0
"""The quantizer, for those who look for a script: the same as ``quip-vllm quantize``."""

import sys

from quip_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
