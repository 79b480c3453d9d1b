"""`prefmix VERB ...`: finds the verb, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done, 1 a failure of ours or of the machine, 2 a mistake in the command, the recipe or the data,
130 interrupted. Verbs are modules that are imported when they are called, so that `--help` costs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TextIO

from prefmix import __version__
from prefmix.cli.recipe import field_suggestion, suggestion
from prefmix.data.stages import stages_shown

VERBS = {
    "demo": "train, compare and talk to mixtures on real rows that ship with the package",
    "init": "write a commented recipe.yaml",
    "simulate": "write rows of people with known tastes, and the truth beside them",
    "validate": "check rows of preferences, without loading a model",
    "diagnose": "what rows can and cannot tell before training, and what went wrong after it",
    "probe": "find groups of users before training a single expert",
    "choose_k": "choose the number of groups on users that are held out",
    "train": "train a mixture of expert policies from a recipe",
    "compare": "single DPO, mixtures and every baseline on the same rows, in one table",
    "evaluate": "score a policy on held-out comparisons",
    "report": "write one HTML page that shows what a run learned",
    "score": "write implicit rewards and preference probabilities of rows",
    "generate": "answer one prompt",
    "chat": "talk to a policy, as any of its users",
    "adapt": "weights of a new user from a few comparisons, without training",
    "export": "write an expert as an adapter or a model, or the mixture for a multi-LoRA server",
    "env": "print versions and devices",
}
# Verbs that train and score many times, and say themselves where they are.
TALKING = ("demo", "train", "compare")
EXAMPLES = """examples:
  prefmix demo
  prefmix init && prefmix train recipe.yaml --num_experts 2
  prefmix validate rows.jsonl
  prefmix chat out --user anna

`prefmix VERB --help` explains a verb. Flags may be written with `-` or `_`."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line with the nearest flag, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and where help is."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def parse_exact(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses `argv`; an unknown flag is named with its nearest neighbour."""
        args, unknown = self.parse_known_args([_underscored(word) for word in argv])
        if unknown:
            flags = [flag.lstrip("-") for action in self._actions for flag in action.option_strings]
            unknown = [word for word in unknown if word.startswith("--")] or unknown  # not the values that follow
            words = [f"{word!r}{field_suggestion(word.lstrip('-').split('=')[0], flags)}" for word in unknown]
            self.error(f"unknown argument {', '.join(words)}")
        return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _quiet_libraries(debug)
    try:
        return _dispatch(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return report(error, debug)


def verb_parser(verb: str) -> Parser:
    """The parser of one verb, as `--help` and shell completion show it."""
    parser = Parser(
        prog=f"prefmix {verb}",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",  # `train` has a --help of its own
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    import_module(f"prefmix.cli.{verb}").add_arguments(parser)
    return parser


def report(error: Exception, debug: bool) -> int:
    """Prints an error in the fewest lines that name the fault; 2 where the user can mend it, else 1."""
    lines = [line.rstrip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    if is_user_error(error):
        shown = lines if _raised_by_prefmix(error) else lines[:1]
        print("error: " + "\n       ".join(shown), file=sys.stderr)
        return 2
    hint = "" if debug else " (--debug shows where)"
    print(f"error: {type(error).__name__}: {lines[0]}{hint}", file=sys.stderr)
    return 1


def is_user_error(error: Exception) -> bool:
    """Whether the user can mend it: our own ValueErrors, missing files and models, a missing extra package."""
    if isinstance(error, OSError):
        return True
    return isinstance(error, ValueError | ModuleNotFoundError) and _raised_by_prefmix(error)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_top_help())
        return 0
    if words[0] == "--version":
        print(f"prefmix {__version__}")
        return 0
    if _underscored(words[0]) == "--print_completion":
        from prefmix.cli.completion import completion_script

        print(completion_script(words[1] if len(words) > 1 else "bash"))
        return 0
    verb = words[0].replace("-", "_")
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}{suggestion(verb, VERBS)}; one of: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    args = verb_parser(verb).parse_exact(words[1:])
    with stages_shown() if verb not in TALKING else contextlib.nullcontext():
        return import_module(f"prefmix.cli.{verb}").run(args) or 0


def _top_help() -> str:
    rows = "\n".join(f"  {verb:9} {line}" for verb, line in VERBS.items())
    return (
        f"prefmix {__version__}: mixtures of expert policies from preference data\n\n"
        f"usage: prefmix VERB [arguments] [--debug]\n       prefmix --version | --print_completion bash|zsh|fish\n\n"
        f"verbs:\n{rows}\n\n{EXAMPLES}"
    )


def _underscored(word: str) -> str:
    """`--num-experts=4` as `--num_experts=4`; values stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _raised_by_prefmix(error: Exception) -> bool:
    """Whether the innermost frame of the traceback is a file of this package."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    home = str(Path(__file__).parents[1])
    return frame is None or frame.tb_frame.f_code.co_filename.startswith(home)


def _quiet_libraries(debug: bool) -> None:
    """No telemetry; libraries speak only when something is wrong; no progress bars where nobody watches."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        warnings.showwarning = _one_line_warning
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
