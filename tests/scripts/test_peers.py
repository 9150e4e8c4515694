# SPDX-License-Identifier: Apache-2.0
"""Nearest rounding, to which quality.md compares: levels, error, and what is refused."""

import peers
import pytest
import torch


def test_what_lies_on_the_levels_stays_and_groups_do_not_share_them():
    levels = torch.arange(-5, 11).repeat(4)  # 16 levels in 64 weights
    weight = torch.cat([levels / 8, levels * 4.0])[None]
    assert torch.equal(peers.round_to_nearest(weight, 4), weight)


def test_no_weight_moves_by_more_than_half_a_step():
    weight = torch.arange(peers.GROUP).float()[None] * 3 / (peers.GROUP - 1)  # 0 to 3: steps of 1 at 2 bits
    rounded = peers.round_to_nearest(weight, 2)
    assert rounded.unique().tolist() == [0, 1, 2, 3]
    assert (rounded - weight).abs().max() <= 0.5


def test_inputs_that_no_group_divides_are_refused():
    with pytest.raises(ValueError, match="100 inputs"):
        peers.round_to_nearest(torch.zeros(2, 100), 4)
