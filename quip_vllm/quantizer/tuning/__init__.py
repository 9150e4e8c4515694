# SPDX-License-Identifier: Apache-2.0
"""Vectors and norms of a quantized model made to fit its codes, which stay as they are."""
