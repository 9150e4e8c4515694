# SPDX-License-Identifier: Apache-2.0
"""The estimate of larger quantizations: the split of a layer's time, and that a layer of a run is found."""

import estimate_quantization as estimate
from estimate_quantization import FEW, MORE, NAMES, Costs, Shape


def test_costs_are_found_again():
    """Powers of two, so that no digit is lost."""
    small, large = (Shape("", hidden, 4 * hidden, hidden // 4, 2, 256) for hidden in (64, 128))
    search = {NAMES[0]: 2.0**-20, NAMES[1]: 2.0**-10}
    made = Costs(2.0**-30, 2.0**-35, search)
    runs = ((small, FEW), (small, MORE), (large, FEW))
    found = Costs.of(small, large, [made.seconds(shape, NAMES[0], tokens) for shape, tokens in runs], search)
    assert found == made
    assert found.seconds(large, NAMES[1], FEW) - found.seconds(large, NAMES[0], FEW) == large.weights * 1023 * 2.0**-20


def test_a_layer_is_measured():
    seconds, memory = estimate.measure(Shape("tiny", 256, 896, 32, estimate.LAYERS, estimate.VOCABULARY), FEW)
    assert 0 < seconds < 60 and memory > 2**27
