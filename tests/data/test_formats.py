from __future__ import annotations

import pytest

from lowmem.data.bad_rows import RowError
from lowmem.data.formats import conversation, document


def turns(value, format):
    return [(message["role"], message["content"]) for message in conversation(value, format)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "response": "4"},
        {"question": "2 + 2?", "answer": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": "2 + 2?", "response": "4", "answer": "not this", "file": 7},
    ],
)
def test_prompt_response_takes_three_pairs_of_names(row):
    assert turns(row, "prompt_response") == [("user", "2 + 2?"), ("assistant", "4")]


def test_alpaca_joins_instruction_and_input_and_takes_the_output():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "The sum is 4.", "answer": "4"}
    assert turns(row, "alpaca") == [("user", "Add.\n\n2 and 2"), ("assistant", "The sum is 4.")]
    assert turns({"instruction": "Add.", "input": "", "output": "4"}, "alpaca")[0] == ("user", "Add.")
    assert turns({"instruction": "Add.", "input": None, "output": "4"}, "alpaca")[0] == ("user", "Add.")
    assert turns({"instruction": "", "input": "Add.", "output": "4"}, "alpaca")[0] == ("user", "Add.")


def test_alpaca_history_and_system_come_first():
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be short."}
    assert turns(row, "alpaca") == [
        ("system", "Be short."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]


def test_sharegpt_names_become_roles_and_what_follows_the_last_answer_goes():
    row = {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": "weather()"},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Sunny."},
            {"from": "human", "value": "Thanks"},
        ]
    }
    assert turns(row, "sharegpt") == [
        ("user", "Weather?"),
        ("assistant", "weather()"),
        ("tool", "sun"),
        ("assistant", "Sunny."),
    ]


def test_messages_are_taken_as_they_are():
    row = {
        "messages": [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b", "name": None}]
    }
    assert turns(row, "messages") == [("user", " a "), ("assistant", "b")]


def test_text_is_taken_as_it_is():
    assert document({"text": " a\n\nb "}) == " a\n\nb "


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("prompt_response", ["a", "b"], "the row is a list, not an object"),
        ("prompt_response", None, "the row is null, not an object"),
        ("prompt_response", {}, "needs prompt and response, or question and answer.*the row has no keys"),
        ("prompt_response", {"prompt": "a", "output": "b"}, "the row has prompt, output"),
        ("prompt_response", {"prompt": "a", "response": None}, "response is null, not a text"),
        ("prompt_response", {"prompt": "a", "response": 4}, "response is a number, not a text"),
        ("prompt_response", {"prompt": "a", "response": " \n"}, "response is empty"),
        ("prompt_response", {"prompt": "", "response": "b"}, "prompt is empty"),
        (
            "prompt_response",
            {"prompt": "a", "response": "b\ud83d"},
            r"half a character \(\\ud83d\) at position 1",
        ),
        ("alpaca", {"instruction": "a", "answer": "b"}, "needs output; the row has instruction, answer"),
        ("alpaca", {"x": 1}, "needs instruction and output"),
        ("alpaca", {"instruction": "", "input": " ", "output": "b"}, "instruction and input are both empty"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "input is a number"),
        ("alpaca", {"instruction": "a", "output": ""}, "output is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "history 1 is not a pair"),
        ("sharegpt", {"messages": []}, "needs conversations; the row has messages"),
        ("sharegpt", {"conversations": "hello"}, "conversations is a text, not a list"),
        ("sharegpt", {"conversations": []}, "no assistant turn"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}]}, "starts with an assistant turn"),
        (
            "sharegpt",
            {"conversations": ["a"]},
            "conversations 1 is a text, not an object with from and value",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "me", "value": "a"}]},
            "conversations 1 has from 'me'; known are",
        ),
        ("sharegpt", {"conversations": [{"from": [], "value": "a"}]}, r"conversations 1 has from \[\]"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, r"conversations 1 has no value \(it has from\)"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "messages 2 content is empty",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": ["b"]}]},
            "content is a list, not a text",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "messages 2 has tool_calls, which would be lost",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
            "messages 2 has reasoning_content, which would be lost",
        ),
    ],
)
def test_a_bad_row_says_what_is_wrong(format, row, message):
    with pytest.raises(RowError, match=message):
        conversation(row, format)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a", "the row is a text"),
        ({"content": "a"}, "no text; the row has content"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_a_bad_text_row_says_what_is_wrong(row, message):
    with pytest.raises(RowError, match=message):
        document(row)
