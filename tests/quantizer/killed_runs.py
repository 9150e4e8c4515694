# SPDX-License-Identifier: Apache-2.0
"""killed_runs.py MODEL TEXT OUT TUNE: for each moment a run that kills itself then, and a run that resumes it.

Prints a JSON object: moment -> [wait status of the killed run, files it left, wait status of the resumed run].
"""

import json
import os
import signal
import sys
from pathlib import Path

from quip_vllm.checkpoint import shards, store
from quip_vllm.quantizer import record, run
from quip_vllm.quantizer import settings as quantizer_settings
from quip_vllm.quantizer.settings import BLOCKS, FULL, NONE, Settings
from quip_vllm.quantizer.tuning import full


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
    """Makes the ``call``-th safetensors file end in its middle, and the process with it."""
    original, count = store.os.replace, [0]

    def replace(fresh, path):
        if path.suffix == ".safetensors":
            count[0] += 1
            if count[0] == call:
                os.truncate(fresh, os.path.getsize(fresh) // 2)
                die()
        original(fresh, path)

    store.os.replace = replace


# Files: 1 is the calibration, 2 to 4 the layers' inputs, 5 to 7 their sensitivities, 8 to 10 the layers, 11 the head,
# 12 and later the shards. Groups: 4 per layer, 13 the head.
MOMENTS = {
    "before the calibration": lambda: kill_at(run, "calibration_tokens", 1),
    "half of the backward pass": lambda: half_a_file(6),
    "in the middle of the first layer": lambda: kill_at(run, "quantize_group", 3),
    "first layer there, its entries not": lambda: kill_at(record, "write_shard", 2, after=True),
    "first layer done": lambda: kill_at(run.Run, "_layer", 1, after=True),
    "half of the second layer": lambda: half_a_file(9),
    "in the middle of the head": lambda: kill_at(run, "quantize_group", 13),
    "head there, its entries not": lambda: kill_at(record, "write_shard", 5, after=True),
    "before the shards are planned": lambda: kill_at(record, "plan_shards", 1),
    "half of the first shard": lambda: half_a_file(12),
    "first shard there, its layers too": lambda: kill_at(record, "copy_shard", 1, after=True),
    "half of the second shard": lambda: half_a_file(13),
    "before the index": lambda: kill_at(record, "write_index", 1),
    "in the middle of copying": lambda: kill_at(run.shutil, "copyfile", 2),
    "before config.json": lambda: kill_at(run, "write_json", 2),
    "before the record is removed": lambda: kill_at(run.shutil, "rmtree", 1),
}
# Files of the record: 1 is the calibration, 2 to 4 the layers, 5 the head, 6 what all of them trained together.
TRAINED_EACH = {
    "in the middle of training a layer": lambda: kill_at(run, "tune_block", 2),
    "a trained layer there, its entries not": lambda: kill_at(record, "write_shard", 3, after=True),
}
TRAINED_TOGETHER = {
    "the head there": lambda: kill_at(run, "tune_together", 1),
    "in the first epoch": lambda: kill_at(full.Model, "step", 1, after=True),
    "the state of the first epoch there": lambda: kill_at(full, "write_shard", 4, after=True),
    "in the second epoch": lambda: kill_at(full.Model, "step", 9),
    "all trained, the entries not": lambda: kill_at(record, "write_shard", 6, after=True),
    "all trained": lambda: kill_at(run.shutil, "rmtree", 1),
}
OF_TUNE = {NONE: MOMENTS, BLOCKS: TRAINED_EACH, FULL: TRAINED_TOGETHER}


def start(settings, out, resume, prepare):
    child = os.fork()
    if child == 0:
        prepare()
        run.quantize(settings, out, resume)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(model, text, folder, tune):
    amount = {"calibration": text, "sequences": 8, "sequence_length": 48}
    both = {"token_weights": 1.0, "two_sided": True}
    settings = Settings(model, "e8p", 3, **amount, **both, lm_head=4, tune=tune, epochs=2 if tune == FULL else None)
    shards.SHARD_BYTES = 24_000  # a layer and a half
    if tune == FULL:
        quantizer_settings.BATCH_TOKENS = 48  # eight batches
        full.PATIENCE = settings.epochs  # whatever the epochs give
    run.tqdm.monitor_interval = 0  # no thread before a fork
    run.quantize(settings, Path(folder) / "whole")  # in this process: its children find the tables made
    told = {}
    for moment, prepare in OF_TUNE[tune].items():
        out = Path(folder) / moment
        killed = start(settings, out, False, prepare)
        left = sorted(str(file.relative_to(out)) for file in out.rglob("*"))
        told[moment] = [killed, left, start(settings, out, True, lambda: None)]
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
