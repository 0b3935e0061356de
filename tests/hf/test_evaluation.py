"""Held-out loss and exact match, on runs and on untrained models."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaForCausalLM, set_seed

import lowmem.hf.ending
import lowmem.hf.held_out
from lowmem.data.batches import collate
from lowmem.data.example import Question
from lowmem.errors import RecipeError
from lowmem.hf.answer_end import AnswerEnd, answer_end
from lowmem.hf.evaluation import evaluate
from lowmem.hf.flow import train
from lowmem.hf.held_out import batches_of_this_process, exact_match, held_out_loss, perplexity
from lowmem.memory.owners import owned_tensors
from lowmem.memory.tracker import ByteTracker
from lowmem.recipe.load import load_recipe
from tests.hf.tiny_runs import (
    CHARACTERS,
    character_tokenizer,
    tiny_config,
    tiny_recipe,
    write_model,
    write_recipe,
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model():
    """Weights larger than usual, so that different prompts get different answers."""
    set_seed(3)
    made = LlamaForCausalLM(tiny_config())
    with torch.no_grad():
        for param in made.parameters():
            param.mul_(6 if param.dim() == 2 else 1)
    return made.train()


def likeliest_answer(model, prompt_ids, max_new_tokens, ends):
    """Greedy decoding in its plainest form: everything is read again for every token."""
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]


def prompt_with_a_varied_answer(model):
    """(prompt ids, the eight ids of its answer, the first five all different)."""
    for start in range(4, 90):
        prompt = [start, start + 3, start + 7]
        answer = likeliest_answer(model, prompt, 8, set())
        if len(set(answer[:5])) == 5 and min(answer) > 2:
            return prompt, answer
    raise AssertionError("every answer of this model repeats itself")


def test_batches_padded_on_the_left_answer_like_single_prompts(model):
    tokenizer = character_tokenizer()
    draw = torch.Generator().manual_seed(0)
    questions = []
    for length in (3, 11, 5, 2, 8, 9, 4):
        prompt = torch.randint(4, 100, (length,), generator=draw).tolist()
        answer = tokenizer.decode(likeliest_answer(model, prompt, 6, {1}))
        questions.append(Question(prompt, f"  {answer}\n"))
    assert len({question.answer for question in questions}) > 3
    settings = {"end": AnswerEnd([1], None), "max_new_tokens": 6}
    assert exact_match(model, tokenizer, questions, batch_size=4, **settings) == 1.0
    assert model.training, "the model is as it was"
    wrong = [Question(question.prompt_ids, question.answer + "!") for question in questions[:3]] + questions[
        3:
    ]
    assert exact_match(model, tokenizer, wrong, batch_size=3, **settings) == pytest.approx(4 / 7)


def test_an_answer_ends_at_any_of_its_end_tokens_and_settings_of_the_model_do_not_leak_in(model):
    tokenizer = character_tokenizer()
    prompt, whole = prompt_with_a_varied_answer(model)
    stop, expected = whole[3], tokenizer.decode(whole[:3])
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    settings = {"end": AnswerEnd([1, stop], None), "max_new_tokens": 8, "batch_size": 1}
    assert exact_match(model, tokenizer, [Question(prompt, expected)], **settings) == 1.0


def test_an_answer_ends_where_the_text_of_a_turn_end_begins(model):
    tokenizer = character_tokenizer()
    prompt, answer = prompt_with_a_varied_answer(model)
    text = tokenizer.decode(answer)
    questions = [Question(prompt, text[:3])]
    settings = {"max_new_tokens": 8, "batch_size": 1}
    assert exact_match(model, tokenizer, questions, end=AnswerEnd([], text[3:5]), **settings) == 1.0
    assert exact_match(model, tokenizer, questions, end=AnswerEnd([], text[4:5]), **settings) == 0.0


def test_without_questions_there_is_no_exact_match(model):
    end = AnswerEnd([1], None)
    assert exact_match(model, character_tokenizer(), [], end=end, batch_size=1, max_new_tokens=4) is None


@pytest.mark.parametrize(
    ("template", "tokens", "text"), [("plain", [1], None), ("chatml", [1], "<|im_end|>")]
)
def test_the_end_of_an_answer_is_that_of_the_template(tmp_path, model_folder, model, template, tokens, text):
    data = tiny_recipe(tmp_path, model_folder, f"data.template={template}").data
    end = answer_end(data, character_tokenizer(), model)
    assert (end.tokens, end.text) == (tokens, text)


def test_a_turn_end_that_is_one_token_ends_an_answer_as_a_token(tmp_path, model_folder, model):
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    data = tiny_recipe(tmp_path, model_folder, "data.template=chatml").data
    assert answer_end(data, tokenizer, model) == AnswerEnd([1, len(CHARACTERS)], None)


def test_all_end_tokens_of_the_model_end_an_answer(tmp_path, model_folder, model):
    model.generation_config.eos_token_id = [7, 9]
    data = tiny_recipe(tmp_path, model_folder).data
    assert answer_end(data, character_tokenizer(), model).tokens == [1, 7, 9]


def rows(count, trained=True):
    made = []
    for index in range(count):
        ids = [4 + (index * 5 + place) % 90 for place in range(4 + index % 3)]
        made.append({"input_ids": ids, "labels": ids if trained else [-100] * len(ids)})
    return made


def test_rows_without_trained_tokens_have_no_weight_in_the_loss(model):
    one = held_out_loss(model, rows(4), collate(0), batch_size=1)
    both = held_out_loss(model, [*rows(4), *rows(5, trained=False)], collate(0), batch_size=1)
    assert one == both
    loss, tokens = held_out_loss(model, rows(2, trained=False), collate(0), batch_size=1)
    assert tokens == 0
    assert math.isnan(loss)


def test_the_loss_does_not_depend_on_the_batch_size(model):
    losses = [held_out_loss(model, rows(9), collate(0), batch_size=size) for size in (1, 2, 9)]
    assert {tokens for _, tokens in losses} == {losses[0][1]}
    assert [loss for loss, _ in losses] == pytest.approx([losses[0][0]] * 3, rel=1e-5)


def test_an_evaluation_keeps_nothing_from_batch_to_batch(model):
    def peak_bytes(count):
        tracker = ByteTracker(lambda: owned_tensors(model, None))
        with tracker:
            held_out_loss(model, rows(count), collate(0), batch_size=3)
        return tracker.fullest().peak_bytes

    assert peak_bytes(30) == peak_bytes(6)


@pytest.mark.parametrize(
    ("loss", "value"), [(0.0, 1.0), (2.0, math.exp(2)), (1e5, math.inf), (math.inf, math.inf)]
)
def test_perplexity_is_the_exponential_and_infinite_where_that_is_too_large(loss, value):
    assert perplexity(loss) == value


def test_the_perplexity_of_nan_is_nan():
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_the_batches_without_gap_or_overlap(monkeypatch, world):
    class State:
        num_processes = world

        def __init__(self, index):
            self.process_index = index

    batches = []
    for index in range(world):
        monkeypatch.setattr(lowmem.hf.held_out, "PartialState", lambda index=index: State(index))
        batches += batches_of_this_process(list(range(17)), 4)
    assert sorted(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16]]


def test_an_untrained_model_is_evaluated_from_its_recipe(tmp_path, model_folder):
    found = evaluate(str(write_recipe(tmp_path, model_folder)), ["eval.max_batches=null"])
    assert list(found) == ["loss", "perplexity", "tokens", "exact_match"]
    assert found["loss"] == pytest.approx(math.log(len(CHARACTERS)), rel=0.02)
    assert found["exact_match"] == 0.0
    with open(tmp_path / "held_out.jsonl") as file:
        answers = [json.loads(line)["response"] for line in file]
    assert found["tokens"] == sum(len(answer) + 1 for answer in answers), "characters and the end of text"


def test_max_batches_takes_the_first_rows(tmp_path, model_folder):
    recipe = str(write_recipe(tmp_path, model_folder))
    whole = evaluate(recipe, ["eval.max_batches=null"])["tokens"]
    part = evaluate(recipe, ["eval.max_batches=2", "eval.batch_size=3"])["tokens"]
    assert 0 < part < whole


def test_exact_match_rises_when_the_answers_are_learnt(tmp_path, model_folder):
    write_recipe(tmp_path, model_folder)
    for name in ("train", "held_out"):
        lines = [
            json.dumps({"prompt": f"{n} is", "response": "odd" if n % 2 else "odd too"})
            for n in range(1, 41, 2)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    settings = (
        "train.max_steps=60",
        "optimizer={name: adamw, lr: 0.03}",
        "eval.loss_only=false",
        "eval.at_start=true",
    )
    recipe = load_recipe(tmp_path / "sums.yaml", [*settings, "eval.batch_size=8"])
    assert train(recipe) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    matches = [row["exact_match"] for row in logged if "exact_match" in row]
    assert matches == [0.0, 1.0]
    assert evaluate(str(tmp_path / "run"))["exact_match"] == 1.0


def test_a_run_without_final_model_is_evaluated_at_its_newest_checkpoint(tmp_path, model_folder, capsys):
    assert (
        train(tiny_recipe(tmp_path, model_folder, "save.every=2", "save.model=false", "train.max_steps=4"))
        == 0
    )
    found = evaluate(str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)
    assert "using checkpoint-4" in capsys.readouterr().err


def test_a_recipe_without_held_out_rows_cannot_be_evaluated(tmp_path, model_folder):
    with pytest.raises(RecipeError, match=r"data\.eval: the recipe names no held-out rows"):
        evaluate(str(write_recipe(tmp_path, model_folder)), ["data.eval=null"])


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"is not a run folder: it holds no recipe\.yaml"):
        evaluate(str(tmp_path))


def test_adapters_on_a_model_of_another_size_are_an_error(tmp_path, model_folder):
    assert train(tiny_recipe(tmp_path, model_folder, "lora.r=2", "train.max_steps=1")) == 0
    other = tmp_path / "other"
    LlamaForCausalLM(tiny_config(hidden_size=32)).save_pretrained(other)
    character_tokenizer().save_pretrained(other)
    with pytest.raises(RecipeError, match="do not fit .*other: .*size mismatch"):
        evaluate(str(tmp_path / "run"), [f"model.name_or_path={other}"])


def test_a_run_that_saved_nothing_is_an_error(tmp_path, model_folder):
    assert train(tiny_recipe(tmp_path, model_folder, "save.model=false", "train.max_steps=1")) == 0
    with pytest.raises(RecipeError, match="neither a final model nor a checkpoint"):
        evaluate(str(tmp_path / "run"))
