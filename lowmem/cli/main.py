"""`lowmem VERB ...`: find the verb's file, run it, turn its outcome into an exit code."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from lowmem import __version__
from lowmem.errors import LowMemError, RecipeError
from lowmem.recipe.suggest import did_you_mean

VERBS = {
    "ls": "list the recipes, optimizers, formats, templates and builtin data sets there are",
    "cp": "copy a shipped recipe to a file of your own",
    "show": "print a recipe, what it comes to with every default, or every key there is",
    "validate": "check a recipe and name everything that is wrong with it",
    "plan": "say what a recipe will need on a GPU, byte by byte, and whether it fits",
    "train": "fine-tune the model of a recipe",
    "compare": "measure several optimizers on the same steps of a recipe, side by side",
    "eval": "loss, perplexity and exact match of a run's model on held-out rows",
    "generate": "answer prompts with a run's model",
    "export": "write a run's or a folder's int8 weights as a model that transformers alone loads",
    "report": "write the report of a finished run again",
    "doctor": "show versions, devices and extras, and whether a tiny step works",
}
INTERRUPTED = 130
READER_GONE = 141  # what a shell reports for any program whose reader closed the pipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or what `lowmem --help` lists."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _print_what_the_terminal_cannot_show_as_escapes_()
    # peft imports bitsandbytes wherever it is installed, which then advises installing yet another package.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except LowMemError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # argparse, after printing --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it exits
        return READER_GONE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        print(f"lowmem {__version__}")
        return 0
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS) or f" Verbs: {', '.join(VERBS)}."
        raise RecipeError(f"lowmem: {verb} is not a verb.{near} lowmem --help says what each one does.")
    run = importlib.import_module(f"lowmem.cli.{verb}").run
    code: int = run(rest)
    return code


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {summary}" for verb, summary in VERBS.items())
    return f"""usage: lowmem VERB ...

Fine-tune language models with every parameter trained on GPUs that are too small for AdamW.

{verbs}

lowmem VERB --help says more about one verb. A first run:

  lowmem show quickstart
  lowmem train quickstart

exit codes: 0 done; 2 the recipe or the arguments are wrong; 3 plan: it does not fit the card;
4 a combination that is refused; 5 the run stopped on a fault, checkpoint intact; 130 interrupted, checkpoint saved."""


def _print_what_the_terminal_cannot_show_as_escapes_() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
