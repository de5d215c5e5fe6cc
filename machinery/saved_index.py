"""A saved index: named arrays and other values in one file, the arrays memory-mapped.

FOLDER/index begins with a line of JSON. It holds the values that are no arrays, and
says where each array stands. The arrays follow. All is one file, so that it can be
replaced in one step: a new index is written under a name of its own, and then renamed.
Whoever opens FOLDER/index gets the old index or the new one, and all of it, even while
two processes save at the same time.
"""

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

import numpy as np

from machinery.errors import BadInput

FILE = "index"
DAY = 24 * 60 * 60  # seconds


def checksum(path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(folder, index: dict) -> None:
    """Save named values in a folder: numpy arrays, and whatever JSON can hold.

    A process that has the old index open goes on reading it. BadInput is raised where
    the disk refuses; the folder then holds what it held before.
    """
    folder = Path(folder)
    unfinished = folder / f"{uuid.uuid4().hex}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        try:
            with open(unfinished, "xb") as file:
                write_values(file, index)
            unfinished.replace(folder / FILE)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"the index {folder} cannot be saved ({error})") from error


def write_values(file, index: dict) -> None:
    """Write the line of JSON and the arrays."""
    arrays = []
    places = {}
    others = {}
    size = 0  # of all arrays, in bytes
    for name, value in index.items():
        if isinstance(value, np.ndarray):
            arrays.append(value)
            stop = size + value.nbytes
            places[name] = [size, stop, value.dtype.str, value.shape]
            size = aligned(stop)
        else:
            others[name] = value
    head = {"size": size, "arrays": places, "others": others}
    write_aligned(file, json.dumps(head, ensure_ascii=False).encode() + b"\n")
    for array in arrays:
        write_aligned(file, np.ascontiguousarray(array))
    file.flush()
    os.fsync(file.fileno())  # all of it is on the disk before the file gets its name


def write_aligned(file, content) -> None:
    """Write bytes, then zeros up to the next place where an array may begin."""
    file.write(content)
    end = file.tell()
    file.write(bytes(aligned(end) - end))


def aligned(position: int) -> int:
    """The next multiple of 64: numpy is fastest where an array begins at one.

    >>> aligned(0), aligned(1), aligned(64)
    (0, 64, 64)
    """
    return (position + 63) // 64 * 64


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves have left behind: unfinished files older than a day."""
    for path in folder.glob("*.new"):
        try:
            if time.time() - path.stat().st_mtime > DAY:
                path.unlink()
        except FileNotFoundError:
            pass  # another process has just finished it


def read_index(folder) -> dict:
    """The named values of a folder. What nobody looks at stays on the disk.

    BadInput is raised for a folder that holds no index, or only a part of one.
    """
    try:
        with open(Path(folder) / FILE, "rb") as file:
            head = json.loads(file.readline())
            begin = aligned(file.tell())
            whole = np.memmap(file, np.uint8, mode="r").view(np.ndarray)  # (bytes,)
        content = whole[begin:]
        if len(content) != head["size"]:
            raise ValueError(f"{len(content)} bytes in place of {head['size']}")
        index = dict(head["others"])
        for name, (start, stop, dtype, shape) in head["arrays"].items():
            index[name] = content[start:stop].view(dtype).reshape(shape)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInput(f"{folder} holds no usable index ({error})") from error
    return index
