# SPDX-License-Identifier: Apache-2.0
"""Registration: the entry point, its result in vLLM, and that quip_vllm itself stays light."""

import logging
import subprocess
import sys
from pathlib import Path

import tomllib
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from quip_vllm.vllm_plugin import register
from quip_vllm.vllm_plugin.config import QuipConfig

ROOT = Path(__file__).resolve().parents[2]


def test_registers_both_methods_once():
    register()
    register()
    assert get_quantization_config("qtip") is QuipConfig
    assert get_quantization_config("quip_sharp") is QuipConfig
    assert QUANTIZATION_METHODS.count("qtip") == QUANTIZATION_METHODS.count("quip_sharp") == 1


def test_entry_point_names_register():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["quip_vllm"].partition(":")
    assert getattr(sys.modules[module], function) is register


def test_importing_the_plugin_package_does_not_import_vllm():
    code = "import sys, quip_vllm, quip_vllm.vllm_plugin; sys.exit('vllm' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_messages_reach_vllms_log(monkeypatch):
    register()
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    # As vLLM sets its logger up in each of its processes.
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.INFO)
    logging.getLogger("quip_vllm.of_this_test").info("chosen")
    assert [record.getMessage() for record in records] == ["chosen"]
