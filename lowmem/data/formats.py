"""The five shapes of a row, all turned into one conversation or one text.

| format          | keys of a row                                                                        |
|-----------------|--------------------------------------------------------------------------------------|
| alpaca          | instruction, input (may be empty), output; also system, history ([question, answer]) |
| sharegpt        | conversations: [{from, value}]; also system                                          |
| messages        | messages: [{role, content}]                                                          |
| prompt_response | prompt and response, or question and answer, or prompt and completion; also system   |
| text            | text                                                                                 |

Other keys are left alone. Every text must be a string; answers and prompts must not be blank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowmem.data.bad_rows import RowError

Message = dict[str, str]  # role, content; the user turn of an alpaca row with input also keeps the two apart

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
PAIRS = (("prompt", "response"), ("question", "answer"), ("prompt", "completion"))
NOT_RENDERED = ("tool_calls", "function_call", "reasoning_content", "thinking")


def conversation(value: Any, format: str) -> list[Message]:
    """The messages of one row, from an optional system turn to the last answer.

    Raises RowError that says everything that is wrong with the row's keys. What follows the last
    assistant turn is left out: nothing there is an answer.
    """
    messages = _READERS[format](_object(value))
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise RowError("there is no assistant turn to train on")
    if messages[0]["role"] == "assistant":
        raise RowError("it starts with an assistant turn; there is nothing to answer")
    return messages[: last + 1]


def document(value: Any) -> str:
    """The text of a row of format `text`; RowError when it is missing, blank or not a string."""
    return _text(_object(value), "text")


def _alpaca(row: dict[str, Any]) -> list[Message]:
    _require(row, "alpaca", "instruction", "output")
    instruction = _text(row, "instruction", may_be_blank=True)
    extra = _text(row, "input", may_be_blank=True) if row.get("input") is not None else ""
    if not (instruction + extra).strip():
        raise RowError("instruction and input are both empty")
    asked: Message = {"role": "user", "content": "\n\n".join(t for t in (instruction, extra) if t.strip())}
    if instruction.strip() and extra.strip():
        asked |= {"instruction": instruction, "input": extra}
    answer: Message = {"role": "assistant", "content": _text(row, "output")}
    return [*_system(row), *_history(row.get("history") or []), asked, answer]


def _history(turns: Any) -> list[Message]:
    messages: list[Message] = []
    for number, pair in enumerate(_list(turns, "history"), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history {number} is not a pair of question and answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _checked(text, f"history {number} ({role})")})
    return messages


def _sharegpt(row: dict[str, Any]) -> list[Message]:
    _require(row, "sharegpt", "conversations")
    return _system(row) + _turns(row["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)


def _messages(row: dict[str, Any]) -> list[Message]:
    _require(row, "messages", "messages")
    return _turns(row["messages"], "messages", "role", "content", {role: role for role in ROLES})


def _turns(turns: Any, name: str, role_key: str, text_key: str, roles: dict[str, str]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(_list(turns, name), 1):
        place = f"{name} {number}"
        if not isinstance(turn, dict):
            raise RowError(f"{place} is {_kind(turn)}, not an object with {role_key} and {text_key}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise RowError(f"{place} has {role_key} {role!r}; known are {', '.join(roles)}")
        lost = [key for key in NOT_RENDERED if turn.get(key)]
        if lost:
            raise RowError(f"{place} has {', '.join(lost)}, which would be lost; write it into {text_key}")
        if text_key not in turn:
            raise RowError(f"{place} has no {text_key} (it has {', '.join(turn)})")
        is_system = roles[role] == "system"
        text = _checked(turn[text_key], f"{place} {text_key}", may_be_blank=is_system)
        if text.strip():
            messages.append({"role": roles[role], "content": text})
    return messages


def _prompt_response(row: dict[str, Any]) -> list[Message]:
    pair = next((pair for pair in PAIRS if all(key in row for key in pair)), None)
    if pair is None:
        pairs = ", or ".join(" and ".join(pair) for pair in PAIRS)
        raise RowError(f"format prompt_response needs {pairs}; the row has {', '.join(row) or 'no keys'}")
    asked, answer = (_text(row, key) for key in pair)
    return [*_system(row), {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


_READERS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_response": _prompt_response,
}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"the row is {_kind(value)}, not an object")
    return value


def _require(row: dict[str, Any], format: str, *keys: str) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        has = ", ".join(row) or "no keys"
        raise RowError(f"format {format} needs {' and '.join(missing)}; the row has {has}")


def _system(row: dict[str, Any]) -> list[Message]:
    if row.get("system") is None:
        return []
    text = _text(row, "system", may_be_blank=True)
    return [{"role": "system", "content": text}] if text.strip() else []


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{name} is {_kind(value)}, not a list")
    return value


def _text(row: dict[str, Any], key: str, *, may_be_blank: bool = False) -> str:
    if key not in row:
        raise RowError(f"there is no {key}; the row has {', '.join(row) or 'no keys'}")
    return _checked(row[key], key, may_be_blank=may_be_blank)


def _checked(value: Any, name: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {_kind(value)}, not a text")
    if not value.strip() and not may_be_blank:
        raise RowError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{name} holds half a character (\\u{ord(value[error.start]):04x}) at position {error.start}"
        ) from error
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
