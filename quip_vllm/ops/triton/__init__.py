# SPDX-License-Identifier: Apache-2.0
"""The Triton backend. Only `backend`, which does not import triton itself, is imported before a layer runs on it."""
