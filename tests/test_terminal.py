"""machinery/terminal.py: what a script says on a terminal, and how it ends."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from machinery.errors import BadInput
from machinery.terminal import paint, printable, run_script


def ending(capsys, error) -> tuple[int, str]:
    """The exit status of a script that raises this error, and what it says."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code, capsys.readouterr().err


def test_a_script_ends_with_one_line(monkeypatch, capsys):
    """Whatever the text of an error is; and an error can carry notes."""
    monkeypatch.setattr(sys, "argv", ["some/where/script.py"])
    status, said = ending(capsys, BadInput("wrong:\n\nthis\r\n"))
    assert status == 2
    assert said.split() == ["script.py:", "wrong:", "this"]
    assert said.count("\n") == 1
    assert said.endswith("\n")
    said = "script.py: \\x1b[31m\\ud800\n"
    assert ending(capsys, BadInput("\x1b[31m\ud800")) == (2, said)
    said = "script.py: [Errno 13] No: 'x'\n"
    assert ending(capsys, PermissionError(13, "No", "x")) == (2, said)
    assert ending(capsys, KeyboardInterrupt()) == (130, "script.py: stopped\n")
    noted = KeyboardInterrupt()
    noted.add_note("Go on with this")
    said = "script.py: stopped. Go on with this\n"
    assert ending(capsys, noted) == (130, said)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError, ValueError, KeyError, SystemError]
)
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(error):
        run_script(main)


def test_what_cannot_be_encoded_is_shown_as_an_escape(capsys):
    run_script(lambda: print("\ud800"))
    assert capsys.readouterr().out == "\\ud800\n"


def test_what_a_terminal_cannot_show_is_shown_as_an_escape(monkeypatch):
    written = io.BytesIO()
    narrow = io.TextIOWrapper(written, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    run_script(lambda: print("Ōsaka"))
    assert written.getvalue() == b"\\u014csaka\n"  # at once, without a flush


def test_a_message_repeats_a_name_as_it_was_given(capsys):
    _, said = ending(capsys, BadInput("cannot read two  spaces.jsonl"))
    assert "two  spaces.jsonl" in said


def test_only_what_could_move_the_cursor_is_escaped():
    plain = "Ōsaka \U0001f600 的 é\u0301\t\n"
    assert printable(plain) == plain
    assert printable("\x00\x07\x1b\x7f\x9b\r") == "\\x00\\x07\\x1b\\x7f\\x9b\\r"
    assert printable("\u202e\u2066\ufeff\ud800") == "\\u202e\\u2066\\ufeff\\ud800"


def test_colours_are_for_terminals(monkeypatch):
    assert paint("red", "31") == "red"  # captured here, so no terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert paint("red", "31") == "\033[31mred\033[0m"
    monkeypatch.setenv("NO_COLOR", "")
    assert paint("red", "31") == "red"


SCRIPT = """
import sys
from machinery.terminal import paint, run_script

def main():
    print(paint("text", "31"), flush=True)
    if sys.argv[1:]:
        raise OSError("no")

run_script(main)
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_script_may_run_with_its_streams_closed(tmp_path, closed):
    (tmp_path / "script.py").write_text(SCRIPT)
    line = f'exec "$0" "$1" $2 {closed}'
    for argument, status in (("", 0), ("fail", 2)):
        done = subprocess.run(
            ["sh", "-c", line, sys.executable, tmp_path / "script.py", argument],
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = "script.py: no\n" if status and "2>&-" not in closed else ""
        assert (done.returncode, done.stderr) == (status, said)
        assert done.stdout == ("" if ">&-" in closed.split() else "text\n")


def test_half_a_line_on_a_full_disk_is_not_lost_in_silence():
    code = (
        "from machinery.terminal import run_script\n"
        "run_script(lambda: print('half a line', end=''))"
    )
    # Unbuffered, Python itself would notice it at once.
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=buffered,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr == "-c: [Errno 28] No space left on device\n"
