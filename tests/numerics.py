# SPDX-License-Identifier: Apache-2.0
"""Every tolerance of the tests, each with its reason. Bits, tables and integers are compared exactly, without one."""

FLOAT64_TRANSFORM = 1e-12
"""Relative error (Frobenius norm) of a float64 rotation: 2^-53 grown by some 20 butterfly stages and a sum of at most
924 terms stays below 1e-13; a wrong sign or index gives 1e-2 or more."""

FLOAT32_TRANSFORM = 2e-6
"""Relative error (Frobenius norm) of a float32 rotation against float64: 2^-24 = 6e-8 grown likewise, below 1e-6."""

FORMULA_DIGITS = 5e-6
"""Absolute error of a value against one published with five decimals: half of the last digit."""

SAMPLE_MOMENT = 0.02
"""Absolute error of a mean or correlation over 65,536 values: five standard errors of a fair sample, 5 / 256."""

TABLE_STD = 1e-3
"""Absolute error of a standard deviation after the table is rounded to fp16 (relative 2^-11 an entry, at worst)."""

LOADTEST_RELATIVE = 0.03
"""Relative error of the load test against what its server emitted: its clock runs from before a request leaves to
after a chunk is read, 2 to 4 ms more than the 400 ms to the first token."""

HYB_QUANTIZER_ERROR = 0.005
"""Mean squared error, per component, of 512 good centroids for a 2-D Gaussian: 0.0042 when K-means has converged,
0.0074 for the random samples from which it starts."""

FLOAT32_LINEAR = 5e-6
"""Relative error (Frobenius norm) of a quantized linear layer in float32 against its dequantized weight in float32: two
rotations and a sum of some thousand terms in another order; 2e-7 to 1e-6 is seen."""

SAME_DTYPE_FACTOR = 2.0
"""How much larger than torch's own error an op's error may be, both against float64 and with the same dtype of x and y:
the op rounds its output once, like torch, and computes in float32 between."""

DISTORTION = 0.02
"""Relative error of a code's mean squared error on a Gaussian against the published figure, over 2^18 weights."""

SERVED_LOG_PROBABILITY = 1e-3
"""Absolute error of a served log probability in float32 against transformers with the dequantized model."""
