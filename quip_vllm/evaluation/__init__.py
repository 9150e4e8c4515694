# SPDX-License-Identifier: Apache-2.0
"""How good a checkpoint is: perplexity, and divergence from the original."""
