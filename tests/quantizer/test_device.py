# SPDX-License-Identifier: Apache-2.0
"""--device: a device other than the CPU, in a process of its own; and one that torch cannot use."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration

from quip_vllm.quantizer.source.model import LayeredModel


@pytest.mark.long
@pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch has no devices in Python"
)
def test_runs_elsewhere():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    runs = Path(__file__).with_name("runs_elsewhere.py")
    done = subprocess.run([*command, str(runs)], cwd=runs.parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-6000:]


def test_a_device_that_torch_cannot_use(tiny_model):
    with pytest.raises(ValueError, match="--device is abacus, which torch cannot use here .*: give cpu"):
        LayeredModel(tiny_model(), device="abacus")
