# SPDX-License-Identifier: Apache-2.0
"""Huge pages for packed weights, where Linux has them."""

import re
from pathlib import Path

import pytest
import torch

from quip_vllm.ops import huge_pages
from quip_vllm.ops.huge_pages import SIZE, collapse


def kibibytes_in_huge_pages(tensor):
    """Of the mappings that hold a tensor, by Linux's own account."""
    begin, end, total = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        first, last = (int(address, 16) for address in mapping.split(" ", 1)[0].split("-"))
        if first < end and begin < last:
            total += int(re.search(r"^AnonHugePages: +(\d+) kB", mapping, re.M)[1])
    return total


def test_a_large_tensor_lies_in_huge_pages_and_stays_what_it_was():
    tensor = torch.arange(3 * SIZE, dtype=torch.int32)
    address, before = tensor.data_ptr(), kibibytes_in_huge_pages(tensor)
    pages = collapse(tensor)
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, torch.arange(3 * SIZE, dtype=torch.int32))
    if not pages:
        pytest.skip("this Linux gives no huge pages")
    assert kibibytes_in_huge_pages(tensor) >= max(before, pages * SIZE // 1024)


@pytest.mark.parametrize(
    ("tensor", "platform"),
    [
        (torch.zeros(SIZE - 1, dtype=torch.uint8), "linux"),
        (torch.zeros(SIZE, dtype=torch.uint8, device="meta"), "linux"),
        (torch.zeros(2 * SIZE, dtype=torch.uint8), "darwin"),
    ],
)
def test_small_tensors_and_those_elsewhere_are_left_alone(tensor, platform, monkeypatch):
    monkeypatch.setattr(huge_pages.sys, "platform", platform)
    assert collapse(tensor) == 0
