"""Rules between keys, and the files a recipe names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.errors import RecipeError
from lowmem.recipe.load import load_recipe
from tests.recipe.written import SMALL, problems_of, with_lines, write


def with_train(text: str) -> str:
    """A recipe whose data.train is `text`, on line 3."""
    return SMALL.replace("{builtin: arithmetic}", f"{{{text}}}")


@pytest.fixture
def rows() -> Path:
    return write("{}\n", "rows.jsonl")


def test_a_source_needs_exactly_one_of_path_hub_and_builtin() -> None:
    (none,) = problems_of(with_train("take: 3"))
    assert none == (
        "r.yaml:3: data.train needs exactly one of path, hub, builtin; found none of them. "
        "Add one, for example builtin: arithmetic."
    )
    (two,) = problems_of(with_train("hub: a/b, builtin: arithmetic"))
    assert two.endswith("found hub and builtin. Keep one.")


@pytest.mark.usefixtures("rows")
def test_a_format_is_required_with_path_and_hub_and_refused_with_builtin() -> None:
    for source in ("path: rows.jsonl", "hub: a/b"):
        (problem,) = problems_of(with_train(source))
        assert problem.startswith("r.yaml:3: data.train.format is missing;")
        assert load_recipe(write(with_train(f"{source}, format: alpaca"))).data.train.format == "alpaca"
    (problem,) = problems_of(with_train("builtin: arithmetic, format: alpaca"))
    assert problem == "r.yaml:3: data.train.format does not go with builtin. Delete it."


NF4 = SMALL.replace("tiny-llama}", "tiny-llama, weights: nf4}")


def test_four_bit_weights_need_adapters_and_keep_them_apart() -> None:
    assert problems_of(NF4) == [
        "r.yaml:1: model.weights: nf4 needs lora:, and there is none: 4-bit codes are too coarse to be updated. "
        "Add lora: {r: 16}, or use model.weights: bf16."
    ]
    assert load_recipe(write(NF4 + "lora: {r: 16}\n")).model.weights == "nf4"
    assert problems_of(NF4 + "lora: {r: 16}\nsave: {merge_lora: true}\n") == [
        "r.yaml:8: save.merge_lora would round the adapters into the 4-bit codes of model.weights: nf4. "
        "Delete save.merge_lora, and merge the saved adapters into the model in bfloat16."
    ]


def test_int8_weights_go_without_adapters() -> None:
    int8 = NF4.replace("nf4", "int8")
    assert load_recipe(write(int8)).model.weights == "int8"
    assert problems_of(int8 + "lora: {r: 16}\n") == [
        "r.yaml:1: model.weights: int8 is for training every parameter, and lora: trains adapters alone. "
        "Use model.weights: nf4 or bf16."
    ]


def test_settings_of_int8_weights_need_int8_weights() -> None:
    float_weights = NF4.replace("nf4", "bf16")
    for written, dotted in (("model.int8.embeddings", "model.int8"), ("save.int8", "save.int8")):
        with pytest.raises(RecipeError) as raised:
            load_recipe(write(float_weights), [f"{written}=true"])
        (problem,) = raised.value.problems
        assert f"{dotted} needs model.weights: int8, and the weights are not." in problem
        assert load_recipe(write(float_weights.replace("bf16", "int8")), [f"{written}=true"])
    assert load_recipe(write(float_weights), ["save.int8=false", "model.int8=null"])


@pytest.mark.parametrize("line", ["", "  activation_checkpointing: false\n"])
def test_activation_offload_needs_activation_checkpointing(line: str) -> None:
    (problem,) = problems_of(with_lines(f"train:\n  activation_offload: true\n{line}"))
    assert problem == (
        "r.yaml:8: train.activation_offload moves what activation checkpointing keeps, and that is off. "
        "Add train.activation_checkpointing: true, or delete train.activation_offload."
    )
    text = with_lines("train: {activation_offload: true, activation_checkpointing: true}\n")
    assert load_recipe(write(text)).train.activation_offload
    assert not load_recipe(write(with_lines("train: {activation_offload: false}\n"))).train.activation_offload


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("source", "stranger"),
    [
        ("path: rows.jsonl, format: text", "split: train"),
        ("path: rows.jsonl, format: text", "name: main"),
        ("path: rows.jsonl, format: text", "size: 3"),
        ("hub: a/b, format: text", "size: 3"),
        ("builtin: arithmetic", "name: main"),
    ],
)
def test_a_key_of_another_kind_of_source_is_refused(source: str, stranger: str) -> None:
    (problem,) = problems_of(with_train(f"{source}, {stranger}"))
    assert problem.endswith(
        f".{stranger.partition(':')[0]} does not go with {source.partition(':')[0]}. Delete it."
    )


def test_names_of_builtins_and_templates_are_checked_with_did_you_mean() -> None:
    problems = problems_of(with_train("builtin: arithmatic"))
    assert (
        "data.train.builtin is arithmatic, which is no data set. Did you mean arithmetic? Known: "
        in problems[0]
    )
    text = SMALL.replace("data:\n", "data:\n  template: chatmll\n")
    (problem,) = problems_of(text)
    assert problem.startswith("r.yaml:3: data.template is chatmll, which is no template")
    assert "Did you mean chatml?" in problem


def test_a_split_of_a_builtin_is_train_or_held_out() -> None:
    assert (
        load_recipe(write(with_train("builtin: arithmetic, split: held_out"))).data.train.split == "held_out"
    )
    (problem,) = problems_of(with_train("builtin: arithmetic, split: test"))
    assert "with builtin it must be one of train, held_out." in problem
    assert load_recipe(write(with_train("hub: a/b, format: text, split: test"))).data.train.split == "test"


@pytest.mark.parametrize(
    ("take", "is_allowed"), [("0.5", True), ("1", True), ("20", True), ("1.5", False), ("0", False)]
)
def test_take_is_a_number_of_rows_or_a_fraction(take: str, is_allowed: bool) -> None:
    text = with_train(f"builtin: arithmetic, take: {take}")
    if is_allowed:
        assert load_recipe(write(text)).data.train.take == float(take)
    else:
        assert problems_of(text)[0].startswith(f"r.yaml:3: data.train.take is {take}; it must be ")


@pytest.mark.usefixtures("rows")
def test_a_data_file_that_does_not_exist_is_reported_at_its_line_with_the_nearest_name() -> None:
    assert problems_of(with_train("path: row.jsonl, format: text")) == [
        "r.yaml:3: data.train.path is row.jsonl, a file that does not exist. Did you mean rows.jsonl?"
    ]
    (problem,) = problems_of(with_train("path: deep/er/x, format: text"))
    assert problem.endswith("Relative paths start at the folder you run lowmem in.")
    (problem,) = problems_of(with_train("path: ., format: text"))
    assert problem == "r.yaml:3: data.train.path is ., a folder. Name the file in it."


@pytest.mark.parametrize("path", ["x" * 5000, "a\\u0007b", "/proc/self/mem/x"])
def test_a_path_no_file_system_takes_is_reported_like_a_missing_one(path: str) -> None:
    (problem,) = problems_of(with_train(f'path: "{path}", format: text'))
    assert "a file that does not exist" in problem


def test_a_template_file_must_exist() -> None:
    text = SMALL.replace("data:\n", "data:\n  template: my.jinja\n")
    assert "data.template is my.jinja, a file that does not exist." in problems_of(text)[0]
    Path("my.jinja").write_text("x")
    assert load_recipe(write(text)).data.template == "my.jinja"


@pytest.mark.parametrize("wish", ["every: 10", "at_start: true", "loss_only: false"])
def test_evaluation_needs_held_out_rows(wish: str) -> None:
    (problem,) = problems_of(with_lines(f"eval: {{{wish}}}\n"))
    name = wish.partition(":")[0]
    assert problem == (
        f"r.yaml:7: eval.{wish} needs data.eval, and there is none. Add data.eval, or delete eval.{name}."
    )
    text = with_lines(f"eval: {{{wish}}}\n").replace("data:\n", "data:\n  eval: {builtin: arithmetic}\n")
    assert load_recipe(write(text)).data.eval is not None


def test_the_defaults_of_eval_need_no_held_out_rows() -> None:
    assert (
        load_recipe(
            write(with_lines("eval: {loss_only: true, max_batches: 3, at_start: false}\n"))
        ).eval.every
        is None
    )


@pytest.mark.usefixtures("rows")
def test_text_rows_have_no_answers_to_compare() -> None:
    text = with_lines("eval: {loss_only: false}\n")
    text = text.replace("data:\n", "data:\n  eval: {path: rows.jsonl, format: text}\n")
    (problem,) = problems_of(text)
    assert problem.startswith("r.yaml:8: eval.loss_only: false generates answers")


def test_merging_adapters_needs_adapters() -> None:
    (problem,) = problems_of(with_lines("save: {merge_lora: true}\n"))
    assert problem.startswith("r.yaml:7: save.merge_lora needs lora:")
    assert load_recipe(write(with_lines("save: {merge_lora: true}\nlora: {}\n"))).save.merge_lora


def test_resume_is_auto_never_or_a_folder_that_exists() -> None:
    Path("run/checkpoint-3").mkdir(parents=True)
    for value in ("auto", "never", "run/checkpoint-3"):
        assert load_recipe(write(with_lines(f"resume: {value}\n"))).resume == value
    (problem,) = problems_of(with_lines("resume: run/checkpoint-4\n"))
    assert "it must be auto, never or a checkpoint folder that exists." in problem
    assert problems_of(with_lines("resume: nevr\n"))[0].endswith("Did you mean never?")


@pytest.mark.parametrize("name", ["builtin:tiny", "./model", "/no/such/folder", "../x"])
def test_a_model_that_cannot_be_there_is_reported(name: str) -> None:
    (problem,) = problems_of(SMALL.replace("builtin:tiny-llama", name))
    assert problem.startswith(f"r.yaml:1: model.name_or_path is {name}")


def test_a_model_of_the_hub_or_a_folder_that_exists_is_accepted() -> None:
    Path("model").mkdir()
    for name in ("meta-llama/Llama-3.1-8B", "./model", "model"):
        recipe = load_recipe(write(SMALL.replace("builtin:tiny-llama", name)))
        assert recipe.model.name_or_path == name


def test_the_recipe_of_an_old_run_loads_though_its_files_are_gone() -> None:
    text = with_train("path: gone.jsonl, format: text").replace("builtin:tiny-llama", "/gone")
    text += "resume: gone/checkpoint-1\n"
    assert len(problems_of(text)) == 3
    assert load_recipe(write(text), files_must_exist=False).data.train.path == "gone.jsonl"
