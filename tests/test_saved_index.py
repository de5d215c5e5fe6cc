"""machinery/saved_index.py: one index or the other, whole, whatever happens."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from machinery import saved_index
from machinery.errors import BadInput
from machinery.saved_index import aligned, read_index, write_index


def an_index(number: int) -> dict:
    """Values of all kinds that an index has, all of which tell its number."""
    return {
        "source": f"corpus {number}",
        "vocabulary": ["é", "的", "İ"] * number,
        "empty": np.zeros((0, number), np.float32),
        "floats": np.full((number, 3), number, np.float32),
        "bytes": np.full(number, number % 256, np.uint8),
        "numbers": np.full(2 * number, number, np.int64),
    }


def number_of(index: dict) -> int:
    """The number of an index, of which every part must tell the same."""
    number = int(index["source"].split()[1])
    expected = an_index(number)
    assert list(index) == ["source", "vocabulary", *list(expected)[2:]]
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert index[name].dtype == value.dtype
            assert index[name].shape == value.shape
            assert (index[name] == value).all()
        else:
            assert index[name] == value
    return number


def test_what_is_read_is_what_was_written(tmp_path):
    write_index(tmp_path / "new" / "folder", an_index(7))
    index = read_index(tmp_path / "new" / "folder")
    assert number_of(index) == 7
    write_index(tmp_path / "copy", index)
    assert number_of(read_index(tmp_path / "copy")) == 7


def test_arrays_are_memory_mapped_and_aligned(tmp_path):
    """Their memory is a part of the file, which cannot be written to."""
    write_index(tmp_path, an_index(7))
    index = read_index(tmp_path)
    for name in ("floats", "bytes", "numbers"):
        assert not index[name].flags.writeable
        assert index[name].flags.aligned
        owner = index[name]
        while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
            owner = owner.base
        assert isinstance(owner, np.memmap)


def test_an_index_without_an_array_or_with_a_strided_one(tmp_path):
    write_index(tmp_path, {"source": ""})
    assert read_index(tmp_path) == {"source": ""}
    table = np.arange(12).reshape(3, 4)
    write_index(tmp_path, {"columns": table.T[::2]})
    assert (read_index(tmp_path)["columns"] == table.T[::2]).all()


def refusal(folder) -> str:
    with pytest.raises(
        BadInput, match=re.escape(f"{folder} holds no usable index")
    ) as error:
        read_index(folder)
    assert error.value.__cause__ is not None
    return str(error.value)


def test_every_damage_to_the_file_is_refused(tmp_path):
    write_index(tmp_path, an_index(50))
    path = tmp_path / "index"
    content = path.read_bytes()
    for length in (0, 1, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refusal(tmp_path)
    path.write_bytes(content + b"\0")
    assert "bytes in place of" in refusal(tmp_path)
    for foreign in (
        b"\n",
        b"[]\n",
        b"7\n",
        b"{}\n",
        b"[" * 10**5,
        b"\xff\n",
        b"\0" * 99,
    ):
        path.write_bytes(foreign)
        refusal(tmp_path)
    path.unlink()
    assert "No such file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("start", "stop", "dtype", "shape"),
    [
        (0, 800, "<f8", [3, 7]),  # another number of entries
        (0, 801, "<f8", [100]),
        (0, 8000, "<f8", [1000]),  # beyond the end
        (0, 800, "|O", [100]),  # addresses in memory
        (0, 800, "<q9", [100]),
        (0, 800, None, "x"),
        ("a", 800, "<f8", [100]),
    ],
)
def test_a_first_line_that_cannot_be_right_is_refused(
    tmp_path, start, stop, dtype, shape
):
    write_index(tmp_path, {"numbers": np.arange(100.0)})
    path = tmp_path / "index"
    content = path.read_bytes()
    first_line = content.partition(b"\n")[0]
    arrays = content[aligned(len(first_line) + 1) :]

    def place(*values):
        head = json.loads(first_line)
        head["arrays"]["numbers"] = values
        path.write_bytes(json.dumps(head).encode().ljust(255) + b"\n" + arrays)

    place(8, 16, "<f8", [1])
    assert read_index(tmp_path)["numbers"].tolist() == [1.0]
    place(start, stop, dtype, shape)
    refusal(tmp_path)


# ------------------------------------------------ saves that do not come to an end


class Killed(BaseException):
    """What nothing catches, like Ctrl-C at a bad moment."""


def interrupt_at(monkeypatch, step: int) -> None:
    """Let the step-th call that changes the disk raise Killed. A write writes half."""
    calls = iter(range(1000))
    write_aligned = saved_index.write_aligned

    def half(file, content):
        if next(calls) == step:
            file.write(bytes(content)[: len(bytes(content)) // 2])
            raise Killed
        write_aligned(file, content)

    def instead_of(function):
        def call(*arguments, **keywords):
            if next(calls) == step:
                raise Killed
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(saved_index, "write_aligned", half)
    monkeypatch.setattr(os, "fsync", instead_of(os.fsync))
    monkeypatch.setattr(Path, "replace", instead_of(Path.replace))


STEPS = 1 + 4 + 1 + 1  # the line of JSON, four arrays, fsync, replace


@pytest.mark.parametrize("step", range(STEPS))
def test_an_interrupted_save_changes_nothing(tmp_path, monkeypatch, step):
    write_index(tmp_path, an_index(3))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Killed):
            write_index(tmp_path, an_index(4))
    assert number_of(read_index(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    write_index(tmp_path, an_index(4))
    assert number_of(read_index(tmp_path)) == 4


def test_a_save_has_no_further_step(tmp_path, monkeypatch):
    """So the test above interrupts it at each of them."""
    interrupt_at(monkeypatch, STEPS)
    write_index(tmp_path, an_index(3))
    assert number_of(read_index(tmp_path)) == 3


def test_a_save_that_cannot_write_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "index"
    message = re.escape(f"the index {folder} cannot be saved ([Errno 20]")
    with pytest.raises(BadInput, match=message) as error:
        write_index(folder, an_index(3))
    assert isinstance(error.value.__cause__, OSError)


# What another process does. It has no time to import all that the tests import.
IMPORTS = """
import sys
import numpy as np
from machinery.saved_index import write_index
"""
FULL_DISK = """
import resource
from machinery.terminal import run_script

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
run_script(lambda: write_index(sys.argv[1], an_index(50)))
"""
SAVES = """
for _ in range(int(sys.argv[2])):
    for number in sys.argv[3:]:
        write_index(sys.argv[1], an_index(int(number)))
"""


def start(code, *arguments) -> subprocess.Popen:
    """A process of its own that runs some lines of Python."""
    code = IMPORTS + inspect.getsource(an_index) + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_is_said_in_one_line_and_nothing_is_lost(tmp_path):
    write_index(tmp_path, an_index(3))
    process = start(FULL_DISK, tmp_path)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert (
        said
        == f"-c: the index {tmp_path} cannot be saved ([Errno 27] File too large)\n"
    )
    assert number_of(read_index(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_killed_save_leaves_an_index_and_a_file_that_goes_after_a_day(tmp_path):
    write_index(tmp_path, an_index(3))
    process = start(SAVES, tmp_path, 10**9, 4, 50_000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.new")):
        assert time.monotonic() < deadline
    process.kill()
    process.communicate(timeout=60)
    assert number_of(read_index(tmp_path)) in (3, 4, 50_000)
    leftover = tmp_path / "killed.new"
    leftover.touch()
    write_index(tmp_path, an_index(5))
    assert leftover.exists()  # it may be another save, which has only begun
    for path in tmp_path.glob("*.new"):
        os.utime(path, (time.time() - 100_000,) * 2)
    write_index(tmp_path, an_index(5))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_two_processes_that_save_at_once_and_one_that_reads(tmp_path):
    """The reader gets one index or another, and never a part of each."""
    write_index(tmp_path, an_index(1))
    processes = [start(SAVES, tmp_path, 60, n, 100 * n) for n in (2, 3)]
    numbers = set()
    while any(process.poll() is None for process in processes):
        numbers.add(number_of(read_index(tmp_path)))
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert numbers <= {1, 2, 3, 200, 300}
    assert len(numbers) > 2
    assert number_of(read_index(tmp_path)) in (200, 300)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
