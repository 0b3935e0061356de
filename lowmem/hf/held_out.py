"""How good a model is on held-out rows: token-weighted loss, and answers that match exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, reduce
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lowmem.data.example import IGNORED, Question
from lowmem.hf.answer_end import AnswerEnd
from lowmem.hf.chunked_loss import loss_only
from lowmem.hf.eval_mode import eval_mode
from lowmem.hf.quiet import quiet_transformers

Item = TypeVar("Item")


def never() -> bool:
    return False


def batches_of_this_process(items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    """Every num_processes-th batch; what all processes take together does not depend on their number."""
    state = PartialState()
    starts = range(0, len(items), batch_size)
    for start in starts[state.process_index :: state.num_processes]:
        yield list(items[start : start + batch_size])


def is_divided() -> bool:
    """Whether no process has all weights, so that all of them must do the same."""
    return PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def in_step(batches: Sequence[list[Item]]) -> Iterator[tuple[list[Item], bool]]:
    """The batches of this process, and whether each counts: where weights are divided, a forward pass of one process
    needs all others, so who has fewer batches goes through one again."""
    state = PartialState()
    if not is_divided():
        yield from ((batch, True) for batch in batches[state.process_index :: state.num_processes])
        return
    for start in range(0, len(batches), state.num_processes):
        own = start + state.process_index
        yield batches[min(own, len(batches) - 1)], own < len(batches)


def summed_over_processes(*values: float, device: torch.device) -> list[float]:
    return reduce(torch.tensor(values, dtype=torch.float64, device=device), "sum").tolist()


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is beyond a float, NaN for NaN."""
    return math.exp(loss) if not loss > 700 else math.inf


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    rows: Sequence[dict[str, list[int]]],
    collate: Callable[[list[dict[str, list[int]]]], dict[str, Tensor]],
    *,
    batch_size: int,
    should_stop: Callable[[], bool] = never,
) -> tuple[float, int] | None:
    """(mean loss of all trained tokens, their number); loss is NaN when there are none.

    Only one number a batch is kept, never logits. None when `should_stop` said so.
    """
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    with eval_mode(model), loss_only(model):
        every = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        for batch, counts in in_step(every):
            if should_stop() and not is_divided():
                break
            inputs = {name: value.to(device) for name, value in collate(batch).items()}
            trained = int((inputs["labels"][..., 1:] != IGNORED).sum())
            if trained or is_divided():
                loss = model(**inputs, use_cache=False).loss.item()
                if trained and counts:
                    total += loss * trained
                    num_tokens += trained
    total, tokens, stopped = summed_over_processes(total, num_tokens, should_stop(), device=device)
    if stopped:
        return None
    return (total / tokens if tokens else math.nan), int(tokens)


def greedy_decoding(end: AnswerEnd, pad: int, max_new_tokens: int) -> GenerationConfig:
    """Every setting that changes which token comes next is named: one left out is taken from the model's own."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end.tokens,
        stop_strings=end.text,
        pad_token_id=pad,
        use_cache=True,
    )


def before_first(ends: Sequence[int], ids: list[int]) -> list[int]:
    """`ids` up to the first of `ends`, which need not be a special token that decoding leaves out."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    end: AnswerEnd,
    batch_size: int,
    max_new_tokens: int,
    should_stop: Callable[[], bool] = never,
) -> float | None:
    """Part of `questions` whose greedily generated answer equals the expected one, ends stripped.

    Prompts are padded on the left, so that every answer begins at the same place. None when there are no
    questions or `should_stop` said so.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    greedy = greedy_decoding(end, pad, max_new_tokens)
    matches, total = 0, 0
    with eval_mode(model), quiet_transformers():
        for batch in batches_of_this_process(questions, batch_size):
            if should_stop():
                break
            width = max(len(question.prompt_ids) for question in batch)
            rows = [[pad] * (width - len(q.prompt_ids)) + list(q.prompt_ids) for q in batch]
            mask = [[0] * (width - len(q.prompt_ids)) + [1] * len(q.prompt_ids) for q in batch]
            generated = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=greedy,
                tokenizer=tokenizer,
            )
            for question, ids in zip(batch, generated[:, width:].tolist(), strict=True):
                text = str(tokenizer.decode(before_first(end.tokens, ids), skip_special_tokens=True))
                matches += end.cut(text).strip() == question.answer.strip()
            total += len(batch)
    matched, asked, stopped = summed_over_processes(matches, total, should_stop(), device=device)
    return None if stopped or not asked else matched / asked
