"""Files of JSON lines: one object a line, plain or .gz."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator

from machinery.errors import BadInput


def read_jsonl(path, form=dict) -> Iterator:
    """Yield form(object) for each line that is not blank. The file may be .gz.

    `form` makes of an object what the caller needs; it raises ValueError for an object
    that has another form. BadInput names the file, and the line if it is to blame.
    """
    where = path
    empty = True
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                row = json.loads(line.decode("utf-8-sig"))  # without a byte-order mark
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, not {str(row)[:50]}")
                yield form(row)
                where = path  # this line was good: what fails next is the file's
                empty = False
        if empty:
            raise ValueError("there is nothing in it")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise BadInput(f"{where}: {error}") from error


def open_bytes(path):
    """A plain or a .gz file, open for reading its bytes."""
    if str(path).endswith(".gz"):
        return gzip.open(path, "rb")
    return open(path, "rb")


def write_jsonl(path, rows: Iterable[dict], mode: str = "w") -> None:
    """Write one object a line, in UTF-8 with line feeds on every system. The mode "a"
    adds them to a file."""
    # JSON can hold half of a character and UTF-8 cannot: it is written as an escape.
    with open(
        path, mode, encoding="utf-8", errors="backslashreplace", newline="\n"
    ) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
