"""What the host holds while a run saves, above what it holds anyway: less than 1.3 times its largest tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.hf.tiny_runs import character_tokenizer, tiny_config, write_recipe

ROWS, WIDTH = 2**16, 64
LARGEST_BYTES = ROWS * WIDTH * 4

MEASURED = """
import json, sys
import lowmem.hf.ending
from lowmem.hf.flow import train
from lowmem.hf.trainer_checkpoints import CheckpointedTrainer
from lowmem.recipe.load import load_recipe

lowmem.hf.ending.write_report = lambda folder: folder / "report.md"

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def watch(owner, name):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
        result = real(*args, **kwargs)
        print(json.dumps([name, status("VmHWM") - before]), flush=True)
        return result
    setattr(owner, name, call)

watch(CheckpointedTrainer, "try_to_save")
watch(CheckpointedTrainer, "_save_checkpoint")
watch(lowmem.hf.ending, "write_final_model")
sys.exit(train(load_recipe(sys.argv[1], sys.argv[2:])))
"""

INT8 = ("model.weights=int8", "model.int8.group_size=16", "model.int8.embeddings=true")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("weights", [(), INT8], ids=["float", "int8"])
def test_a_run_saves_with_less_of_the_hosts_memory_than_a_third_more_than_its_largest_tensor(
    tmp_path, weights
):
    folder = tmp_path / "model"
    LlamaForCausalLM(tiny_config(vocab_size=ROWS, hidden_size=WIDTH)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    overrides = ("data.eval=null", "save.every=1", "train.max_steps=2", "train.per_device_batch_size=1")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(write_recipe(tmp_path, folder)), *overrides, *weights],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    held = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert [name for name, _ in held] == [
        "try_to_save",
        "_save_checkpoint",
        "_save_checkpoint",
        "write_final_model",
    ]
    assert max(nbytes for _, nbytes in held) < 1.3 * LARGEST_BYTES
