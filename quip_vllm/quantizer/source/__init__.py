# SPDX-License-Identifier: Apache-2.0
"""Where a run's input comes from: the model, one decoder layer at a time, and the calibration text."""
