"""INT8 weights through from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lowmem.hf import Int8Config
from lowmem.hf.quantizer import quantize_loaded_
from lowmem.quant.int8_weight import Int8Module
from tests.hf.tiny_models import tiny_batch, tiny_model

WEIGHTS = "model.safetensors"
CASES = [
    ("llama", False),
    ("llama", True),
    ("llama_tied", False),
    ("llama_tied", True),
    ("phi_head_bias", True),
]


def saved(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **how: object) -> Path:
    tiny_model(kind, dtype=dtype).save_pretrained(folder, **how)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    config = {"quantization_config": Int8Config(**settings)} if settings else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **config)


def int8_folder(tmp_path: Path, **settings: object) -> Path:
    """A folder of int8 weights, saved by transformers."""
    load(saved(tmp_path / "float"), **{"group_size": 8, **settings}).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


# ---------------------------------------------------------------- loading float weights


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "4KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize(("kind", "embeddings"), CASES)
def test_loading_quantises_what_is_stored(tmp_path, kind, embeddings, how):
    config = Int8Config(group_size=8, quantize_embeddings=embeddings)
    wanted = tiny_model(kind)
    quantize_loaded_(wanted, config)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        saved(tmp_path, kind, **how), quantization_config=config, output_loading_info=True
    )
    assert not any(report.values()), "nothing is missing, unexpected or wrong"
    assert same(loaded.state_dict(), wanted.state_dict())
    assert any(isinstance(module, Int8Module) for module in loaded.modules())


def test_other_weights_take_the_dtype_asked_for_and_scales_do_not(tmp_path):
    model = load(saved(tmp_path), dtype=torch.bfloat16, group_size=8)
    linear = model.model.layers[0].mlp.up_proj
    assert (linear.weight_codes.dtype, linear.weight_scales.dtype) == (torch.int8, torch.float32)
    assert linear.weight.dtype is torch.bfloat16
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert model.dtype is torch.bfloat16


def test_counts_and_bytes_are_those_of_the_real_weights(tmp_path):
    float_model = tiny_model("llama_tied")
    model = load(saved(tmp_path, "llama_tied"), quantize_embeddings=True)
    assert model.num_parameters() == float_model.num_parameters()
    without = float_model.num_parameters() - float_model.model.embed_tokens.weight.numel()
    assert model.num_parameters(exclude_embeddings=True) == without
    distinct = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    buffers = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    assert model.get_memory_footprint() == sum(distinct.values()) + buffers


def test_a_missing_weight_is_reported_and_int_8_all_the_same(tmp_path):
    folder = saved(tmp_path)
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Int8Config(), output_loading_info=True
    )
    assert report["missing_keys"] == {"model.layers.0.mlp.up_proj.weight"}
    assert isinstance(model.model.layers[0].mlp.up_proj, Int8Module)


MEMORY = """
import sys, threading, time
import torch
from transformers import AutoModelForCausalLM
import lowmem.hf

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=lowmem.hf.Int8Config())

load(sys.argv[1])  # imports and pools
before, peak, done = anonymous_bytes(), [0], threading.Event()

def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
done.set()
watcher.join()
print(peak[0] - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="reads Linux's account of a process's memory"
)
def test_loading_never_holds_the_float_model(tmp_path):
    sizes = {"num_attention_heads": 8, "vocab_size": 100, "max_position_embeddings": 64}
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, **sizes}
    with torch.device("meta"):
        big = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    big = big.to_empty(device="cpu")
    with torch.no_grad():
        for param in big.parameters():
            param.fill_(0.01)
    big.save_pretrained(tmp_path / "big", max_shard_size="40MB")
    saved(tmp_path / "small", dtype=torch.bfloat16)
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "big")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    peak_bytes, int8_bytes = map(int, done.stdout.split())
    float_bytes = big.get_memory_footprint()
    largest, tiles = 2816 * 1024 * 2, 2 * 4 * 2**22  # one tensor as it is read, and float32 tiles of it
    assert float_bytes > 150 * 10**6
    assert peak_bytes < int8_bytes + largest + tiles
    assert peak_bytes < 0.85 * float_bytes


# ---------------------------------------------------------------- saving, and loading again


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "3KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "embeddings"), CASES)
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, kind, embeddings, scale_dtype, how):
    settings = {"group_size": 8, "quantize_embeddings": embeddings, "scale_dtype": scale_dtype}
    model = load(saved(tmp_path / "float", kind), dtype=torch.bfloat16, **settings)
    model.save_pretrained(tmp_path / "int8", **how)
    again = load(tmp_path / "int8", dtype=torch.bfloat16)
    assert same(again.state_dict(), model.state_dict())
    ids = tiny_batch()["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.num_parameters() == model.num_parameters()
    assert not any(param.is_meta for param in again.parameters())
    if model.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    stored = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "lowmem_int8",
        "group_size": 8,
        "scale_dtype": scale_dtype,
        "quantize_embeddings": embeddings,
        "modules_to_not_convert": None,
    }


def test_a_file_takes_one_byte_a_value_and_its_scales(tmp_path):
    folder = int8_folder(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    codes = [name for name in tensors if name.endswith("weight_codes")]
    assert len(codes) == 14
    assert all(tensors[name].dtype is torch.int8 for name in codes)
    assert not any(f"{name.removesuffix('_codes')}" in tensors for name in codes)


def test_a_model_made_in_memory_is_saved_and_loaded_too(tmp_path):
    model = tiny_model().eval()
    quantize_loaded_(model, Int8Config(group_size=8))
    model.save_pretrained(tmp_path)
    assert same(load(tmp_path).state_dict(), model.state_dict())


def test_modules_that_stay_float_are_remembered_in_the_folder(tmp_path):
    model = load(saved(tmp_path / "float"), modules_to_not_convert=["down_proj"])
    model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert same(again.state_dict(), model.state_dict())


def test_copies_and_pickles_are_models_of_their_own(tmp_path):
    model = load(saved(tmp_path), group_size=8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(twin.state_dict(), model.state_dict())
        assert twin.num_parameters() == model.num_parameters()
        twin.model.layers[0].mlp.up_proj.weight_codes.zero_()
        assert not twin.model.layers[0].mlp.up_proj.dequantized().any()
        assert model.model.layers[0].mlp.up_proj.dequantized().any()


def test_generation_takes_the_likeliest_tokens_of_the_logits(tmp_path):
    model = load(saved(tmp_path), group_size=8)
    ids = tiny_batch(rows=1, tokens=5)["input_ids"]
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for length in range(5, 9):
        assert answer[0, length] == model(answer[:, :length]).logits[0, -1].argmax()
