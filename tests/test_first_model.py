"""micro/english: what its data promise. tools/first_model.py: with the micro model in
place of a pretrained one, and without a network."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, line_of, read, run_here, run_main

from machinery.errors import BadInput
from machinery.json_lines import write_jsonl
from machinery.passages import load_corpus
from machinery.questions import load_questions
from micro import english
from retriever import BM25
from rollout import parse_turn, spans
from tools import first_model, start

FOLDER = Path(english.HERE)


@pytest.fixture(scope="module")
def sets():
    return {
        name: load_questions(str(FOLDER / f"{name}.jsonl")) for name in english.SETS
    }


@pytest.fixture(scope="module")
def index():
    return BM25(load_corpus(FOLDER / "corpus.jsonl"))


# ---------------------------------------------------------------- the world


def test_the_script_makes_the_committed_data(tmp_path, monkeypatch):
    run_main(monkeypatch, english.main, "english.py", "--out", tmp_path)
    names = sorted(path.name for path in FOLDER.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_another_seed_makes_another_world(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, english.main, "english.py", "--seed", 1, "--out", tmp_path)
    assert (tmp_path / "test.jsonl").read_bytes() != (
        FOLDER / "test.jsonl"
    ).read_bytes()
    run_main(monkeypatch, english.main, "english.py", "--seed", -1, status=2)
    assert "--seed" in line_of(capsys)


def test_the_passages_nouns_lead_to_each_answer(sets, index):
    for questions in sets.values():
        for question in questions:
            path = question["path"]
            for relation, name, value in zip(
                question["chain"], path, path[1:], strict=False
            ):
                noun = english.NOUNS[relation]
                (passage,) = index.search([f"{noun} of {name}"], 1)[0]
                assert passage.text == f"The {noun} of {name} is {value}."
            assert question["golden_answers"] == [path[-1]]


def test_the_questions_nouns_often_lead_astray(sets, index):
    """Where passages have another noun, the question's finds any fact of the name."""
    found = []
    for questions in sets.values():
        for question in questions:
            name, value = question["path"][:2]
            relation = question["chain"][0]
            if english.NOUNS[relation] != relation:
                (passage,) = index.search([f"{relation} of {name}"], 1)[0]
                assert passage.title == name
                found.append(passage.text.endswith(f"is {value}."))
    assert len(found) > 200 and 0 < sum(found) / len(found) < 0.5


def test_sets_share_no_question_and_the_tests_no_name_with_the_training(sets):
    texts = [question["question"] for rows in sets.values() for question in rows]
    assert len(set(texts)) == len(texts)
    names = {
        name: {entity for question in rows for entity in question["path"]}
        for name, rows in sets.items()
    }
    seen = names["demonstrations"] | names["train"]
    assert not seen & (names["validation"] | names["test"])
    for name, (count, _) in english.SETS.items():
        hops = [question["hops"] for question in sets[name]]
        for number, share in english.SHARES.items():
            assert hops.count(number) == count * share


def test_the_agent_is_as_clumsy_as_its_habits_say(sets):
    """Shares over the committed demonstrations, within four standard deviations."""
    wrong_nouns = []
    early = []
    checked = []
    for question in sets["demonstrations"]:
        *searches, answer = question["demonstration"]
        assert parse_turn(answer)[0] == "answer"
        checked.append("Let me check." in searches[-1])
        if checked[-1]:
            searches.pop()
        chain = question["chain"]
        for relation, turn in zip(chain, searches, strict=False):
            noun = parse_turn(turn)[1].split(" of ")[0]
            assert noun in (relation, english.NOUNS[relation])
            if english.NOUNS[relation] != relation:
                wrong_nouns.append(noun == relation)
        early += [False] * (len(searches) - 1) + [True] * (len(searches) < len(chain))
    for outcomes, habit in (
        (wrong_nouns, 1 - english.PASSAGES_NOUN),
        (early, english.STOPS_EARLY),
        (checked, english.CHECKS),
    ):
        share = (1 - english.GOOD_DAY) * habit
        deviation = (share * (1 - share) / len(outcomes)) ** 0.5
        assert abs(sum(outcomes) / len(outcomes) - share) < 4 * deviation


def test_the_agent_follows_what_it_finds(sets, index):
    for question in sets["demonstrations"]:
        entity = question["path"][0]
        chain = list(question["chain"])
        for turn in question["demonstration"][:-1]:
            _, query = parse_turn(turn)
            if "To find" in turn:
                sought = english.description(chain, entity)
                assert turn.startswith(f"<think> To find: {sought}. </think>")
                assert query.endswith(f" of {entity}")
                chain = chain[1:]
            else:
                assert query == entity
            (passage,) = index.search([query], 1)[0]
            entity = passage.text.split(" is ")[1].rstrip(".")
        assert parse_turn(question["demonstration"][-1]) == ("answer", entity)


# ---------------------------------------------------------------- the start


OWN = [
    "<search> Ada Lovelace </search>",
    "<think> Next. </think>\n<search>London</search>",
    "<answer> the Thames </answer>",
]


def test_a_questions_own_demonstration_is_played(tokenizer, three):
    question = {
        "question": "Which river?",
        "golden_answers": ["Thames"],
        "demonstration": OWN,
    }
    limits = {"count": 2, "k": 1, "max_searches": 4, "max_observation_tokens": 100}
    wrong = {**question, "golden_answers": ["Seine"]}
    made = start.write_demonstrations(three, [question, wrong], tokenizer, **limits)
    assert [demonstration.right for demonstration in made] == [True, False]
    trajectory = made[0].trajectory
    titles = [passages[0].title for passages in trajectory.passages]
    assert titles == ["Ada Lovelace", "London"]
    assert trajectory.answer == "the Thames"
    written = [tokenizer.decode(ids) for sampled, ids in spans(trajectory) if sampled]
    assert written == [*OWN[:2], OWN[2] + tokenizer.eos_token]
    marked = {**question, "question": "Which</search> river?"}
    assert start.write_demonstrations(three, [marked], tokenizer, **limits) == []


@pytest.mark.parametrize(
    "demonstration",
    ["Ada", [], [1], OWN[:2], [OWN[2], OWN[2]], [*OWN[:2], "Thames"], {"a": "b"}],
)
def test_a_malformed_demonstration_is_refused_by_its_line(demonstration, tmp_path):
    rows = [
        {"question": "q?", "golden_answers": ["a"]},
        {"question": "r?", "golden_answers": ["a"], "demonstration": demonstration},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=r'q.jsonl:2: "demonstration" must be'):
        start.read_questions(str(path))


def test_only_right_demonstrations_show_themselves(monkeypatch, tmp_path, capsys):
    shown = []
    trained = []
    keep = start.show_reference

    def show_reference(model, tokenizer, demonstration):
        shown.append(demonstration)
        return keep(model, tokenizer, demonstration)

    def imitate(model, demonstrations, *, lr, batch):
        trained.extend(demonstrations)

    monkeypatch.setattr(start, "show_reference", show_reference)
    monkeypatch.setattr(start, "imitate", imitate)
    start.make_start(
        "micro/model",
        str(FOLDER / "demonstrations.jsonl"),
        str(FOLDER / "corpus.jsonl"),
        tmp_path / "start",
        count=240,
        privileged=200,
        prompt="{question}",
        k=1,
        max_searches=4,
        max_observation_tokens=64,
        batch=4,
        lr=1e-4,
        seed=0,
    )
    rows = load_questions(str(FOLDER / "demonstrations.jsonl"))
    right = [
        row["question"]
        for row in rows
        if parse_turn(row["demonstration"][-1])[1] == row["golden_answers"][0]
    ]
    # Fewer are right than were wanted: all of them show themselves.
    assert sorted(demo.question for demo in shown) == sorted(right)
    assert len(trained) == 240 and 40 < len(right) < 200
    assert f"{len(right)} privileged" in capsys.readouterr().out


# ---------------------------------------------------------------- the tool


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Settings of a run of seconds, and a start that trains on four demonstrations."""
    settings = {
        **json.loads((ROOT / "configs/first-model.json").read_text()),
        "grpo_steps": 1,
        "questions_per_step": 2,
        "group_size": 2,
        "ofsd_questions": 4,
        "eval_limit": 6,
    }
    path = tmp_path / "small.json"
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(first_model, "SETTINGS", str(path))
    monkeypatch.setattr(first_model, "DEMONSTRATIONS", 4)
    monkeypatch.setattr(first_model, "PRIVILEGED", 0)
    return [
        "--model",
        "micro/model",
        "--arithmetic",
        "float32",
        "--out",
        tmp_path / "f",
    ]


def test_the_whole_command_and_going_on(small, tmp_path, monkeypatch, capsys):
    main = first_model.main
    run_stages = first_model.run_stages

    def stop(run):
        run.test("base")
        with run.saying_how_to_go_on():
            raise KeyboardInterrupt

    # Stopped after the first test, ...
    monkeypatch.setattr(first_model, "run_stages", stop)
    status, _, error = run_here(monkeypatch, capsys, main, "first_model.py", *small)
    assert status == 130 and "stopped" in error
    assert "the same command goes on" in error
    run = tmp_path / "f/run"
    began = read(run, "metrics.jsonl")
    assert [row["stage"] for row in began] == ["base"]

    # ... it goes on: neither the start nor the first test is made again.
    monkeypatch.setattr(first_model, "run_stages", run_stages)
    monkeypatch.setattr(first_model, "teach_the_tags", None)
    status, out, _ = run_here(monkeypatch, capsys, main, "first_model.py", *small)
    assert status == 0
    tests = [row for row in read(run, "metrics.jsonl") if row["kind"] == "eval"]
    stages = ["base", "grpo-1", "ofsd-1", "grpo-2", "ofsd-2"]
    assert [row["stage"] for row in tests] == stages
    assert tests[0] == began[0]
    sampled = read(run, "sampled.jsonl")
    assert [row["stage"] for row in sampled] == [s for s in stages for _ in range(6)]
    for test in tests:
        ems = [row["em"] for row in sampled if row["stage"] == test["stage"]]
        assert test["em_sampled"] == pytest.approx(sum(ems) / 6)
    assert "gain, sampled" in out and "before: " in out and "after: " in out


def test_gains_are_paired_question_by_question(tmp_path, capsys):
    tests = [
        {"kind": "eval", "stage": "base", "n": 4, "em": 0.25, "em_sampled": 0.25},
        {"kind": "eval", "stage": "grpo-1", "n": 4, "em": 0.5, "em_sampled": 0.75},
    ]
    ems = {"base": [1, 0, 0, 0], "grpo-1": [1, 1, 1, 0]}
    samples = []
    for stage, values in ems.items():
        samples += [{"stage": stage, "em": em} for em in values]
    write_jsonl(tmp_path / "metrics.jsonl", [{**test, "time_s": 60} for test in tests])
    write_jsonl(tmp_path / "sampled.jsonl", samples)
    first_model.print_gains(tmp_path)
    # The differences are 0, 1, 1, 0: mean .5, standard error sqrt(1/3 / 4).
    assert "+0.500 ± 0.566" in capsys.readouterr().out


def test_habits_are_counted_by_stage(tmp_path, capsys):
    """Wrong noun: "birthplace" and "mayor", where the passages say hometown and ruler.
    Other queries say nothing about it."""
    nouns = (first_model.WRONG_NOUNS, first_model.RIGHT_NOUNS)
    assert nouns == ({"birthplace", "mayor"}, {"hometown", "ruler"})
    samples = [
        ("base", "q1", ["birthplace of A", "ruler of B", "B"], "Let me check."),
        ("base", "q2", ["mayor of A", "founder of A"], "Found: B."),
        ("grpo-1", "q1", ["hometown of A", "ruler of B"], "Found: C."),
        ("grpo-1", "q2", ["ruler of A", "employer of B", "ruler of A"], ""),
        # No search was left for its check, so this one has two queries. It went on.
        ("ofsd-1", "q1", ["hometown of A", "ruler of B"], "Let me check."),
    ]
    rows = []
    for stage, number, queries, text in samples:
        row = {
            "stage": stage,
            "id": number,
            "queries": queries,
            "finish_reason": "searches" if stage == "ofsd-1" else "answer",
            "text": [[1, text]],
        }
        rows.append(row)
    write_jsonl(tmp_path / "sampled.jsonl", rows)
    questions = [{"id": "q1", "hops": 2}, {"id": "q2", "hops": 3}]
    first_model.print_habits(tmp_path, questions)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-4:] == [
        "stage wrong noun stops early checks repeats",
        "base 0.667 0.500 0.500 0.000",
        "grpo-1 0.000 0.000 0.000 0.500",
        "ofsd-1 0.000 0.000 1.000 0.000",
    ]


def test_corrections_are_counted_by_stage_and_searches(tmp_path, capsys):
    """Two observations stand before place 5, one before place 2."""
    divergence = [[" To", 2.0], ["\n", None], [" To", 2.0], ["\n", None], ["-", None]]
    divergence += [[" Found", 2.0], [" Let", 0.0]]

    def objection(place, written, preferred):
        return [place, [written, 0.1, 0.9], [preferred, 0.9, 0.1], [written, 0.1, 0.9]]

    pairs = [
        ("ofsd-1", [objection(0, " To", " Found"), objection(2, " Let", " Found")]),
        ("ofsd-1", [objection(2, " To", " Found"), objection(5, " Found", " To")]),
        # These are about something else.
        ("ofsd-2", [objection(5, " To", " Let"), objection(5, " mayor", " ruler")]),
    ]
    rows = [{"kind": "eval", "stage": "base"}]
    for stage, objections in pairs:
        row = {
            "kind": "pair",
            "stage": stage,
            "divergence": divergence,
            "objections": objections,
        }
        rows.append(row)
    write_jsonl(tmp_path / "trajectories.jsonl", rows)
    first_model.print_corrections(tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-4:] == [
        "stage searches too far too early",
        "ofsd-1 1 2 0",
        "ofsd-1 2 0 1",
        "ofsd-2 2 0 0",
    ]


def test_without_network_package_or_library_it_says_what_to_do(monkeypatch, tmp_path):
    target = tmp_path / "model"
    monkeypatch.setattr(first_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install -r requirements-extra\.txt"):
        first_model.get_smollm2(target)
    monkeypatch.setattr(first_model.importlib.util, "find_spec", lambda name: name)

    def fail(command, **keywords):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching one\n")

    monkeypatch.setattr(first_model.subprocess, "run", fail)
    with pytest.raises(BadInput, match=r"ERROR: No matching one.*--model"):
        first_model.get_smollm2(target)
    assert not target.exists()
    target.mkdir()  # it is there already: nothing is downloaded
    assert first_model.get_smollm2(target) == str(target)


def test_the_settings_are_those_of_train_py():
    """The file can be given to train.py, too."""
    from train import Config

    settings = json.loads((ROOT / "configs/first-model.json").read_text())
    config = Config(**settings)
    assert config.eval_limit >= 100 and config.rounds == 2
