"""The named templates once more, in plain Python: [(text, is it trained), ...] of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Messages = Sequence[dict[str, str]]
Parts = list[tuple[str, bool]]


def _plain(messages: Messages, bos: str, eos: str) -> Parts:
    return [
        (m["content"] + eos, True) if m["role"] == "assistant" else (m["content"] + "\n", False)
        for m in messages
    ]


def _chatml(messages: Messages, bos: str, eos: str) -> Parts:
    parts: Parts = []
    for m in messages:
        parts += [
            (f"<|im_start|>{m['role']}\n", False),
            (m["content"] + "<|im_end|>", m["role"] == "assistant"),
        ]
        parts += [("\n", False)]
    return parts


def _llama3(messages: Messages, bos: str, eos: str) -> Parts:
    parts: Parts = [(bos, False)]
    for m in messages:
        parts += [(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False)]
        parts += [(m["content"] + "<|eot_id|>", m["role"] == "assistant")]
    return parts


def _pairs(messages: Messages) -> tuple[str, list[tuple[str, str]]]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    texts = [m["content"] for m in messages if m["role"] != "system"]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def _llama2(messages: Messages, bos: str, eos: str) -> Parts:
    system, pairs = _pairs(messages)
    parts: Parts = []
    for number, (question, answer) in enumerate(pairs):
        lead = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and not number else ""
        parts += [(f"{bos}[INST] {lead}{question} [/INST]", False), (f" {answer} {eos}", True)]
    return parts


def _mistral(messages: Messages, bos: str, eos: str) -> Parts:
    system, pairs = _pairs(messages)
    parts: Parts = [(bos, False)]
    for number, (question, answer) in enumerate(pairs):
        lead = f"{system}\n\n" if system and not number else ""
        parts += [(f"[INST] {lead}{question} [/INST]", False), (f" {answer}{eos}", True)]
    return parts


def _gemma(messages: Messages, bos: str, eos: str) -> Parts:
    system, pairs = _pairs(messages)
    parts: Parts = [(bos, False)]
    for number, (question, answer) in enumerate(pairs):
        lead = f"{system}\n\n" if system and not number else ""
        parts += [(f"<start_of_turn>user\n{lead}{question}<end_of_turn>\n<start_of_turn>model\n", False)]
        parts += [(f"{answer}<end_of_turn>", True), ("\n", False)]
    return parts


def _alpaca(messages: Messages, bos: str, eos: str) -> Parts:
    system, pairs = _pairs(messages)
    told = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    parts: Parts = [((system or told) + "\n\n", False)]
    for number, (question, answer) in enumerate(pairs):
        gap = "\n\n" if number else ""
        parts += [(f"{gap}### Instruction:\n{question}\n\n### Response:\n", False), (answer + eos, True)]
    return parts


WRITTEN: dict[str, Callable[[Messages, str, str], Parts]] = {
    "plain": _plain,
    "chatml": _chatml,
    "llama2": _llama2,
    "llama3": _llama3,
    "mistral": _mistral,
    "gemma": _gemma,
    "alpaca": _alpaca,
}
