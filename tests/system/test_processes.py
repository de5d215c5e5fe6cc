"""The scripts as processes of their own, started as a user starts them.

That they start, where they write, and how they end. What they compute is tested within
one process, in the folder above.
"""

import os
import pty
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_here

import eval as eval_module
import retriever

LESSONS = {  # the lesson: what it prints
    "retriever": "Your own: python retriever.py --corpus FILE WORDS",
    "rollout": "Sampled by the policy (loss_mask 1), written by the environment (0):",
    "evaluation": "Your own: python eval.py --help",
    "grpo": "One update moved log pi as the columns say.",
    "ofsd": "The environment's tokens have none.",
}


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_a_process(command, name):
    done = command("-m", f"lessons.{name}")
    assert (done.returncode, done.stderr) == (0, "")
    assert LESSONS[name] in done.stdout
    assert "\033" not in done.stdout


def test_a_terminal_gets_colours():
    """By a pseudo-terminal, as one has it."""
    parent, child = pty.openpty()
    environment = dict(os.environ)
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "lessons.ofsd"], cwd=ROOT, stdout=child, env=environment
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 10_000)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=60) == 0
    os.close(parent)
    assert b"\033[1m---- the student's prompt" in shown
    assert b"\033[31m" in shown


SEARCH = ["--corpus", "micro/corpus.jsonl", "the", "Harbor"]
EVALUATION = ["--model", "micro/model", "--questions", "micro/test.jsonl"]
EVALUATION += ["--corpus", "micro/corpus.jsonl", "--limit", "3"]


@pytest.mark.parametrize(
    ("file", "main", "arguments"),
    [
        ("retriever.py", retriever.main, SEARCH),
        ("retriever.py", retriever.main, []),
        ("eval.py", eval_module.main, EVALUATION),
    ],
    ids=["retriever.py", "retriever.py without arguments", "eval.py"],
)
def test_a_process_prints_what_a_call_of_main_prints(
    command, monkeypatch, capsys, file, main, arguments
):
    """So what the other tests see of these two scripts, by such calls, users see."""
    done = command(file, *arguments)
    here = run_here(monkeypatch, capsys, main, file, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == here
    assert done.stdout or done.stderr


def test_a_wrong_flag_ends_the_process(command):
    done = command("train.py", "--frobnicate", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_a_script_whose_output_cannot_be_written_says_so_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "retriever.py", *SEARCH],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
        )
    assert done.returncode == 2
    assert done.stderr == "retriever.py: [Errno 28] No space left on device\n"


def test_a_script_may_run_without_standard_output():
    """As after >&- in a shell: what it prints is lost, and nothing else."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "retriever.py", *SEARCH],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_tools_run_as_modules(small_run, command, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    done = command("-m", "tools.plot", run)
    assert done.returncode == 0, done.stderr
    assert "EM      |" in done.stdout
    done = command("-m", "tools.trace", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'trace.html'}\n"
