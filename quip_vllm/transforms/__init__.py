# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rotations that make weights incoherent (torch only): Hadamard matrices, transforms, weight rotation."""
