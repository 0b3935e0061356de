"""Every key against its type and range, and did-you-mean for keys that do not exist."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem.recipe.foreign import FOREIGN_NAMES
from lowmem.recipe.keys import every_dotted_key
from lowmem.recipe.load import load_recipe
from tests.recipe.written import SMALL, problems_of, with_lines, write

MEANT = {
    # written (line 7 onwards), the key that the message offers
    "train: {learning_rate: 1}": "optimizer.lr",
    "learning_rate: 1": "optimizer.lr",
    "lr: 1": "optimizer.lr",
    "  lrr: 1": "optimizer.lr",
    "  ranks: 3": "optimizer.rank",
    "  update_proj_gap: 200": "optimizer.refresh_every",
    "  galore_scale: 200": "optimizer.scale",
    "  rank_: 3": "optimizer.rank",
    "  fallbak: {name: adamw}": "optimizer.fallback",
    "optim: adamw_torch": "optimizer.name",
    "optim: {rank: 3}": "optimizer",
    "optimiser: {name: galore}": "optimizer",
    "base_model: x": "model.name_or_path",
    "model_name_or_path: x": "model.name_or_path",
    "gradient_checkpointing: true": "train.activation_checkpointing",
    "train: {gradient_checkpointing: true}": "train.activation_checkpointing",
    "train: {per_device_train_batch_size: 4}": "train.per_device_batch_size",
    "micro_batch_size: 4": "train.per_device_batch_size",
    "train: {batch_size: 4}": "train.per_device_batch_size",
    "num_train_epochs: 4": "train.epochs",
    "train: {num_epochs: 4}": "train.epochs",
    "train: {warmup_ratio: 0.1}": "train.lr_scheduler.warmup_ratio",
    "warmup_ratio: 0.1": "train.lr_scheduler.warmup_ratio",
    "lr_scheduler_type: cosine": "train.lr_scheduler.name",
    "output_dir: x": "save.dir",
    "save_steps: 5": "save.every",
    "save: {directory: x}": "save.dir",
    "lora: {rank: 8}": "lora.r",
    "report: {every: 8}": "report.log_every",
    "train: {steps: 8}": "train.max_steps",
    "eval_steps: 5": "eval.every",
    "cutoff_len: 5": "data.max_length",
    "sequence_len: 5": "data.max_length",
    "max_seq_length: 5": "data.max_length",
    "max_length: 5": "data.max_length",
    "sample_packing: true": "data.packing",
    "chat_template: x": "data.template",
    "lora_rank: 3": "lora.r",
    "lora: {lora_alpha: 3}": "lora.alpha",
    "bf16: true": "model.dtype",
    "Train: {seed: 1}": "train",
    "train: {max-steps: 3}": "train.max_steps",
    "train: {Seed: 3}": "train.seed",
    "logging_steps: 1": "report.log_every",
    "resume_from_checkpoint: x": "resume",
    "per_device_batch_size: 2": "train.per_device_batch_size",
    "every: 2": "eval.every or save.every",
}


@pytest.mark.parametrize("written", MEANT)
def test_an_unknown_key_is_answered_with_the_key_that_was_meant(written: str) -> None:
    (problem,) = problems_of(with_lines(written + "\n"))
    assert problem.startswith("r.yaml:7: ")
    assert problem.endswith(f" is not a key. Did you mean {MEANT[written]}?")


def test_the_example_of_the_documentation_reads_exactly_so() -> None:
    assert problems_of(with_lines("  ranks: 8\n")) == [
        "r.yaml:7: optimizer.ranks is not a key. Did you mean optimizer.rank?"
    ]


def test_every_foreign_name_is_answered_with_a_key_that_exists_and_is_no_key_itself() -> None:
    assert set(FOREIGN_NAMES.values()) <= set(every_dotted_key())
    assert not set(every_dotted_key()) & set(FOREIGN_NAMES)


@pytest.mark.parametrize("key", ["cluster: {nodes: 2}", "telemetry: on"])
def test_a_key_nobody_meant_is_answered_with_the_keys_there_are(key: str) -> None:
    (problem,) = problems_of(with_lines(key + "\n"))
    assert problem.endswith(
        " is not a key. Keys at the top level: model, lora, data, optimizer, eval, train, save, resume, "
        "report, distributed."
    )


def test_keys_that_are_only_planned_are_unknown() -> None:
    for key in ("weights: int8", "world: 2"):
        (problem,) = problems_of(with_lines(f"train: {{{key}}}\n"))
        assert "is not a key" in problem


def test_a_dotted_key_in_a_file_is_told_to_nest() -> None:
    (problem,) = problems_of(with_lines("train.seed: 3\n"))
    assert problem == "r.yaml:7: train.seed is not a key: a recipe is nested. Write seed inside train:."


def test_all_problems_of_a_file_come_at_once_in_the_order_of_its_lines() -> None:
    problems = problems_of(
        "model: {name_or_path: 3, dtype: float16}\n"
        "data:\n"
        "  train: {builtin: arithmatic}\n"
        "  packing: maybe\n"
        "train:\n"
        "  seed: -1\n"
        "  max_steps: many\n"
        "  nope_nope: 1\n"
        "optimizer: {name: galore, lr: fast, rank: 0}\n"
        "save: {every: 0}\n"
    )
    lines = [int(problem.split(":")[1]) for problem in problems]
    assert lines == [1, 1, 3, 4, 6, 7, 8, 9, 9, 10]


REFUSED = {
    "train: {max_steps: 0}": "train.max_steps is 0; it must be a whole number >= 1, or null.",
    "train: {max_steps: 1.5}": "train.max_steps is 1.5; it must be a whole number >= 1, or null.",
    "train: {max_steps: 1e3}": "train.max_steps is 1e3; it must be a whole number >= 1, or null. Write 1000.",
    "train: {max_steps: '10'}": 'train.max_steps is "10"; it must be a whole number >= 1, or null. Remove the quotes.',
    "train: {max_steps: true}": "train.max_steps is true; it must be a whole number >= 1, or null.",
    "train: {max_steps: None}": "train.max_steps is None; it must be a whole number >= 1, or null. Write null.",
    "train: {max_steps: [1]}": "train.max_steps is [1]; it must be a whole number >= 1, or null.",
    "train: {max_steps: {a: 1}}": "train.max_steps is a section with a; it must be a whole number >= 1, or null.",
    "train: {seed: null}": "train.seed is null; it must be a whole number >= 0.",
    "train: {seed: }": "train.seed is empty; it must be a whole number >= 0.",
    "train: {seed: 1:30}": "train.seed is 1:30; it must be a whole number >= 0.",
    "train: {seed: 010}": "train.seed is 010; it must be a whole number >= 0.",
    "train: {seed: 9223372036854775808}": "train.seed is 9223372036854775808; it must be a whole number >= 0. "
    "That is more than 64 bits can hold.",
    "train: {epochs: .nan}": "train.epochs is .nan; it must be a number > 0.",
    "train: {epochs: .inf}": "train.epochs is .inf; it must be a number > 0.",
    "train: {epochs: 1e999}": "train.epochs is 1e999; it must be a number > 0.",
    "train: {epochs: false}": "train.epochs is false; it must be a number > 0.",
    "train: {epochs: 0}": "train.epochs is 0; it must be a number > 0.",
    "train: {activation_checkpointing: 1}": "train.activation_checkpointing is 1; it must be true or false.",
    "train: {loss: Chunked}": "train.loss is Chunked; it must be one of chunked, plain. Did you mean chunked?",
    "train: {lr_scheduler: cosine}": "train.lr_scheduler is cosine; it must be a section with keys: "
    "name, warmup_ratio, warmup_steps. Write lr_scheduler: {name: cosine}.",
    "train: {lr_scheduler: {warmup_ratio: 1.5}}": "train.lr_scheduler.warmup_ratio is 1.5; "
    "it must be a number >= 0 and <= 1.",
    "train: 3": "train is 3; it must be a section with keys: epochs, max_steps, per_device_batch_size, "
    "gradient_accumulation_steps, max_grad_norm, lr_scheduler, execution, activation_checkpointing, "
    "activation_offload, loss, head_gradient, seed.",
    "lora: {target: [a, 3]}": "lora.target is [a, 3]; it must be text or a list, as in [a, b]. "
    'Put it in quotes: "3".',
    "lora: {dropout: 0.95}": "lora.dropout is 0.95; it must be a number >= 0 and <= 0.9.",
    "lora:": "lora is empty. Write lora: {} for its defaults, or lora: null to leave it out.",
    "save: {dir: 2024}": 'save.dir is 2024; it must be text, or null. Put it in quotes: "2024".',
    "save: {dir: ''}": 'save.dir is ""; it must be text, or null. Empty text means nothing here.',
    "save: {model: maybe}": "save.model is maybe; it must be true or false.",
    "report: {baseline: None}": "report.baseline is None; it must be one of adamw, none. Did you mean none?",
}


@pytest.mark.parametrize("written", REFUSED)
def test_a_value_that_is_not_allowed_says_what_was_found_and_what_is(written: str) -> None:
    assert problems_of(with_lines(written + "\n")) == [f"r.yaml:7: {REFUSED[written]}"]


def test_a_section_with_nothing_under_it_is_told_what_to_do() -> None:
    (problem,) = problems_of(with_lines("save:\n"))
    assert (
        problem
        == "r.yaml:7: save is empty. Delete the line, or give it keys: dir, every, keep, optimizer_states, "
        "probe_at_start, model, merge_lora, int8."
    )


ACCEPTED: list[tuple[str, str, Any]] = [
    ("train: {epochs: 2}", "train.epochs", 2.0),
    ("train: {epochs: 1e-1}", "train.epochs", 0.1),
    ("train: {epochs: 5E2}", "train.epochs", 500.0),
    ("train: {epochs: .5}", "train.epochs", 0.5),
    ("train: {max_steps: 1_000}", "train.max_steps", 1000),
    ("train: {max_steps: null}", "train.max_steps", None),
    ("train: {max_steps: ~}", "train.max_steps", None),
    ("train: {max_grad_norm: null}", "train.max_grad_norm", None),
    ("train: {lr_scheduler: {warmup_ratio: 0}}", "train.lr_scheduler.warmup_ratio", 0.0),
    ("data: {packing: yes, train: {builtin: arithmetic}}", "data.packing", True),
    ("lora: {target: [q_proj, v_proj]}", "lora.target", ["q_proj", "v_proj"]),
    ("lora: {target: all-linear}", "lora.target", "all-linear"),
    ("lora: {}", "lora.r", 16),
    ("lora: null", "lora", None),
    ("save: {dir: 'runs/\u00e9t\u00e9 \u2603'}", "save.dir", "runs/\u00e9t\u00e9 \u2603"),
    ("model: {name_or_path: 2024-01-01}", "model.name_or_path", "2024-01-01"),
    ("report: {baseline: none}", "report.baseline", "none"),
]


@pytest.mark.parametrize(("written", "dotted", "value"), ACCEPTED)
def test_a_value_that_is_allowed_arrives_with_its_type(written: str, dotted: str, value: Any) -> None:
    section = written.split(":")[0]
    small = "".join(part for part in _sections(SMALL) if not part.startswith(section + ":"))
    found: Any = load_recipe(write(small + written + "\n"))
    for name in dotted.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def _sections(text: str) -> list[str]:
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith(" "):
            parts[-1] += line
        else:
            parts.append(line)
    return parts


def test_required_keys_that_are_missing_are_reported_at_the_line_of_their_section() -> None:
    problems = problems_of("# a comment\ntrain: {seed: 1}\ndata:\n  packing: true\noptimizer:\n  rank: 3\n")
    starts = [
        "r.yaml:2: model is missing. Add it at the top level (what is fine-tuned).",
        "r.yaml:3: data.train is missing. Add it under data (",
        "r.yaml:5: optimizer.name is missing. Add it under optimizer: one of adamw, ",
        "r.yaml:5: optimizer.lr is missing. Add it under optimizer:, for example lr: 1.0e-4.",
    ]
    assert [problem[: len(start)] for problem, start in zip(problems, starts, strict=True)] == starts


def test_the_run_folder_is_named_after_the_recipe_unless_it_is_given() -> None:
    assert load_recipe(write(SMALL, "story.yaml")).save.dir == "runs/story"
    assert load_recipe(write(with_lines("save: {dir: here}\n"))).save.dir == "here"


def test_what_a_message_quotes_is_printable_and_short() -> None:
    text = with_lines('train: {seed: "a\\u001b[31m\\nb' + "x" * 500 + '"}\n')
    (problem,) = problems_of(text)
    assert problem.isprintable()
    assert len(problem) < 200
