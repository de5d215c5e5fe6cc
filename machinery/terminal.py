"""A script and its terminal: flags, text that others wrote, errors in one line."""

import argparse
import os
import sys
import unicodedata
from functools import partial
from pathlib import Path

from machinery.errors import BadInput

# Without a usage, argparse says in one line what is wrong with a flag. Its status is 2.
Parser = partial(argparse.ArgumentParser, usage=argparse.SUPPRESS)


def check_seed(parser: argparse.ArgumentParser, seed: int) -> None:
    """End the script where numpy would refuse the --seed."""
    if not 0 <= seed < 2**32:
        parser.error("--seed is at least 0 and below 2**32")


def printable(text: str) -> str:
    r"""Text that others wrote. What could move the cursor is shown as an escape.

    >>> printable("red\x1b[31m\u202e alert")
    'red\\x1b[31m\\u202e alert'
    """
    shown = []
    for character in text:
        control = unicodedata.category(character).startswith("C")
        if control and character not in "\n\t":
            character = ascii(character)[1:-1]
        shown.append(character)
    return "".join(shown)


def paint(text: str, colour: str) -> str:
    """Text in an ANSI colour, such as "31", red: on a terminal without NO_COLOR."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{colour}m{text}\033[0m"
    return text


def run_script(main) -> None:
    """Run a script's main(). What is not a bug ends it with one line.

    The exit status is 2 for BadInput and OSError, 130 for Ctrl-C. Any other error is a
    bug, and shows its traceback.
    """
    prepare("stdout")
    prepare("stderr")
    try:
        main()
        sys.stdout.flush()
    except (BadInput, OSError) as error:
        end(error, 2)
    except KeyboardInterrupt as error:
        end(error, 130)


def prepare(name: str) -> None:
    """Let a stream show each line at once, whatever characters are in it."""
    if getattr(sys, name) is None:  # it was closed, as by `python script.py >&-`
        setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)


def end(error: BaseException, status: int) -> None:
    """Print an error and its notes in one line, and exit."""
    notes = getattr(error, "__notes__", [])
    message = ". ".join([str(error) or "stopped", *notes])
    script = Path(sys.argv[0]).name
    print(f"{script}: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # It is full, or nobody reads it. Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
