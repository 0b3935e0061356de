"""lowmem plan: what it prints, its exit codes, and what it says about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

import lowmem as package
from lowmem.memory.cards import CONTEXT_BYTES, USABLE
from lowmem.memory.ledger import PARTS
from lowmem.memory.wording import BASELINE_NAMES
from tests.cli.conftest import Command

LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "is_decoder": False}


@pytest.fixture
def llama(folder: Path) -> str:
    """A folder with the configuration of LLaMA-2-7B and nothing else."""
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps(LLAMA_7B))
    return "model.name_or_path=./llama"


def test_a_plan_prints_parts_the_moment_of_the_peak_baselines_and_the_checkpoint(lowmem: Command) -> None:
    done = lowmem("plan", "mine.yaml", "--explain", "data.max_length=64", "train.per_device_batch_size=8")
    assert done.code == 0
    for part in (
        "weights",
        "gradients",
        "optimizer state",
        "activations",
        "temporary",
        "other",
        "peak",
        "reserved",
    ):
        assert f"\n{part} " in done.out
    for baseline in BASELINE_NAMES.values():
        assert f"\n{baseline} " in done.out
    assert "backward, after the gradient of model." in done.out
    assert "No card named" in done.out
    assert "Alive at the peak, largest first:" in done.out
    assert "A checkpoint takes" in done.out
    assert "no GPU was used" in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines())


def test_the_json_has_the_shape_of_memory_json_and_adds_up(lowmem: Command) -> None:
    done = lowmem("plan", "mine.yaml", "--json", "--gpu", "rtx 4070", "data.max_length=64")
    found = json.loads(done.out)
    assert done.code == 0
    assert found["source"] == "planned"
    assert set(found) >= {
        "peak_bytes", "reserved_bytes", "parts", "baselines", "saved_bytes", "saved_fraction", "fits", "gpu_bytes",
        "conditions", "peak", "steps_planned", "checkpoint", "margin_bytes",
    }  # fmt: skip
    assert list(found["parts"]) == list(PARTS)
    assert sum(found["parts"].values()) == found["peak_bytes"] <= found["reserved_bytes"]
    assert sum(held["nbytes"] for held in found["largest"]) == found["peak_bytes"]
    assert found["gpu_bytes"] == 12 * 2**30
    assert found["margin_bytes"] == int(USABLE * 12 * 2**30) - CONTEXT_BYTES - found["reserved_bytes"]
    assert found["fits"] is True
    assert found["conditions"]["parameters"] == 826_560
    assert all(one["source"] == "formula" for one in found["baselines"].values())
    assert found["saved_bytes"] == found["baselines"]["adamw_fused"]["peak_bytes"] - found["peak_bytes"]


def test_a_plan_that_does_not_fit_says_what_would_and_leaves_with_three(lowmem: Command, llama: str) -> None:
    arguments = ["plan", "mine.yaml", llama, "model.dtype=bfloat16", "--formula"]
    done = lowmem(*arguments, "--gpu", "20GiB")
    assert done.code == 3
    assert "DOES NOT FIT" in done.out
    changes = json.loads(lowmem(*arguments, "--gpu", "20GiB", "--json").out)["changes_that_fit"]
    assert changes
    for change in changes:
        again = lowmem(*arguments, *change["overrides"], "--gpu", "20GiB", "--json")
        assert again.code == 0, change
        assert json.loads(again.out)["peak_bytes"] == change["peak_bytes"]


def test_seven_billion_parameters_by_formula_need_neither_torch_nor_transformers(
    folder: Path, llama: str
) -> None:
    code = (
        "import sys\nfrom lowmem.cli.main import main\n"
        f"assert main(['plan', 'mine.yaml', {llama!r}, '--formula', '--json', '--gpu', 'a100-80gb']) == 0\n"
        f"assert main(['plan', 'mine.yaml', {llama!r}, '--world', '8', '--strategy', 'zero3']) == 0\n"
        f"assert main(['plan', 'mine.yaml', {llama!r}, '--search', '--gpu', '12GiB']) in (0, 3)\n"
        "print('\\n', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    source = Path(package.__path__[0]).parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={"PYTHONPATH": str(source)},
    )
    assert not set(done.stdout.splitlines()[-1].split()) & {"torch", "transformers", "numpy", "accelerate"}


def test_a_plan_of_several_processes_says_what_each_holds_and_sends(lowmem: Command, llama: str) -> None:
    arguments = ["plan", "mine.yaml", llama, "model.dtype=bfloat16", "--world", "8", "--strategy", "fsdp2"]
    done = lowmem(*arguments, "--gpu", "24GiB", "--explain")
    assert done.code == 0, done.out + done.err
    text = " ".join(done.out.split())
    for says in (
        "tokens a step in each process", "The fullest of 8 processes under fsdp2.", "matrices whole, for all",
        "for fsdp2 itself", "gathered weights of two units", "NCCL's buffers", "is of one device",
    ):  # fmt: skip
        assert says in text
    found = json.loads(lowmem(*arguments, "--json").out)
    assert found["processes"]["world"] == found["conditions"]["world_size"] == 8
    assert (
        sum(found["parts"].values())
        == sum(held["nbytes"] for held in found["largest"])
        == found["peak_bytes"]
    )
    assert found["baselines"]["adamw_fused"]["peak_bytes"] > found["peak_bytes"]


def test_processes_and_strategies_that_fit_are_named(lowmem: Command, llama: str) -> None:
    arguments = ["plan", "mine.yaml", llama, "model.dtype=bfloat16", "--gpu", "12GiB"]
    done = lowmem(*arguments, "--world", "4", "--strategy", "zero2")
    assert done.code == 3
    assert "Would fit (by formula):" in done.out
    changes = json.loads(lowmem(*arguments, "--world", "4", "--strategy", "zero2", "--json").out)[
        "changes_that_fit"
    ]
    assert changes
    for change in changes:
        options = [word for override in change["overrides"] for word in override.split()]
        again = json.loads(lowmem(*arguments, *options, "--json").out)
        assert again["fits"] is True
        assert again["peak_bytes"] == change["peak_bytes"]


def test_a_search_lists_methods_with_their_longest_rows(lowmem: Command, llama: str) -> None:
    found = json.loads(
        lowmem("plan", "mine.yaml", llama, "--search", "--gpu", "20GiB", "model.dtype=bfloat16", "--json").out
    )
    reached = {(one["method"], one["activation_checkpointing"]): one for one in found["methods"]}
    assert reached["qlora_r16", True]["longest"] >= reached["lora_r16", True]["longest"] > 0
    assert reached["adamw_fused", True]["longest"] == 0
    table = lowmem("plan", "mine.yaml", llama, "--search", "--gpu", "20GiB", "model.dtype=bfloat16").out
    assert "QLoRA r=16" in table
    assert "Does not fit at any length: " in table


def test_the_bars_are_drawn_into_a_file_that_can_be_decoded(lowmem: Command, folder: Path) -> None:
    assert lowmem("plan", "mine.yaml", "--formula", "--gpu", "8GiB", "--png", "plan.png").code == 0
    assert imread(folder / "plan.png").ndim == 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--gpu", "rtx4o70"], 2, "Did you mean rtx4070"),
        (["--gpu", "12potatoes"], 2, "as 12GiB"),
        (["--gpu=-3GiB"], 2, "is not the size of a GPU"),
        (["--search"], 2, "--search needs a card"),
        (["model.name_or_path=./empty"], 2, "has no config.json"),
        (["model.name_or_path=./empty", "--formula"], 2, "has no config.json"),
        (["model.name_or_path=./t5"], 2, "causal language model"),
        (["model.name_or_path=./bert", "--formula"], 4, "bert"),
        (["model.name_or_path=nobody/nothing"], 2, "huggingface.co"),
        (["model.name_or_path=nobody/nothing", "--formula"], 2, "huggingface.co"),
        (["optimizer.target=[nosuch]"], 2, "nosuch"),
        (["--png", "nowhere/plan.png"], 2, "nowhere"),
        (["--world", "0", "--strategy", "ddp"], 2, "from 1 to 16384"),
        (["--world", "two"], 2, "invalid int value"),
        (["--world", "8"], 2, "Add --strategy with one of ddp, fsdp2"),
        (["--world", "8", "--strategy", "zero4"], 2, "strategies are ddp, fsdp2"),
        (["--strategy", "zero3"], 2, "needs the number of processes: --world"),
        (["--search", "--gpu", "12GiB", "--world", "8"], 2, "--search is of one device"),
        (["--world", "8", "distributed.strategy=fsdp2", "model.weights=int8"], 4, "accelerate/ddp.yaml"),
        (["--world", "8", "--strategy", "ddp", "model.weights=int8"], 4, "int8 has no formula"),
        (["--world", "8", "--strategy", "zero3", "train.execution=fused"], 4, "Set train.execution: auto"),
        (["--world", "8", "--strategy", "zero2", "lora={r: 4}"], 4, "--strategy ddp"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_in_a_line(lowmem: Command, folder: Path, arguments, code, says) -> None:
    (folder / "empty").mkdir()
    (folder / "bert").mkdir()
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (folder / "bert" / "config.json").write_text(json.dumps(BERT))
    done = lowmem("plan", "mine.yaml", *arguments)
    assert done.code == code, done.err + done.out
    assert says in done.err
    assert "Traceback" not in done.err
