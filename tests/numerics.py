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
