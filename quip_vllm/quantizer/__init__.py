# SPDX-License-Identifier: Apache-2.0
"""The offline quantizer: calibration text in, checkpoint out, one decoder layer at a time."""
