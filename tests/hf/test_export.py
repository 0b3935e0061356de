"""`lowmem export`: what transformers loads without lowmem, bit by bit what the int8 weights stand for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowmem.cli.main import main
from lowmem.errors import FaultError, RecipeError
from lowmem.hf.export import export
from lowmem.hf.int8_config import Int8Config
from lowmem.hf.quantizer import quantize_loaded_
from lowmem.quant.int8_weight import Int8Module
from tests.hf.tiny_models import tiny_batch, tiny_model
from tests.hf.tiny_runs import character_tokenizer

WEIGHTS = "model.safetensors"


def int8_folder(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings
) -> PreTrainedModel:
    model = tiny_model(kind).to(dtype).eval()
    quantize_loaded_(model, Int8Config(**{"group_size": 8, "quantize_embeddings": True, **settings}))
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return model


def float_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What an export must hold, taken from the modules."""
    found = {name: value.to(dtype) for name, value in model.state_dict().items() if "weight_" not in name}
    return found | {
        f"{path}.weight": module.dequantized(dtype)
        for path, module in model.named_modules()
        if isinstance(module, Int8Module)
    }


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "phi_head_bias"])
def test_an_export_holds_the_dequantised_weights_bit_by_bit(tmp_path, kind, scale_dtype, dtype):
    model = int8_folder(tmp_path / "int8", kind, scale_dtype=scale_dtype)
    done = export(str(tmp_path / "int8"), dtype=dtype)
    wanted = float_weights(model, getattr(torch, dtype))
    assert done.folder == tmp_path / f"int8-{dtype}"
    assert equal(load_file(done.folder / WEIGHTS), wanted)
    assert (done.tensors, done.nbytes) == (len(wanted), sum(value.nbytes for value in wanted.values()))
    loaded, report = AutoModelForCausalLM.from_pretrained(done.folder, output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype is getattr(torch, dtype)
    assert loaded.num_parameters() == model.num_parameters()
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert AutoTokenizer.from_pretrained(done.folder)("a b")["input_ids"]


def test_an_export_answers_as_the_int8_model_does(tmp_path):
    model = int8_folder(tmp_path / "int8", dtype=torch.float32)
    done = export(str(tmp_path / "int8"))
    assert done.dtype == "float32", "what the model computes in"
    ids = tiny_batch()["input_ids"]
    found = AutoModelForCausalLM.from_pretrained(done.folder)(ids).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_process_without_lowmem_loads_it(tmp_path):
    int8_folder(tmp_path / "int8")
    done = export(str(tmp_path / "int8"))
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(done.folder)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, 'lowmem' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["Linear", "False"], run.stderr


def test_shards_are_cut_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem.hf.export.SHARD_BYTES", 4000)
    monkeypatch.setattr("lowmem.hf.stored_model.PIECE_BYTES", 256)
    model = int8_folder(tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / WEIGHTS)
    model.save_pretrained(tmp_path / "int8", max_shard_size="3KB")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 2
    done = export(str(tmp_path / "int8"))
    files = sorted(done.folder.glob("*.safetensors"))
    assert len(files) > 3
    together = {name: value for file in files for name, value in load_file(file).items()}
    assert equal(together, float_weights(model, torch.bfloat16))
    assert equal(AutoModelForCausalLM.from_pretrained(done.folder).state_dict(), together)
    assert sum(value.nbytes for value in tensors.values()) < done.nbytes


def test_memory_stays_at_a_few_pieces_whatever_the_size_of_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem.hf.stored_model.PIECE_BYTES", 4096)
    int8_folder(tmp_path / "int8")
    seen = []
    from lowmem.hf import stored_model

    original = stored_model.dequantize_rows

    def dequantize(codes, scales, group):
        seen.append(codes.numel())
        return original(codes, scales, group)

    monkeypatch.setattr(stored_model, "dequantize_rows", dequantize)
    export(str(tmp_path / "int8"))
    assert max(seen) <= 1024
    assert len(seen) > 10


def test_files_of_training_are_not_copied_and_those_of_the_tokenizer_are(tmp_path):
    int8_folder(tmp_path / "int8")
    for name in ("optimizer.pt", "trainer_state.json", "manifest.json", "interval.json", "training_args.bin"):
        (tmp_path / "int8" / name).write_text("{}")
    (tmp_path / "int8" / "chat_template.jinja").write_text("{{ messages }}")
    done = export(str(tmp_path / "int8"))
    names = {path.name for path in done.folder.iterdir()}
    assert {
        "config.json",
        WEIGHTS,
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    } <= names
    assert not names & {
        "optimizer.pt",
        "trainer_state.json",
        "manifest.json",
        "interval.json",
        "training_args.bin",
    }


def test_a_float_folder_changes_its_dtype(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "float")
    done = export(str(tmp_path / "float"), dtype="bfloat16")
    assert equal(
        load_file(done.folder / WEIGHTS),
        {name: value.bfloat16() for name, value in model.state_dict().items()},
    )


# ---------------------------------------------------------------- what is refused


def refused(capsys, *arguments: str) -> str:
    assert main(["export", *arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_nothing_is_overwritten(tmp_path, capsys):
    int8_folder(tmp_path / "int8")
    (tmp_path / "there").mkdir()
    said = refused(capsys, str(tmp_path / "int8"), "--out", str(tmp_path / "there"))
    assert "exists and is not overwritten. Choose another folder with --out." in said
    assert not list((tmp_path / "there").iterdir())


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{UP}.weight_scales"), f"{UP}.weight_scales is missing, without which"),
        (lambda t: t.pop(f"{UP}.weight_codes"), f"{UP}.weight_scales has no {UP}.weight_codes beside it"),
        (lambda t: t.update({f"{UP}.weight_codes": t[f"{UP}.weight_codes"].float()}), "is no matrix of int8"),
        (
            lambda t: t.update({f"{UP}.weight_codes": t[f"{UP}.weight_codes"].T.contiguous()}),
            f"{UP}.weight_scales is (24, 2) of F32, and groups of 8 need (16, 3)",
        ),
    ],
    ids=["no scales", "no codes", "float codes", "flipped codes"],
)
def test_tensors_that_do_not_go_together_are_named_and_nothing_is_left(tmp_path, capsys, edit, said):
    int8_folder(tmp_path / "int8")
    change(tmp_path / "int8", edit)
    assert said in refused(capsys, str(tmp_path / "int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_a_value_too_large_for_float16_is_named(tmp_path):
    int8_folder(tmp_path / "int8")
    change(tmp_path / "int8", lambda t: t[f"{UP}.weight_scales"].fill_(1e6))
    with pytest.raises(RecipeError, match=r"up_proj.weight_codes holds values too large for float16"):
        export(str(tmp_path / "int8"), dtype="float16")


def test_what_is_no_model_is_said_to_be_none(tmp_path, capsys):
    assert "there is no folder" in refused(capsys, str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    said = refused(capsys, str(tmp_path / "empty"))
    assert "has no config.json" in said
    assert "model.name_or_path" not in said
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    assert "save.merge_lora" in refused(capsys, str(tmp_path / "adapters"))
    int8_folder(tmp_path / "int8")
    assert "--dtype" in refused(capsys, str(tmp_path / "int8"), "--dtype", "int4")


def test_weights_that_others_have_quantised_are_left_to_them(tmp_path, capsys):
    int8_folder(tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config))
    assert "quantised by awq" in refused(capsys, str(tmp_path / "int8"))


def test_a_file_cut_short_is_named(tmp_path, capsys):
    int8_folder(tmp_path / "int8")
    file = tmp_path / "int8" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file}" in refused(capsys, str(tmp_path / "int8"))


def test_a_full_disk_is_said_before_it_is_full(tmp_path, monkeypatch):
    int8_folder(tmp_path / "int8")
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("lowmem.hf.export.shutil.disk_usage", lambda path: usage)
    with pytest.raises(FaultError, match=r"has 100 B free and the exported model needs|has 100 bytes free"):
        export(str(tmp_path / "int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_the_verb_prints_what_it_wrote(tmp_path, capsys):
    int8_folder(tmp_path / "int8")
    assert main(["export", str(tmp_path / "int8"), "--json", "--dtype", "float16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == f"{tmp_path}/int8-float16"
    assert found["dtype"] == "float16"
    assert found["bytes"] > 0
    assert main(["export", str(tmp_path / "int8"), "--out", str(tmp_path / "plain")]) == 0
    assert f"written to {tmp_path}/plain" in capsys.readouterr().out
