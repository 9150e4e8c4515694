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

TABLE_INTEGERS = 0.04
"""Absolute error of a table's numbers in units of a 63rd of its largest, after all are rounded to fp16 (2^-11 of a
number of up to 63, and as much for the unit)."""

LOADTEST_RELATIVE = 0.03
"""Relative error of the load test against what its server emitted: its clock runs from before a request leaves to
after a chunk is read, 2 to 4 ms more than the 400 ms to the first token."""

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

LOSS_OVER_SHANNON = {"lattice": 2.5, "trellis": 1.7, "trellis, 5 to 8 bits": 20.0, "grid": 10.0}
"""How many times 4^-bits, the rate-distortion bound, the proxy loss on 4,096 white Gaussian weights may be: 1.5 to
2.3 is seen for the lattice, 1.1 to 1.6 for a trellis up to 4 bits, 9 to 14 for 1mad at 8 (which ends at 3.5 sigma).
The grid's best is 1.9 at 2 bits to 5.7 at 8, where one weight beyond the last level may add 3."""

LOSS_IN_TWO_SPACES = 1e-3
"""Relative difference of a proxy loss computed on the stored tensors in the original space, undamped, from the reported
one in the rotated space: fp16 signs are exact, both are float32 sums, and the damping of 1e-6 is negligible."""

FACTOR = 1e-5
"""Relative error (Frobenius norm) of (L + I) D (L + I)^T against H: L is rounded to float32 once."""

FLOAT32_HESSIAN = 1e-4
"""Relative error (Frobenius norm) of a float32 Hessian behind one decoder layer, computed once layer by layer and once
by the whole model: attention and batch sizes differ in the order of sums. Quantization moves it by 1e-2 and more."""

PERPLEXITY = 1e-5
"""Relative error of a perplexity in float32 against transformers' own loss: the mean of some hundred terms."""

DIVERGENCE = 1e-5
"""Absolute error, nats, of a KL divergence in float32 against float64."""

FLOAT32_DISTANCE = 1e-5
"""Relative error of a squared distance summed over at most 256 float32 differences."""

SEARCH_DISTORTION = 2e-3
"""Relative difference of the mean squared error between a search with 16-bit costs and one in float32: 0 to 2e-4 is
seen; a wrong rounding or saturation costs percents."""

FLOAT32_LAYERS = 1e-4
"""Absolute and relative error of an element of a tiny float32 model's hidden state, layer by layer against whole."""

FLOAT32_GRADIENTS = 1e-3
"""Relative error of the gradient of a vector of a tiny float32 model, layer by layer against whole."""

FLOAT32_SUMS = 1e-5
"""Absolute and relative error of an element of a small float32 Gram matrix of 20 rows against float64."""

FLOAT32_STEP = 1e-7
"""Absolute error of numbers near 1 after one rounding to float32."""

INT8_ROUNDING = 2e-3
"""Relative error (Frobenius norm) of the integer kernels against the same rounding in float64: equal but for the few
activations that lie within float32's rounding of a half, each of which moves by one unit of 127 a row's largest."""

LEAST_SQUARES = 1e-4
"""Absolute and relative error of a small least-squares solution whose Hessian was rounded to float32 once."""

HALF_ACTIVATIONS = 4e-4
"""Relative error (Frobenius norm) of a linear layer whose rotated activations are rounded to fp16, float32 otherwise:
2^-12 / sqrt(3) a rounding gives 1.4e-4 to 2.2e-4; a wrong fragment gives 1e-1 and more."""

FLOAT32_PRODUCTS = 5e-7
"""Error of a sum of products by tensor cores, each sum rounded once to float32, relative to the sum of their absolute
values: 1e-8 to 5e-8 is seen over up to 1,104 products; one wrong weight among them gives 1e-4 or more."""

ROUNDED_ONCE = {"torch.float32": 2.0**-24, "torch.float16": 2.0**-11, "torch.bfloat16": 2.0**-8}
"""Relative error of rounding a number to the nearest of a dtype: half a unit of its last bit."""


def relative(found, expected):
    """The error of a tensor, as a share of what it should be: norms over all elements, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
