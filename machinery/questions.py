"""Questions with their golden answers, from files and from the Hugging Face hub."""

import json
import os
from collections.abc import Callable
from datetime import date, time

from machinery.errors import BadInput
from machinery.json_lines import read_jsonl


def load_questions(spec: str) -> list[dict]:
    """Questions as dicts with at least "id", "question" and "golden_answers".

    spec: a file of JSON lines, plain or .gz, or hub/dataset:config:split, such as
    RUC-NLPIR/FlashRAG_datasets:nq:test. The id is a string: without one in the file,
    the number of the question, from 0. All values are such as JSON holds.

    Raises BadInput for what cannot be read. Where a question or its answers are
    missing, the message names the file and the line.
    """
    if os.path.exists(spec) or spec.count(":") != 2:
        questions = list(read_jsonl(spec, to_question))
    else:
        questions = load_from_hub(spec)
    for number, question in enumerate(questions):
        question["id"] = str(question.get("id", number))
    return questions


def load_from_hub(spec: str) -> list[dict]:
    """The questions of hub/dataset:config:split. BadInput: they cannot be had."""
    name, config, split = spec.split(":")
    if not name:
        raise BadInput(f"{spec}: expected a file, or hub/dataset:config:split")
    # The import takes seconds, so it waits until a set of the hub is asked for.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        rows = list(load_dataset(name, config, split=split))
    except (
        OSError,  # no network, no such set, no room on the disk
        ValueError,  # no such config or split, a name that is none, a damaged file
        RuntimeError,  # a set that only a script of its own can load
        ImportError,  # a set with pictures or sound, which need another library
        DatasetsError,  # a file that is not what its name says
        HTTPError,  # the connection broke: the kind that huggingface_hub's library has
        EntryNotFoundError,  # a file that is not on the hub
    ) as error:
        reason = f"{error}"
        if error.__cause__ is not None:
            reason += f" ({error.__cause__})"
        raise BadInput(f"cannot load {spec} from the hub: {reason}") from error
    if not rows:
        raise BadInput(f"{spec}: there is nothing in it")
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            questions.append(to_question(plain_values(row)))
        except ValueError as error:
            raise BadInput(f"{spec}, row {number}: {error}") from error
    return questions


def plain_values(row: dict) -> dict:
    """The row as JSON would give it back. Times become text, as ISO 8601 writes them.

    The datasets library makes datetimes of texts that look like one. No checkpoint and
    no log could hold them. Raises ValueError for what has no such form, such as bytes:
    better now than when a run writes its first checkpoint.

    >>> plain_values({"published": date(2020, 1, 31), "authors": ("Ada",)})
    {'published': '2020-01-31', 'authors': ['Ada']}
    """
    values = {}
    for key, value in row.items():
        try:
            values[key] = json.loads(json.dumps(value, default=time_as_text))
        except TypeError as error:
            raise ValueError(f'"{key}" cannot be written as JSON: {error}') from error
    return values


def time_as_text(value: object) -> str:
    """What json.dumps calls for a value that it does not know."""
    if isinstance(value, date | time):  # a datetime is a date, too
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__}")


def to_question(row: dict) -> dict:
    """The row without what is null. ValueError: question or answers are missing."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('"question" is missing or empty')
    golden_answers = row.get("golden_answers")
    if not are_answers(golden_answers):
        raise ValueError(
            '"golden_answers" must be a list of at least one non-empty string'
        )
    return {key: value for key, value in row.items() if value is not None}


def are_answers(values: object) -> bool:
    """Is it a list of at least one string, each with something in it?"""
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(value, str) and value.strip() for value in values)


def load_training_questions(
    specs: str, test_questions: list[dict], normalize: Callable[[str], str]
) -> list[dict]:
    """The questions of one spec, or of several with commas between them.

    A run must not train on what tests it: BadInput if one of them is a test question.
    normalize decides which texts are the same. It is eval.normalize_answer, to which
    letter case, punctuation and articles make no difference.
    """
    test_texts = {normalize(question["question"]) for question in test_questions}
    names = specs.split(",")
    if os.path.exists(specs):  # a file whose name has a comma in it
        names = [specs]
    training_questions = []
    for name in names:
        questions = load_questions(name)
        texts = [question["question"] for question in questions]
        shared = [text for text in texts if normalize(text) in test_texts]
        if shared:
            raise BadInput(
                f"{name}: {len(shared)} training questions are test questions, "
                f"such as {shared[0]!r}: remove them there"
            )
        training_questions += questions
    return training_questions
