"""micro/: what its data and its model promise. The files are the committed ones."""

import json
import random
import re
from collections import Counter
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import line_of, run_main

from eval import evaluate
from grpo import response_logits
from machinery.json_lines import write_jsonl
from machinery.passages import load_corpus
from machinery.questions import load_questions
from machinery.text import decode
from micro import make
from retriever import words
from rollout import parse_turn

MICRO = Path(make.__file__).parent
KINDS = {
    relation: kind for kind, text in make.RELATIONS.items() for relation in text.split()
}
PHASE = make.Phase(
    count=60,
    privileged=1.0,
    own=1.0,
    short=False,
    observations=0.2,
    lr=1e-3,
    last=0.1,
)


@pytest.fixture(scope="module")
def sets():
    return {name: load_questions(str(MICRO / f"{name}.jsonl")) for name in make.SETS}


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(MICRO / "corpus.jsonl")


@pytest.fixture(scope="module")
def pools():
    return make.name_pools(random.Random(0))


@pytest.fixture(scope="module")
def world(pools):
    return make.World(random.Random(0), pools)


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.fixture
def draw(tokenizer, pools, rng):
    """draw(phase): the demonstrations of a phase by an agent of one habit."""

    def demonstrations(phase, avoid=frozenset()):
        return list(make.demonstrations(rng, tokenizer, pools, avoid, habit(0), phase))

    return demonstrations


def links(rows):
    """(name, relation, the corpus's word for it, the name it leads to) for each hop."""
    for row in rows:
        path = row["path"]
        yield from zip(path[:-1], row["chain"], row["words"], path[1:], strict=True)


def queries_of(text: str) -> dict[str, str]:
    """The word that was searched with for each relation in the text of a trajectory."""
    searched = {}
    for query in re.findall(r"<search> ([^<]*)</search>", text):
        terms = query.split()
        if len(terms) == 4:  # two are of the name
            searched[terms[2]] = terms[3]
    return searched


def habit(number: int) -> dict:
    """Odds of an agent that always takes the word of this number."""
    return {
        relation: {make.WORDS[kind].split()[number]: 1}
        for relation, kind in KINDS.items()
    }


def favourite(odds: dict, relation: str) -> str:
    """The only word of a relation in such odds."""
    return next(iter(odds[relation]))


# ---------------------------------------------------------------- the data


def test_the_committed_data_is_what_the_script_makes(tmp_path, monkeypatch):
    run_main(monkeypatch, make.main, "make.py", "--data-only", "--out", tmp_path)
    names = sorted(path.name for path in MICRO.glob("*.jsonl"))
    assert sorted(path.name for path in tmp_path.glob("*")) == names
    assert len(names) == 1 + len(make.SETS)
    for name in names:
        assert (tmp_path / name).read_bytes() == (MICRO / name).read_bytes()


def test_the_data_is_json_lines_of_the_documented_form():
    documented = {"id", "question", "golden_answers", "hops"}
    for name in make.SETS:
        for line in (MICRO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert documented <= json.loads(line).keys()


def test_hops_stand_in_equal_shares_and_half_of_the_test_questions_are_held_out(
    sets, corpus
):
    assert len(corpus) == 5 * sum(make.COUNTS.values())
    for name, question_set in make.SETS.items():
        kinds = Counter((row["hops"], row["held_out"]) for row in sets[name])
        tested = "test" in name or name == "evidence-retention"
        parts = (False, True) if tested else (False,)
        share = question_set.count // len(parts) // 3
        assert kinds == {(hops, part): share for hops in (1, 2, 3) for part in parts}
        assert all(len(row["chain"]) == row["hops"] for row in sets[name])


def test_retention_trains_on_half_of_the_relations_and_tests_both_halves(sets):
    trained = set(make.TRAINED)
    for row in sets["evidence-retention-train"]:
        assert set(row["chain"]) <= trained
    halves = Counter()
    for row in sets["evidence-retention"]:
        shared = trained.intersection(row["chain"])
        assert shared in (set(), set(row["chain"]))  # a chain is of one half
        halves[row["hops"], row["held_out"], bool(shared)] += 1
    assert set(halves.values()) == {45} and len(halves) == 12


def test_no_question_occurs_twice_in_text_or_in_substance(sets):
    rows = [question for questions in sets.values() for question in questions]
    assert len({row["question"] for row in rows}) == len(rows)
    assert len({(row["path"][0], *row["chain"]) for row in rows}) == len(rows)


def test_held_out_questions_are_about_entities_that_no_other_question_mentions(sets):
    rows = [row for questions in sets.values() for row in questions]
    known = {name for row in rows if not row["held_out"] for name in row["path"]}
    held = {name for row in rows if row["held_out"] for name in row["path"]}
    assert len(known) > 300 and len(held) > 150 and not known & held


def test_every_answer_can_be_found_by_following_the_passages(sets, corpus):
    stated = {(passage.title, passage.text) for passage in corpus}
    for row in [row for questions in sets.values() for row in questions]:
        (answer,) = row["golden_answers"]
        assert row["path"][0] in row["question"] and row["path"][-1] == answer
        assert len({*row["path"]}) == row["hops"] + 1
        assert answer not in row["question"]
        for name, _, word, value in links([row]):
            assert (name, f"{name} is {word} by {value}.") in stated


# ---------------------------------------------------------------- two vocabularies


def test_each_relation_of_a_kind_has_a_word_of_its_own_in_all_sets(sets):
    used = {
        (relation, word)
        for rows in sets.values()
        for _, relation, word, _ in links(rows)
    }
    assert len(used) == len(dict(used)) == 20  # one each, and all are asked about
    for relation, word in used:
        assert word in make.WORDS[KINDS[relation]].split()
    assert len({word for _, word in used}) == 20


def test_no_passage_has_the_questions_word_for_a_relation(corpus):
    in_passages = set()
    for passage in corpus:
        in_passages.update(words(f"{passage.title} {passage.text}"))
    in_questions = set()
    for relation, clause in make.CLAUSES.items():
        in_questions.update(words(f"{relation} {clause}"))
    # "by" stands in every passage, so no query gains by it.
    assert in_questions & in_passages == {"by"}


def by_relation(name, relation, word):
    return f"{name} {relation}"


def by_clause(name, relation, word):
    return make.CLAUSES[relation].format(name)


def by_word(name, relation, word):
    return f"{name} {word}"


def by_relation_and_word(name, relation, word):
    return f"{name} {relation} {word}"


def by_half_a_name_and_word(name, relation, word):
    return f"{name.split()[0]} {word}"


def test_only_the_corpuss_word_finds_the_passage_reliably(micro_index, sets):
    """A name has five passages. Without the word chance decides which of them come: one
    in five is first, and three in five are among three. Four standard deviations of
    2,160 are .04."""
    hops = list(links(sets["train"]))

    def share(query, k: int) -> float:
        queries = [query(*hop[:3]) for hop in hops]
        right = 0
        for hop, passages in zip(hops, micro_index.search(queries, k), strict=True):
            name, _, word, value = hop
            text = f"{name} is {word} by {value}."
            right += text in [passage.text for passage in passages]
        return right / len(hops)

    assert len(hops) == 2160
    for query in (by_relation, by_clause):
        assert abs(share(query, 1) - 1 / 5) < 0.04
        assert abs(share(query, 3) - 3 / 5) < 0.04
    assert share(by_word, 1) == 1
    assert share(by_relation_and_word, 1) == 1
    assert share(by_half_a_name_and_word, 1) < 0.3  # finds strangers


def test_the_words_are_dealt_anew_in_each_world(pools, rng):
    """In 20 worlds a relation misses one of its five words with the probability
    .8 ** 20 = .01."""
    worlds = [make.World(rng, pools).words for _ in range(20)]
    for kind, text in make.RELATIONS.items():
        relations = text.split()
        for dealt in worlds:
            of_the_kind = [dealt[relation] for relation in relations]
            assert sorted(of_the_kind) == sorted(make.WORDS[kind].split())
        for relation in relations:
            assert len({dealt[relation] for dealt in worlds}) >= 4


# ---------------------------------------------------------------- the agent


def test_the_agents_habits_are_right_in_part(world, rng):
    odds = make.habitual_words(rng, world.words)
    for kind, text in make.RELATIONS.items():
        right = [odds[relation][world.words[relation]] for relation in text.split()]
        assert sorted(right) == pytest.approx([0.36] * 2 + [0.76] * 3)
        for relation in text.split():
            assert [*odds[relation]] == make.WORDS[kind].split()
            assert sum(odds[relation].values()) == pytest.approx(1)


def test_the_agent_is_clumsy_and_with_the_right_words_its_straight_road_is_right(
    world, rng
):
    """A hop of the straight road goes wrong where the agent slips (.05) and its habit
    is wrong (.4)."""
    odds = make.habitual_words(rng, world.words)
    right = Counter()
    straight = 0
    questions = [world.question(rng, hops) for hops in (1, 2, 3) for _ in range(200)]
    for question in questions:
        known = dict(zip(question["chain"], question["words"], strict=True))
        for clumsy in (True, False):
            shown = {} if clumsy else known
            play = make.demonstrate(
                rng, world, question, odds, clumsy=clumsy, shown=shown
            )
            right[clumsy] += (
                f"<answer> {question['golden_answers'][0]}</answer>" in play[-1]
            )
            searches = sum(isinstance(step, list) for step in play)
            assert searches <= make.MAX_SEARCHES and len(play) == 2 * searches + 1
            straight += not clumsy and searches == question["hops"]
    assert straight == len(questions) and right[False] > 0.93 * len(questions)
    assert 0.25 * len(questions) < right[True] < 0.5 * len(questions)


def test_a_word_that_is_shown_is_used_for_its_relation_only(world, rng, monkeypatch):
    monkeypatch.setattr(make, "SLIP", 0.0)
    shared = 0
    for _ in range(200):
        question = world.question(rng, 3)
        shown = {
            relation: favourite(habit(1), relation)
            for relation in world.question(rng, 3)["chain"]
        }
        play = make.demonstrate(
            rng, world, question, habit(0), clumsy=True, shown=shown
        )
        for relation, word in queries_of("".join(play[::2])).items():
            expected = habit(1) if relation in shown else habit(0)
            assert word == favourite(expected, relation)
            shared += relation in shown
    assert shared > 20


def test_the_agent_believes_the_first_passage_of_a_search(world, rng):
    for _ in range(100):
        play = make.demonstrate(
            rng, world, world.question(rng, 1), habit(2), clumsy=True
        )
        assert f"<answer> {play[1][0].text.split(' by ')[1][:-1]}</answer>" in play[-1]


def test_it_searches_again_word_for_word(world, rng):
    again = 0
    for _ in range(200):
        play = make.demonstrate(
            rng, world, world.question(rng, 2), habit(0), clumsy=True
        )
        for before, text in pairwise(play[:-1:2]):
            if "search again" in text:
                assert parse_turn(before) == parse_turn(text)
                again += 1
    assert again > 50


# ---------------------------------------------------------------- its demonstrations


def asked_about(question: str) -> str:
    """The entity that a question starts from."""
    return re.findall(r"[A-Z]\w+ [A-Z]\w+", question)[-1]


def shown_and_said(tokenizer, made) -> tuple[str, str]:
    """The reference in a demonstration's prompt, and the response."""
    prompt = decode(tokenizer, made.prompt_ids)
    shown = re.search(r"as follows:\n\n(.*)\n\nNow answer", prompt, re.DOTALL)
    return shown[1] if shown else "", decode(tokenizer, made.response_ids)


def answer_of(text: str) -> tuple[str, str] | None:
    return parse_turn(text.split("</search>")[-1])


def test_under_its_own_reference_the_agent_takes_the_straight_road(tokenizer, draw):
    """Of 60 demonstrations at most ten are spoiled by a slip, which spoils one hop in
    twenty."""
    right = 0
    for made in draw(PHASE):
        shown, said = shown_and_said(tokenizer, made)
        assert "search again" not in said and "Let me check" not in said
        right += answer_of(shown) == answer_of(said)
    assert right >= 50


def test_under_anothers_reference_it_is_clumsy_and_finds_words_for_shared_relations(
    tokenizer, draw
):
    same = 0
    total = 0
    clumsy = 0
    for before, made in pairwise(draw(PHASE._replace(count=200, own=0.0))):
        shown, said = shown_and_said(tokenizer, made)
        reference = queries_of(shown)
        assert reference and f"about {asked_about(before.question)}." in shown
        for relation, word in queries_of(said).items():
            if relation in reference:
                same += word == reference[relation]
                total += 1
            else:
                assert word == favourite(habit(0), relation)
        clumsy += "search again" in said
    assert total > 15 and same >= 0.8 * total and clumsy > 40


def test_a_reference_is_right_and_may_be_shown_in_short(tokenizer, draw):
    for short in (True, False):
        for made in draw(PHASE._replace(count=30, short=short)):
            shown, _ = shown_and_said(tokenizer, made)
            assert ("<think>" in shown) == ("<information>" in shown) == (not short)
            assert queries_of(shown) and shown.count("<answer>") == 1


def test_the_shares_of_the_prompts_are_those_of_the_phase(tokenizer, draw):
    """Four standard deviations of a share of 400 are at most .1."""
    privileged = 0
    own = 0
    for made in draw(PHASE._replace(count=400, privileged=0.6, own=0.7)):
        shown, _ = shown_and_said(tokenizer, made)
        privileged += bool(shown)
        own += f"about {asked_about(made.question)}." in shown
    assert abs(privileged / 400 - 0.6) < 0.1 and abs(own / privileged - 0.7) < 0.12


def test_the_demonstrations_mention_no_held_out_entity(draw):
    rows = load_questions(str(MICRO / "test.jsonl"))
    held = frozenset(name for row in rows if row["held_out"] for name in row["path"])

    def titles(avoid):
        found = set()
        for made in draw(PHASE._replace(count=100), avoid):
            for passages in made.passages:
                found.update(passage.title for passage in passages)
        return found

    assert not titles(held) & held and titles(frozenset()) & held


# ---------------------------------------------------------------- the model


def test_the_model_is_small_and_knows_no_fact(micro, sets):
    """With a retriever that finds nothing it is at a loss: the facts are invented."""
    model, tokenizer = micro
    assert model.num_parameters() < 2_000_000
    assert (MICRO / "model/model.safetensors").stat().st_size < 8_000_000
    tested = evaluate(model, tokenizer, make.FindsNothing(), sets["test"][:200])
    assert tested["em"] <= 0.05


def test_every_word_of_the_world_is_one_token(tokenizer, sets, corpus):
    texts = [passage.text for passage in corpus]
    texts += [row["question"] for row in sets["test"]]
    in_use = set()
    for text in texts:
        in_use.update(re.findall(r"(?<= )\w+", text))
    for word in in_use:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


@pytest.mark.parametrize("observations", [0.2, 0.0])
def test_the_loss_of_the_warm_start_is_the_plain_one(
    observations, micro, draw, rng, capsys
):
    """Trajectories of any length, each as if it stood alone."""
    phase = PHASE._replace(count=5, observations=observations)
    model = deepcopy(micro[0])
    demos = draw(phase)
    assert len({len(demo.response_ids) for demo in demos}) > 1
    losses = []
    weights = []
    for demo in demos:
        logits = response_logits(model, demo)  # (T, V)
        ids = torch.tensor(demo.response_ids)  # (T,)
        losses.append(
            torch.nn.functional.cross_entropy(logits, ids, reduction="none")  # (T,)
        )
        weights += [1.0 if mask else observations for mask in demo.loss_mask]
    weights = torch.tensor(weights)  # (N,)
    losses = torch.cat(losses)  # (N,)
    plain = ((losses * weights).sum() / weights.sum()).item()
    make.warm_start(model, demos, rng, phase)
    assert f"batch     0 of 1  loss {plain:.3f}" in capsys.readouterr().out
    assert not torch.equal(next(model.parameters()), next(micro[0].parameters()))


def test_the_learning_rate_rises_and_falls(draw, rng, random_model, monkeypatch):
    rates = []

    def step(self):
        rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    make.warm_start(random_model, draw(PHASE), rng, PHASE, batch=3)
    wanted = [1e-3 * min((i + 1) / 3, 1 - 0.9 * i / 20) for i in range(20)]
    assert rates == pytest.approx(wanted)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "flags",
    [
        ["--frobnicate"],
        ["--seed", "many"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
    ],
)
def test_wrong_flags_are_one_line(flags, tmp_path, monkeypatch, capsys):
    run_main(
        monkeypatch, make.main, "make.py", "--out", tmp_path / "made", *flags, status=2
    )
    line_of(capsys)
    assert not (tmp_path / "made").exists()


@pytest.fixture
def check(tmp_path, monkeypatch, sets):
    """Run --check on the first so many test questions."""

    def run(count: int, status: int = 0):
        questions = tmp_path / "few.jsonl"
        write_jsonl(questions, sets["test"][:count])
        flags = ("--check", MICRO / "model", "--questions", questions)
        run_main(monkeypatch, make.main, "make.py", *flags, status=status)

    return run


def test_a_model_is_measured_and_each_row_shows_the_reference_it_is_called_after(
    check, monkeypatch, capsys, sets
):
    """--check, on 24 questions."""
    seen = []
    plain = make.privileged_prompt

    def prompt(tokenizer, question, reference, room):
        seen.append((question, reference.question))
        return plain(tokenizer, question, reference, room)

    def in_order(rows, count):  # so that the first one drawn is the pair's own
        return list(rows)

    monkeypatch.setattr(make, "privileged_prompt", prompt)
    monkeypatch.setattr(random, "sample", in_order)
    check(24)
    measured = json.loads(capsys.readouterr().out)
    size = measured.pop("pairs")
    unused = [measured.pop(name) for name in ("no_correct", "no_contrast", "too_long")]
    assert size + sum(unused) == 24
    for name in (
        "standard",
        "own_reference",
        "anothers_reference",
        "anothers_sharing_no_relation",
    ):
        row = measured.pop(name)
        assert row.keys() == {"em", "em_supported", "searches", "em_by"}
    assert measured.keys() == {
        "greedy",
        "greedy_by",
        "greedy_searches",
        "sampled",
        "sampled_by",
        "searches",
        "nothing_found",
    }
    chains = {row["question"]: {*row["chain"]} for row in sets["test"]}
    assert len(seen) == 3 * size > 0
    own = seen[:size]
    another = seen[size : 2 * size]
    stranger = seen[2 * size :]
    assert all(asked == shown for asked, shown in own)
    assert all(asked != shown for asked, shown in another)
    assert any(chains[asked] & chains[shown] for asked, shown in another)
    assert not any(chains[asked] & chains[shown] for asked, shown in stranger)


def test_too_few_pairs_to_compare_are_one_line(check, capsys):
    check(1, status=2)
    assert "too few" in line_of(capsys)
