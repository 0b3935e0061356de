"""What the optimizers are compared on: a small pretrained LLaMA, one that knows nothing, and real text."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PRETRAINED = "stories260k"
NEW_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LAST_TENTH_HELD_OUT = ("data.train.take=0.9", "data.eval.skip=0.9")


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

    starts_anew: bool = False
    """Whether a new model is trained on its first texts, instead of a pretrained one."""

    times_the_steps: int = 1

    def overrides(self, data: Path, max_length: int, seed: int) -> list[str]:
        model = new_llama(data, seed) if self.starts_anew else data / PRETRAINED
        return [
            f"model.name_or_path={model}",
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
        LAST_TENTH_HELD_OUT,
    ),
    Task(
        "stories, long",
        "the same stories, and four times as many steps",
        "stories/child.jsonl.gz",
        "stories/child.jsonl.gz",
        "prompt_response",
        LAST_TENTH_HELD_OUT,
        times_the_steps=4,
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
    Task(
        "pretraining",
        "the same articles, and a model that starts from nothing",
        "wikitext-2/train.txt.gz",
        "wikitext-2/valid.txt.gz",
        "text",
        starts_anew=True,
        times_the_steps=3,
    ),
)


@functools.cache
def new_llama(data: Path, seed: int) -> Path:
    """A folder with a LLaMA of 1.1 million parameters that has learnt nothing, and the pretrained one's tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix=f"new-llama-{seed}-"))
    tokenizer = AutoTokenizer.from_pretrained(data / PRETRAINED)
    torch.manual_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **NEW_LLAMA)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def task(name: str) -> Task:
    return next(each for each in TASKS if each.name == name)
