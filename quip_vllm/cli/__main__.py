# SPDX-License-Identifier: Apache-2.0
"""``python -m quip_vllm.cli``."""

import sys

from quip_vllm.cli import main

sys.exit(main())
