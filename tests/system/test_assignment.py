"""The assignment: each blank fails its own tests and no others, and the copy is the
project but for the blanks."""

import ast
import subprocess
import sys
from operator import attrgetter

import pytest
import test_tasks as grading
from conftest import ROOT, line_of, run_main

import eval as evaluation
import grpo
import lessons.assignment
import ofsd
import retriever
import rollout
import train
from lessons.assignment import TASKS, blanked, page, project_files

MODULES = {
    "retriever.py": retriever,
    "rollout.py": rollout,
    "eval.py": evaluation,
    "grpo.py": grpo,
    "ofsd.py": ofsd,
    "train.py": train,
}


def name_of(task):
    return task.function


def grading_tests():
    """All tests that grade, by name."""
    return {
        name: test for name, test in vars(grading).items() if name.startswith("test_")
    }


def graders(task):
    """The names that pytest's -k selects."""
    return {name for name in grading_tests() if task.tests in name}


def failed():
    """The names of the tests that fail, because a function is not written."""
    names = set()
    for name, test in grading_tests().items():
        try:
            test()
        except NotImplementedError:
            names.add(name)
    return names


def blank_code(task):
    """The compiled function of a task, as the assignment leaves it."""
    source = (ROOT / task.file).read_text(encoding="utf-8")
    names = {"__name__": MODULES[task.file].__name__}
    exec(compile(blanked(source, task.function), task.file, "exec"), names)
    first, _, method = task.function.partition(".")
    function = names[first]
    if method:
        function = getattr(function, method)
    return function.__code__


# ---------------------------------------------------------------- the proof


def test_each_test_grades_one_task():
    assert [task.number for task in TASKS] == list(range(1, len(TASKS) + 1))
    graded = [name for task in TASKS for name in graders(task)]
    assert sorted(graded) == sorted(grading_tests())
    for task in TASKS:
        assert len(graders(task)) >= 2


def test_the_original_bodies_pass_all():
    assert failed() == set()


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_a_blank_fails_its_own_tests_and_no_others(task, monkeypatch):
    """The code is exchanged within the function, so whoever imported it has it, too."""
    function = attrgetter(task.function)(MODULES[task.file])
    monkeypatch.setattr(function, "__code__", blank_code(task))
    assert failed() == graders(task)


# ---------------------------------------------------------------- the copy


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """The folder that the command writes, and what it prints."""
    folder = tmp_path / "new" / "copy"
    run_main(monkeypatch, lessons.assignment.main, "lessons.assignment", folder)
    return folder, capsys.readouterr().out


def test_the_copy_is_the_project_but_for_the_blanks(written):
    folder, printed = written
    assert page() in printed
    assert (folder / "ASSIGNMENT.md").read_text() == page()
    names = set()
    for path in folder.rglob("*"):
        if path.is_file():
            names.add(path.relative_to(folder))
    assert {str(name) for name in names} > {"lessons/plain.py", "micro/corpus.jsonl"}
    assert names == {*project_files(), (folder / "ASSIGNMENT.md").relative_to(folder)}

    blanks = 0
    for name in project_files():
        original = (ROOT / name).read_bytes()
        copy = (folder / name).read_bytes()
        functions = [task.function for task in TASKS if task.file == str(name)]
        if not functions:
            assert copy == original, name
            continue
        blanks += copy.count(b"raise NotImplementedError")
        assert same_but_for(functions, original, copy), name
    assert blanks == len(TASKS)


def same_but_for(functions, original, copy):
    """Do two files differ in the bodies of these functions only, docstrings aside?"""
    trees = [ast.parse(original), ast.parse(copy)]
    for tree in trees:
        for function in functions:
            node = tree
            for name in function.split("."):
                children = [each for each in node.body if hasattr(each, "name")]
                node = next(each for each in children if each.name == name)
            assert ast.get_docstring(node)
            del node.body[1:]
    return ast.dump(trees[0]) == ast.dump(trees[1])


def test_in_the_copy_all_grading_tests_fail(written):
    """As a student runs it, in a process of its own."""
    folder, _ = written
    call = [sys.executable, *TASKS[0].command.split()[1:-2]]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{len(grading_tests())} failed in "), last


def test_a_task_that_is_solved_passes_in_the_copy(written):
    """The -k of a task selects its tests, and one task does not need another."""
    folder, _ = written
    task = TASKS[6]
    source = (ROOT / task.file).read_text(encoding="utf-8")
    for other in TASKS:
        if other.file == task.file and other is not task:
            source = blanked(source, other.function)
    (folder / task.file).write_text(source, encoding="utf-8")
    call = [sys.executable, *task.command.split()[1:]]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{len(graders(task))} passed"), last


def test_a_folder_that_exists_is_refused(tmp_path, monkeypatch, capsys):
    script = "lessons.assignment"
    (tmp_path / "kept").write_text("mine")
    for folder in (tmp_path, tmp_path / "kept"):
        run_main(monkeypatch, lessons.assignment.main, script, folder, status=2)
        assert "exists already" in line_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
