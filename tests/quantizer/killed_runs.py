# SPDX-License-Identifier: Apache-2.0
"""killed_runs.py MODEL TEXT OUT: for each moment a run that kills itself then, and a run that resumes it.

Prints a JSON object: moment -> [wait status of the killed run, files it left, wait status of the resumed run].
"""

import json
import os
import signal
import sys
from pathlib import Path

from quip_vllm.checkpoint import store
from quip_vllm.quantizer import head, pipeline
from quip_vllm.quantizer.settings import Settings


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner, name, call, after=False):
    """Makes the ``call``-th call of owner.name end the process, before or after it does its work."""
    original, count = getattr(owner, name), [0]

    def counting(*args, **kwargs):
        count[0] += 1
        if count[0] == call and not after:
            die()
        result = original(*args, **kwargs)
        if count[0] == call:
            die()
        return result

    setattr(owner, name, counting)


def half_a_file(call):
    original, count = store.save_file, [0]

    def save(tensors, path, metadata):
        original(tensors, path, metadata=metadata)
        count[0] += 1
        if count[0] == call:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    store.save_file = save


# save_file: 1 is the calibration, 2 to 4 the layers, 5 the head, 6 the rest.  quantize_group: 4 a layer.
MOMENTS = {
    "before the calibration": lambda: kill_at(pipeline, "calibration_tokens", 1),
    "before the first layer": lambda: kill_at(pipeline, "_do_layer", 1),
    "in the middle of the first layer": lambda: kill_at(pipeline, "quantize_group", 3),
    "first shard there, its record not": lambda: kill_at(pipeline, "write_shard", 2, after=True),
    "first layer done": lambda: kill_at(pipeline, "_do_layer", 1, after=True),
    "in the middle of the second layer": lambda: kill_at(pipeline, "quantize_group", 6),
    "half of the second shard": lambda: half_a_file(3),
    "in the middle of the head": lambda: kill_at(head, "quantize_head", 1),
    "half of the head's shard": lambda: half_a_file(5),
    "head's shard there, its record not": lambda: kill_at(head, "write_shard", 1, after=True),
    "half of the last shard": lambda: half_a_file(6),
    "before the index": lambda: kill_at(pipeline, "write_index", 1),
    "in the middle of copying": lambda: kill_at(pipeline.shutil, "copyfile", 2),
    "before config.json": lambda: kill_at(pipeline, "write_json", 6),
    "before the record is removed": lambda: kill_at(pipeline.shutil, "rmtree", 1),
}


def run(settings, out, resume, prepare):
    child = os.fork()
    if child == 0:
        prepare()
        pipeline.quantize(settings, out, resume)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(model, text, folder):
    settings = Settings(model, "e8p", 3, calibration=text, sequences=8, sequence_length=48, lm_head=4)
    pipeline.tqdm.monitor_interval = 0  # no thread before a fork
    pipeline.quantize(settings, Path(folder) / "whole")  # in this process: its children find the tables made
    told = {}
    for moment, prepare in MOMENTS.items():
        out = Path(folder) / moment
        killed = run(settings, out, False, prepare)
        left = sorted(file.name for file in out.iterdir())
        told[moment] = [killed, left, run(settings, out, True, lambda: None)]
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
