"""The streaming writer against safetensors' own, and what it needs of the host's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.run import checkpoint_tensors
from lowmem.run.checkpoint_tensors import write_safetensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    tensors = {
        f"weight.{dtype}": torch.randint(0, 2, (3, 5), generator=draw).to(dtype) for dtype in reversed(DTYPES)
    }
    tensors["a.scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors['café → "quoted"'] = torch.arange(7)
    return tensors


@pytest.mark.parametrize("piece_bytes", [1, 24, 2**25])
def test_the_file_is_byte_for_byte_that_of_safetensors(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(checkpoint_tensors, "PIECE_BYTES", piece_bytes)
    tensors = tensors_of_every_kind()
    write_safetensors(tensors, tmp_path / "ours", metadata={"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_with_gaps_in_memory_and_parameters_are_written_by_value(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"t": whole.t(), "strided": whole[:, ::2], "p": torch.nn.Parameter(whole.clone())}
    write_safetensors(tensors, tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_a_dtype_that_the_format_does_not_know_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"odd: safetensors holds no torch\.complex64"):
        write_safetensors({"odd": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "file")
    assert not (tmp_path / "file").exists()


SAVING = """
import sys, torch
from pathlib import Path
from lowmem.run.checkpoint import seal
from lowmem.run.checkpoint_tensors import write_safetensors

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

folder = Path(sys.argv[1])
tensor_bytes = 2**26
# Transposed ones have to be copied, one at a time.
tensors = {str(i): torch.ones(tensor_bytes // 4 // 64, 64).t() for i in range(6)}
state = {"state": {i: {"exp_avg": t.t()} for i, t in enumerate(tensors.values())}, "param_groups": []}
write_safetensors({"warm": torch.zeros(9).view(3, 3).t()}, folder / "warm.safetensors")
torch.save({"warm": torch.zeros(9)}, folder / "warm.pt")
seal(folder, step=0)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
write_safetensors(tensors, folder / "model.safetensors")
torch.save(state, folder / "optimizer.pt")
seal(folder, step=0)
print((status("VmHWM") - before) / tensor_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_needs_no_more_of_the_hosts_memory_than_one_tensor(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SAVING, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "optimizer.pt").stat().st_size > 6 * 2**26
    assert float(done.stdout) < 1.3
    assert float(done.stdout) > 0.9, "one tensor is copied, or the measurement sees nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_devices_tensors_pass_through_the_host_in_pieces(tmp_path):
    tensors = {str(i): torch.rand(2**24, device="cuda") for i in range(3)}
    write_safetensors(tensors, tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], value.cpu()) for name, value in tensors.items())
