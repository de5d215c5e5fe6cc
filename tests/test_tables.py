"""What is printed and logged: machinery/tables.py, metrics.py, token_statistics.py."""

import json

import pytest
import torch

from grpo import TokenLosses
from machinery import token_statistics
from machinery.benchmarks import BENCHMARKS, MULTI_HOP, SINGLE_HOP
from machinery.metrics import batch_stats
from machinery.tables import interval, print_results, print_table, report
from machinery.token_statistics import TokenStatistics
from rollout import Trajectory


def printed(capsys) -> list[str]:
    """The lines that were printed, with single spaces between their columns."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_intervals():
    """Wilson: 0 of 10 is 0 to 3.8416 / 13.8416; half of 100 is .404 to .596."""
    assert interval(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-4)
    assert interval(1.0, 10) == pytest.approx((1 - 0.27754, 1.0), abs=1e-4)
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    for hits in range(11):
        low, high = interval(hits / 10, 10)
        assert 0 <= low < high <= 1
    # Where all is wrong, or all is right, no rounding puts the share outside. A figure
    # draws what lies between as a bar, which cannot be of negative length.
    for n in range(1, 500):
        assert interval(0.0, n)[0] == 0.0
        assert interval(1.0, n)[1] == 1.0


# ----------------------------------------------------------------------- tables


def test_a_table_has_the_widths_of_its_columns(capsys):
    print_table([{"name": "a", "share": 0.25}, {"name": "longer", "share": 2}])
    assert capsys.readouterr().out == "  name  share\n     a  0.250\nlonger      2\n"


def test_a_table_goes_by_the_names_of_its_columns(capsys):
    """The first row has the names. A later one may lack some."""
    print_table([{"a": 1, "b": 2, "c": 3}, {"c": 6, "a": 4}])
    assert printed(capsys) == ["a b c", "1 2 3", "4 6"]


def test_names_of_others_move_no_cursor_and_break_no_line(capsys):
    """A question's "type" may come from anywhere, and is the name of a column."""
    print_table([{"EM \x1b[31mred\nline": "a\tb\x07"}])
    assert printed(capsys) == [r"EM \x1b[31mred line", r"a b\x07"]


def result_of(em: float) -> dict:
    return {"em": em, "f1": 0.5, "searches": 1.25, "answered": 1.0, "n": 100}


def test_a_table_of_results_ends_with_averages_that_count_each_set_once(capsys):
    ems = {"nq": 0.2, "popqa": 0.4, "musique": 0.1}
    print_results({name: result_of(em) for name, em in ems.items()})
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1  # columns
    assert [" ".join(line.split()) for line in lines] == [
        "set EM 95 % F1 searches answered n",
        "nq 0.200 0.133-0.289 0.500 1.250 1.000 100",
        "popqa 0.400 0.309-0.498 0.500 1.250 1.000 100",
        "musique 0.100 0.055-0.174 0.500 1.250 1.000 100",
        "single-hop 0.300",
        "multi-hop 0.100",
        "average 0.233",
    ]


def test_averages_are_over_the_sets_that_are_there(capsys):
    print_results({"micro": result_of(0.2)})
    assert len(printed(capsys)) == 2  # none of the seven, so no average
    print_results({"nq": result_of(0.2), "mine": result_of(0.9)})
    assert printed(capsys)[3:] == ["single-hop 0.200", "average 0.200"]


def test_the_average_of_published_results_is_the_published_one(capsys):
    """Search-E1's row, set by set, and the average that its paper reports."""
    published = {
        "nq": 0.474,
        "triviaqa": 0.626,
        "popqa": 0.461,
        "hotpotqa": 0.427,
        "2wikimultihopqa": 0.436,
        "musique": 0.193,
        "bamboogle": 0.464,
    }
    assert list(BENCHMARKS) == list(published) == [*SINGLE_HOP, *MULTI_HOP]
    assert len(SINGLE_HOP) == 3
    print_results({name: result_of(em) for name, em in published.items()})
    assert printed(capsys)[-1] == "average 0.440"


# -------------------------------------------------------- the end of a training


def evaluation(stage: str, em: float, **edges) -> dict:
    em_by = {"2-hop": em, "10-hop": 0.0}
    row = {"stage": stage, "em": em, "f1": em, "em_by": em_by, "n": 3}
    return {**row, "searches": 2.0, "answered": 1.0, "time_s": 90.0, **edges}


def answer_line(question: str, em: float, said: str, searches: int = 0) -> dict:
    return {
        "kind": "eval",
        "question": question,
        "golden_answers": ["x", "y"],
        "em": em,
        "queries": ["q"] * searches,
        "text": [["sampled", f" {said}"], ["written", " \x1b[0m\n"]],
    }


def test_the_report_is_a_table_and_a_question_that_became_right(tmp_path, capsys):
    """Of those that became right, the one with the most searches in the last test."""
    lines = [
        answer_line("one", 0.0, "first wrong", searches=9),
        answer_line("two", 0.0, "second wrong"),
        answer_line("three", 1.0, "third right"),
        {"kind": "pair"},
        answer_line("one", 1.0, "first between", searches=9),
        answer_line("two", 0.0, "second between", searches=9),
        answer_line("three", 1.0, "third between", searches=9),
        answer_line("one", 1.0, "first right", searches=1),
        answer_line("two", 1.0, "second right", searches=2),
        answer_line("three", 1.0, "third still", searches=9),
    ]
    path = tmp_path / "trajectories.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    edges = {"edge": 0.25, "edge_supported": 0.0, "edge_control": -0.5}
    tests = [evaluation("base", 1 / 3), evaluation("grpo-1", 0.5)]
    report(tmp_path, [*tests, evaluation("ofsd-1", 1.0, **edges)])
    lines = printed(capsys)
    assert lines[1].startswith("3 test questions. edge: the teacher's EM minus")
    assert lines[3:7] == [
        "stage EM F1 EM 2-hop EM 10-hop searches answered edge supported control "
        "minutes",
        "base 0.333 0.333 0.333 0.000 2.000 1.000 1.5",
        "grpo-1 0.500 0.500 0.500 0.000 2.000 1.000 1.5",
        "ofsd-1 1.000 1.000 1.000 0.000 2.000 1.000 +0.250 +0.000 -0.500 1.5",
    ]
    assert lines[8:10] == ["before: two (answer: x / y)", r"second wrong \x1b[0m"]
    assert lines[11:13] == ["after: two (answer: x / y)", r"second right \x1b[0m"]
    assert lines[14].endswith(str(tmp_path))
    assert lines[15] == f"look at the run: python -m tools.trace {tmp_path}"


# ------------------------------------------------------------- a step's metrics


def trajectory_of(length: int, answer: str | None, queries: list[str]) -> Trajectory:
    trajectory = Trajectory("?", [], answer=answer, queries=queries)
    trajectory.extend([7] * length, [0.0] * length)
    return trajectory


def test_what_a_batch_says_before_training():
    trajectories = [
        trajectory_of(4, "x", ["a b", "A B"]),  # the same query, but for letter case
        trajectory_of(2, None, ["a", "b"]),
        trajectory_of(1, "y", ["a"]),
        trajectory_of(1, "z", []),
    ]
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert batch_stats(trajectories, rewards) == {
        "reward": 0.75,
        "zero_var": 0.5,
        "length": 2,
        "searches": 1.25,
        "no_answer": 0.25,
        "repeats": 0.25,
    }
    # Equal is what is equal within a group.
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert batch_stats(trajectories, rewards)["zero_var"] == 0.25
    # Any number may be a reward. Equal ones teach nothing, whatever they are.
    stats = batch_stats(trajectories, torch.tensor([[-0.5, -0.5], [0.25, -0.25]]))
    assert (stats["reward"], stats["zero_var"]) == (-0.25, 0.5)


# ------------------------------------------------------------- an update's tokens


def chunk_of(*log_ratios: float, clipped: int = 0, kl: float | None = None):
    """The TokenLosses of a chunk, and its entropies: 1 nat each."""
    count = len(log_ratios)
    is_clipped = torch.zeros(count, dtype=torch.bool)
    is_clipped[:clipped] = True
    kls = None if kl is None else torch.full((count,), kl)
    losses = TokenLosses(torch.zeros(count), torch.tensor(log_ratios), is_clipped, kls)
    return torch.tensor(0.5), losses, torch.ones(count)


def test_an_update_logs_the_mean_token_and_the_largest_gap(monkeypatch):
    """The chunks have different sizes, and one device has none of the tokens."""
    statistics = TokenStatistics(with_kl=True)
    statistics.add(*chunk_of(0.1, -0.4, 0.0, clipped=2, kl=0.5))
    statistics.add(*chunk_of())
    statistics.add(*chunk_of(0.2, clipped=0, kl=0.1))
    alone = {
        "loss": 1.5,
        "clip_frac": 0.5,
        "entropy": 1.0,
        "logprob_gap": 0.4,
        "tokens_trained": 4,
        "kl": 0.4,
    }
    assert statistics.summary() == pytest.approx(alone)

    idle = TokenStatistics(with_kl=True)
    other = TokenStatistics(with_kl=True)
    other.add(*chunk_of(*[0.3] * 4, clipped=4, kl=0.0))
    devices = [idle, statistics, other]
    monkeypatch.setattr(token_statistics, "gather", lambda value: devices)
    together = {
        "loss": 2.0,
        "clip_frac": 0.75,
        "entropy": 1.0,
        "logprob_gap": 0.4,
        "tokens_trained": 8,
        "kl": 0.2,
    }
    assert statistics.summary() == pytest.approx(together)


def test_without_a_token_or_a_penalty_there_is_no_division_and_no_kl():
    statistics = TokenStatistics(with_kl=False)
    nothing = {"loss": 0.0, "clip_frac": 0.0, "entropy": 0.0, "logprob_gap": 0.0}
    assert statistics.summary() == {**nothing, "tokens_trained": 0}
    statistics.add(*chunk_of(0.0))
    one = {**nothing, "tokens_trained": 1}
    assert statistics.summary() == {**one, "loss": 0.5, "entropy": 1.0}
    # With a penalty its column is there, even if no token was sampled.
    silent = TokenStatistics(with_kl=True)
    assert silent.summary() == {**nothing, "tokens_trained": 0, "kl": 0.0}
