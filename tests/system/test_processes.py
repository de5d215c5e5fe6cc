"""The scripts as processes of their own, started as a user starts them: that they start, where they
write, and how they end. What they compute is tested within one process, in the folder above."""

import os
import pty
import shutil
import subprocess
import sys

import plot
import pytest
import trace
from conftest import ROOT, run_here

import eval as eval_module
import retriever

LESSONS = {  # the file: a line of its lesson
    "retriever.py": "Your own: python retriever.py --corpus FILE WORDS",
    "rollout.py": "Sampled by the policy (loss_mask 1), written by the environment (loss_mask 0):",
    "eval.py": "Your own: python eval.py --help",
    "grpo.py": "two columns say: up for the right ones, down for the wrong ones.",
    "ofsd.py": ".05; the environment's words have none.",
}


@pytest.mark.parametrize("file", LESSONS)
def test_a_file_run_alone_is_a_lesson(command, file):
    done = command(file)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert LESSONS[file] in done.stdout.splitlines() and "\033" not in done.stdout


def test_a_terminal_gets_colours():
    """By a pseudo-terminal, as one has it."""
    parent, child = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    how = dict(cwd=ROOT, stdout=child, env=environment)
    process = subprocess.Popen([sys.executable, "ofsd.py"], **how)
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
    assert b"\033[1m---- the student's prompt" in shown and b"\033[31m" in shown


@pytest.mark.parametrize(
    ("file", "main", "arguments"),
    [
        ("retriever.py", retriever.main, ("--corpus", "micro/corpus.jsonl", "the", "Harbor")),
        (
            "eval.py", eval_module.main,
            ("--model", "micro/model", "--questions", "micro/test.jsonl",
             "--corpus", "micro/corpus.jsonl", "--limit", 3),
        ),
    ],
    ids=["retriever.py", "eval.py"],
)  # fmt: skip
def test_a_process_prints_what_a_call_of_main_prints(
    command, monkeypatch, capsys, file, main, arguments
):
    """So what the other tests see of these two scripts, by such calls, is what a user sees."""
    done = command(file, *arguments)
    here = run_here(monkeypatch, capsys, main, file, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == here and here[1]


def test_a_wrong_flag_ends_the_process(command):
    done = command("train.py", "--frobnicate", "1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_a_script_whose_output_cannot_be_written_says_so_in_one_line():
    arguments = [sys.executable, "retriever.py", "--corpus", "micro/corpus.jsonl", "Harbor"]
    with open("/dev/full", "w") as full:
        how = dict(cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
        done = subprocess.run(arguments, **how)
    assert done.returncode == 2
    assert done.stderr == "retriever.py: [Errno 28] No space left on device\n"


def test_the_tools_run_from_anywhere(small_run, command, tmp_path):
    """They find the six files by their own place."""
    run = shutil.copytree(small_run, tmp_path / "run")
    done = command(plot.__file__, run, cwd=tmp_path)
    assert done.returncode == 0 and "EM      |" in done.stdout, done.stderr
    done = command(trace.__file__, run, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"{run / 'trace.html'}\n", done.stderr
