# SPDX-License-Identifier: Apache-2.0
"""Where the bits live: ``config.json`` and the sharded safetensors files."""
