# SPDX-License-Identifier: Apache-2.0
"""What the stored bits mean (torch only, no speed): one class per kind of format, one `register` per format."""

from quip_vllm.formats import e8p_residual, grid, trellis_codes  # noqa: F401  # each registers its formats
