"""`lowmem generate`: answers of a run's model, token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

from lowmem.cli.arguments import Arguments
from lowmem.errors import RecipeError


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "generate", "Answer prompts, streaming. Without --prompt every line of standard input is a prompt."
    )
    parser.add_target()
    parser.add_overrides()
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", help="the prompt; may be given several times"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="longest answer (256)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 (default) takes the likeliest token"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt, not streamed")
    options = parser.read(arguments)
    if options.max_new_tokens < 1:
        raise RecipeError(
            f"lowmem generate: --max-new-tokens is {options.max_new_tokens}; it must be at least 1."
        )
    if not 0 <= options.temperature < float("inf"):
        raise RecipeError(f"lowmem generate: --temperature is {options.temperature}; it must be 0 or more.")
    from lowmem.hf.generation import Generator

    generator = Generator(options.target, options.overrides)
    for prompt in options.prompt or _prompts_typed():
        pieces = generator.stream(
            prompt, max_new_tokens=options.max_new_tokens, temperature=options.temperature
        )
        if options.json:
            print(json.dumps({"prompt": prompt, "answer": "".join(pieces)}, ensure_ascii=False), flush=True)
        else:
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
    return 0


def _prompts_typed() -> Iterator[str]:
    """Lines of standard input; blank ones are left out."""
    is_person = sys.stdin.isatty()
    if is_person:
        print("Type a prompt and press Enter; Ctrl-D ends.", file=sys.stderr)
    while True:
        if is_person:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")
