"""What the optimizers are compared on: one small pretrained LLaMA, and real text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows to be judged by. Files are named within the data folder."""

    name: str
    what: str
    train: str
    held_out: str
    form: str
    parts: tuple[str, ...] = ()
    """Overrides that say which rows are taken."""

    def overrides(self, data: Path, max_length: int) -> list[str]:
        return [
            f"model.name_or_path={data / 'stories260k'}",
            f"data={{train: {{path: {data / self.train}, format: {self.form}}}, "
            f"eval: {{path: {data / self.held_out}, format: {self.form}}}, template: plain}}",
            f"data.max_length={max_length}",
            *self.parts,
        ]


TASKS = (
    Task(
        "stories",
        "children's stories, the last tenth held out",
        "stories/child.jsonl.gz",
        "stories/child.jsonl.gz",
        "prompt_response",
        ("data.train.take=0.9", "data.eval.skip=0.9"),
    ),
    Task(
        "gsm8k",
        "school mathematics, judged on its test set",
        "gsm8k/train.jsonl.gz",
        "gsm8k/test.jsonl.gz",
        "prompt_response",
        ("data.on_bad_row=skip",),  # questions that leave no room for an answer
    ),
    Task(
        "wikitext",
        "articles of an encyclopaedia, judged on its validation set",
        "wikitext-2/train.txt.gz",
        "wikitext-2/valid.txt.gz",
        "text",
    ),
)


def task(name: str) -> Task:
    return next(each for each in TASKS if each.name == name)
