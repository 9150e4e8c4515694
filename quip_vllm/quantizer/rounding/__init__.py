# SPDX-License-Identifier: Apache-2.0
"""A weight in units of a code to codes, under a curvature."""
