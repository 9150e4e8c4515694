# SPDX-License-Identifier: Apache-2.0
"""What the stored bits mean (torch only, no speed): lattice codebooks, trellis codes, tile order, packing."""
