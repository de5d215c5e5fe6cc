"""Settings: the fields of a dataclass as flags, and as keys of a settings file."""

import json
import re
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import Field, field, fields, replace
from pathlib import Path

from machinery.errors import BadInput
from machinery.terminal import Parser

# A NUL and half of a character (a lone surrogate). No path can hold them. The halves
# that are left out here stand for bytes of a path that is not in UTF-8.
IMPOSSIBLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


def setting(default, help: str, *, zero: bool = False, choices: tuple = ()):
    """A field. zero: the number may be 0. choices: only these are meant."""
    about = {"help": help, "zero": zero, "choices": choices}
    return field(default=default, metadata=about)


def check_setting(item: Field, value) -> None:
    """Raise BadInput for a value of another type, or out of its limits."""
    choices = item.metadata["choices"]
    zero = item.metadata["zero"]
    is_number = item.type in (int, float)
    wanted = item.type.__name__
    good = type(value) is item.type
    if is_number:
        lowest = "at least 0" if zero else "above 0"
        wanted += f", {lowest} and below 2**32"
        if item.type is float and type(value) is int:
            good = True
        if good:
            good = 0 < value < 2**32 or (value == 0 and zero)
    if item.type is str:
        wanted += ", without NUL and without half characters"
        good = good and not IMPOSSIBLE.search(value)
    if choices:
        wanted = f"{item.type.__name__}, one of {', '.join(choices)}"
        good = good and value in choices
    if not good:
        raise BadInput(f"{item.name} must be {wanted}, not {value!r}")


def check_settings(config) -> None:
    """check_setting for every field of a Config."""
    for item in fields(config):
        check_setting(item, getattr(config, item.name))


def read_settings(path, kind: type):
    """Settings of this kind, a Config, from a JSON file.

    BadInput is raised for another file, and for an unknown setting.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        return kind(**settings)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {error}") from error


def as_begun(config) -> tuple:
    """(config, True) with the date of the run in config.out; (config, False) if no run
    is there.

    A chat template may hold the date, and a run may go on after midnight.
    """
    begun = Path(config.out) / "config.json"
    if not begun.exists():
        return config, False
    return replace(config, date=read_settings(begun, type(config)).date), True


def parse_flags(kind: type) -> tuple:
    """(settings of this kind, whether a run is to go on) from the command line.

    A flag wins over a settings file. It may not contradict a run that goes on.
    """
    parser = Parser(
        description="Search-E1: GRPO and offline self-distillation in turn."
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--config", metavar="FILE", help="settings in JSON; flags win over them"
    )
    start.add_argument(
        "--resume", metavar="FOLDER", help="go on with this run, by its settings"
    )
    for item in fields(kind):
        flag = "--" + item.name.replace("_", "-")
        text = f"{item.metadata['help']} (default: {item.default!r})"
        if item.metadata["choices"]:
            text += f": {', '.join(item.metadata['choices'])}"
        text = text.replace("%", "%%")
        if item.type is bool:
            action = BooleanOptionalAction
            parser.add_argument(flag, default=SUPPRESS, help=text, action=action)
        else:
            parser.add_argument(flag, default=SUPPRESS, help=text, type=item.type)
    flags = vars(parser.parse_args())
    file = flags.pop("config")
    folder = flags.pop("resume")

    if folder is None:
        config = kind() if file is None else read_settings(file, kind)
        return replace(config, **flags), False
    config = replace(read_settings(f"{folder}/config.json", kind), out=folder)
    for name, value in flags.items():
        kept = getattr(config, name)
        if value != kept:
            raise BadInput(f"{folder} has {name} {kept!r}, and is resumed as it is")
    return config, True
