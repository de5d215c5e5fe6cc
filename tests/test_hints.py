"""machinery/hints.py: when a user is told something, and when not."""

from dataclasses import replace

import pytest
from conftest import ROOT, SMALL, steps_of

from machinery.hints import (
    NOTHING_EARNED,
    bytes_per_token,
    foreign_words,
    nothing_earned,
)
from machinery.json_lines import write_jsonl
from machinery.questions import load_questions
from train import train


def step(reward: float, zero_var: float) -> dict[str, float]:
    return {"reward": reward, "zero_var": zero_var}


NOTHING = step(0.0, 1.0)


def test_three_steps_without_a_reward_are_told_once_and_at_once():
    told = [nothing_earned([NOTHING] * steps) for steps in range(1, 6)]
    assert told == [False, False, True, False, False]


@pytest.mark.parametrize(
    "something", [step(0.01, 0.9), step(0.0, 0.5), step(1.0, 1.0), step(-0.5, 1.0)]
)
def test_where_something_was_earned_nothing_is_told(something):
    """A negative reward is one, too. Equal rewards of 1 are no lack of them."""
    for number in range(3):
        steps = [NOTHING] * 3
        steps[number] = something
        assert not nothing_earned(steps)


class Spelling:
    """A tokenizer that makes a token of so many bytes. A "?" is unknown to it."""

    def __init__(self, size: int, unknown: str = "?"):
        self.size = size
        self.unk_token_id = int.from_bytes(unknown.encode() * size)

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens  # they hold no text
        data = text.encode()
        starts = range(0, len(data) // self.size * self.size, self.size)
        return {"input_ids": [int.from_bytes(data[i : i + self.size]) for i in starts]}

    def decode(self, ids, **settings):
        return b"".join(token.to_bytes(self.size) for token in ids).decode()


def test_words_that_are_spelled_out_are_told():
    questions = [{"question": "Who was it?!"}] * 3  # 12 bytes
    assert bytes_per_token(Spelling(4), questions) == 4
    assert foreign_words("a/model", Spelling(4), questions) == ""
    assert foreign_words("a/model", Spelling(2), questions) == ""
    said = foreign_words("a/model", Spelling(1), questions)
    assert "strange to a/model" in said and "--model" in said
    assert "\n" not in said
    assert bytes_per_token(Spelling(100), questions) == 0  # no token at all


def test_unknown_tokens_hold_no_text():
    questions = [{"question": "????Who?"}]
    assert bytes_per_token(Spelling(4), questions) == 2
    assert bytes_per_token(Spelling(4, "!"), questions) == 4


def test_half_a_character_in_a_question_is_no_traceback(tokenizer):
    """JSON can hold one. For the model it is U+FFFD."""
    questions = [{"question": "\ud800"}]
    assert bytes_per_token(tokenizer, questions) == pytest.approx(1)


def test_the_micro_model_knows_the_words_of_its_world(tokenizer):
    questions = load_questions(str(ROOT / "micro/train.jsonl"))
    assert foreign_words("micro/model", tokenizer, questions) == ""
    foreign = [{"question": "Welches Gemälde hängt heute in Zürich?"}]
    assert foreign_words("micro/model", tokenizer, foreign)


def test_train_tells_both_and_goes_on(tmp_path, capsys):
    """Questions that the micro model cannot read, and whose answers nobody finds."""
    rows = []
    for number in range(8):
        question = f"Welches Gemälde hängt {number} Tage in Zürich?"
        rows.append({"question": question, "golden_answers": ["Grünewald"]})
    write_jsonl(tmp_path / "questions.jsonl", rows)
    config = replace(
        SMALL,
        out=str(tmp_path / "run"),
        questions=str(tmp_path / "questions.jsonl"),
        grpo_steps=4,
        questions_per_step=2,
        max_turn_tokens=16,
        ofsd=False,
    )
    folder = train(config)
    lines = capsys.readouterr().out.splitlines()
    assert len(steps_of(folder, "grpo-1")) == 4
    assert lines.count(NOTHING_EARNED) == 1
    told = lines.index(NOTHING_EARNED)
    assert lines[told - 1].split()[0] == "3" and lines[told + 1].split()[0] == "4"
    warnings = [line for line in lines if "strange to micro/model" in line]
    assert lines.index(warnings[0]) < lines.index("grpo-1: 4 steps")
    assert len(warnings) == 1
