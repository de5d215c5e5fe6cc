"""micro/: what its data and its model promise. The files are those that are committed."""

import json
import random
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import make
import pytest
import torch
from conftest import line_of, run_main

from eval import evaluate, load_questions
from grpo import response_logits
from retriever import load_corpus, words
from rollout import decode, parse_turn

MICRO = Path(make.__file__).parent
KINDS = {relation: kind for kind, text in make.RELATIONS.items() for relation in text.split()}
PHASE = make.Phase(60, privileged=1.0, own=1.0, short=False, observations=0.2, lr=1e-3, last=0.1)


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


def links(rows):
    """(name, relation, the corpus's word for it, the name it leads to) for each hop."""
    for row in rows:
        yield from zip(row["path"], row["chain"], row["words"], row["path"][1:])


def queries_of(text: str) -> dict[str, str]:
    """The word that was searched with for each relation in the text of a trajectory."""
    queries = [query.split() for query in re.findall(r"<search> ([^<]*)</search>", text)]
    return {query[2]: query[3] for query in queries if len(query) == 4}  # two are of the name


def habit(number: int) -> dict:
    """Odds of an agent that always takes the word of this number."""
    return {relation: {make.WORDS[kind].split()[number]: 1} for relation, kind in KINDS.items()}


# ---------------------------------------------------------------- the data


def test_the_committed_data_is_what_the_script_makes(tmp_path, monkeypatch):
    run_main(monkeypatch, make.main, "make.py", "--data-only", "--out", tmp_path)
    names = sorted(path.name for path in MICRO.glob("*.jsonl"))
    assert sorted(path.name for path in tmp_path.glob("*")) == names and len(names) == 7
    for name in names:
        assert (tmp_path / name).read_text() == (MICRO / name).read_text()


def test_the_data_is_json_lines_of_the_documented_form():
    for name in make.SETS:
        for line in (MICRO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert {"id", "question", "golden_answers", "hops"} <= json.loads(line).keys()


def test_hops_stand_in_equal_shares_and_half_of_the_test_questions_are_held_out(sets, corpus):
    assert len(corpus) == 5 * sum(make.COUNTS.values())
    for name, (count, _) in make.SETS.items():
        kinds = Counter((row["hops"], row["held_out"]) for row in sets[name])
        parts = (False, True) if "test" in name else (False,)
        share = count // len(parts) // 3
        assert kinds == {(hops, part): share for hops in (1, 2, 3) for part in parts}
        assert all(len(row["chain"]) == row["hops"] for row in sets[name])


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
    for row in (row for questions in sets.values() for row in questions):
        assert row["path"][0] in row["question"] and row["path"][-1] == row["golden_answers"][0]
        assert len({*row["path"]}) == row["hops"] + 1
        assert row["golden_answers"][0] not in row["question"]
        for name, _, word, value in links([row]):
            assert (name, f"{name} is {word} by {value}.") in stated


# ---------------------------------------------------------------- two vocabularies


def test_each_relation_of_a_kind_has_a_word_of_its_own_in_all_sets(sets):
    used = {(relation, word) for rows in sets.values() for _, relation, word, _ in links(rows)}
    assert len(used) == len(dict(used)) == 20  # one each, and all are asked about
    for relation, word in used:
        assert word in make.WORDS[KINDS[relation]].split()
    assert len({word for _, word in used}) == 20


def test_no_passage_has_the_questions_word_for_a_relation(corpus):
    told = {word for passage in corpus for word in words(f"{passage.title} {passage.text}")}
    asked = {word for pair in make.CLAUSES.items() for word in words(" ".join(pair))}
    assert asked & told == {"by"}  # which stands in every passage, so no query gains by it


def test_only_the_corpuss_word_finds_the_passage_reliably(micro_index, sets):
    """A name has five passages. Without the word chance decides which of them come: one in five is
    first, and three in five are among three. Four standard deviations of 2,160 are .04."""
    hops = list(links(sets["train"]))

    def share(query, k: int) -> float:
        found = micro_index.search([query(*hop[:3]) for hop in hops], k)
        right = [f"{name} is {word} by {value}." for name, _, word, value in hops]
        return sum(text in (p.text for p in ps) for text, ps in zip(right, found)) / len(hops)

    assert len(hops) == 2160
    for query in (
        lambda name, relation, _: f"{name} {relation}",
        lambda name, relation, _: make.CLAUSES[relation].format(name),
    ):
        assert abs(share(query, 1) - 1 / 5) < 0.04 and abs(share(query, 3) - 3 / 5) < 0.04
    assert share(lambda name, _, word: f"{name} {word}", 1) == 1
    assert share(lambda name, relation, word: f"{name} {relation} {word}", 1) == 1
    assert share(lambda name, _, word: f"{name.split()[0]} {word}", 1) < 0.3  # finds strangers


def test_the_words_are_dealt_anew_in_each_world(pools, rng):
    """In 20 worlds a relation misses one of its five words with the probability .8 ** 20 = .01."""
    dealt = [make.World(rng, pools).words for _ in range(20)]
    for kind, text in make.RELATIONS.items():
        for one in dealt:
            assert sorted(map(one.get, text.split())) == sorted(make.WORDS[kind].split())
        assert all(len({one[relation] for one in dealt}) >= 4 for relation in text.split())


# ---------------------------------------------------------------- the agent


def test_the_agents_habits_are_right_in_part(world, rng):
    odds = make.habitual_words(rng, world.words)
    for kind, text in make.RELATIONS.items():
        right = [odds[relation][world.words[relation]] for relation in text.split()]
        assert sorted(right) == pytest.approx([0.36] * 2 + [0.76] * 3)
        for relation in text.split():
            assert [*odds[relation]] == make.WORDS[kind].split()
            assert sum(odds[relation].values()) == pytest.approx(1)


def test_the_agent_is_clumsy_and_with_the_right_words_its_straight_road_is_right(world, rng):
    """A hop goes wrong on the straight road where it slips (.05), and its habit is wrong (.4)."""
    odds, right, straight = make.habitual_words(rng, world.words), Counter(), 0
    questions = [world.question(rng, hops) for hops in (1, 2, 3) for _ in range(200)]
    for question in questions:
        for clumsy in (True, False):
            shown = {} if clumsy else dict(zip(question["chain"], question["words"]))
            play = make.demonstrate(rng, world, question, odds, clumsy=clumsy, shown=shown)
            right[clumsy] += f"<answer> {question['golden_answers'][0]}</answer>" in play[-1]
            searches = sum(isinstance(step, list) for step in play)
            assert searches <= make.MAX_SEARCHES and len(play) == 2 * searches + 1
            straight += not clumsy and searches == question["hops"]
    assert straight == len(questions) and right[False] > 0.93 * len(questions)
    assert 0.25 * len(questions) < right[True] < 0.5 * len(questions)


def test_a_word_that_is_shown_is_used_for_its_relation_only(world, rng, monkeypatch):
    monkeypatch.setattr(make, "SLIP", 0.0)
    one, other, shared = habit(0), habit(1), 0
    for _ in range(200):
        question = world.question(rng, 3)
        shown = {r: next(iter(other[r])) for r in world.question(rng, 3)["chain"]}
        play = make.demonstrate(rng, world, question, one, clumsy=True, shown=shown)
        for relation, word in queries_of("".join(play[::2])).items():
            assert word == next(iter((other if relation in shown else one)[relation]))
            shared += relation in shown
    assert shared > 20


def test_the_agent_believes_the_first_passage_of_a_search(world, rng):
    for _ in range(100):
        play = make.demonstrate(rng, world, world.question(rng, 1), habit(2), clumsy=True)
        assert f"<answer> {play[1][0].text.split(' by ')[1][:-1]}</answer>" in play[-1]


def test_it_searches_again_word_for_word(world, rng):
    again = 0
    for _ in range(200):
        play = make.demonstrate(rng, world, world.question(rng, 2), habit(0), clumsy=True)
        queries = [parse_turn(text)[1] for text in play[:-1:2]]
        for before, query, text in zip(queries, queries[1:], play[2::2]):
            if "search again" in text:
                assert before == query
                again += 1
    assert again > 50


# ---------------------------------------------------------------- its demonstrations


def asked_about(question: str) -> str:
    """The entity that a question starts from."""
    return re.findall(r"[A-Z]\w+ [A-Z]\w+", question)[-1]


def shown_and_said(tokenizer, made) -> tuple[str, str]:
    """The reference in a demonstration's prompt, and the response."""
    prompt = decode(tokenizer, made.prompt_ids)
    shown = re.search(r"as follows:\n\n(.*)\n\nNow answer", prompt, re.S)
    return shown[1] if shown else "", decode(tokenizer, made.response_ids)


def test_under_its_own_reference_the_agent_takes_the_straight_road(tokenizer, pools, rng):
    """Of 60 demonstrations at most ten are spoiled by a slip, which spoils one hop in twenty."""
    right = 0
    for made in make.demonstrations(rng, tokenizer, pools, frozenset(), habit(0), PHASE):
        shown, said = shown_and_said(tokenizer, made)
        assert "search again" not in said and "Let me check" not in said
        right += parse_turn(shown.split("</search>")[-1]) == parse_turn(said.split("</search>")[-1])
    assert right >= 50


def test_under_anothers_reference_it_is_clumsy_and_finds_words_for_shared_relations(
    tokenizer, pools, rng
):
    phase, same, total, clumsy = PHASE._replace(count=200, own=0.0), 0, 0, 0
    all_made = list(make.demonstrations(rng, tokenizer, pools, frozenset(), habit(0), phase))
    for before, made in zip(all_made, all_made[1:]):
        shown, said = shown_and_said(tokenizer, made)
        reference = queries_of(shown)
        assert reference and f"about {asked_about(before.question)}." in shown
        for relation, word in queries_of(said).items():
            if relation in reference:
                same, total = same + (word == reference[relation]), total + 1
            else:
                assert word == next(iter(habit(0)[relation]))
        clumsy += "search again" in said
    assert total > 15 and same >= 0.8 * total and clumsy > 40


def test_a_reference_is_right_and_may_be_shown_in_short(tokenizer, pools, rng):
    for short in (True, False):
        phase = PHASE._replace(count=30, short=short)
        for made in make.demonstrations(rng, tokenizer, pools, frozenset(), habit(0), phase):
            shown, _ = shown_and_said(tokenizer, made)
            assert ("<think>" in shown) == ("<information>" in shown) == (not short)
            assert queries_of(shown) and shown.count("<answer>") == 1


def test_the_shares_of_the_prompts_are_those_of_the_phase(tokenizer, pools, rng):
    """Four standard deviations of a share of 400 are at most .1."""
    phase, made = PHASE._replace(count=400, privileged=0.6, own=0.7), []
    for one in make.demonstrations(rng, tokenizer, pools, frozenset(), habit(0), phase):
        shown, _ = shown_and_said(tokenizer, one)
        made.append((bool(shown), f"about {asked_about(one.question)}." in shown))
    privileged, own = (sum(column) for column in zip(*made))
    assert abs(privileged / 400 - 0.6) < 0.1 and abs(own / privileged - 0.7) < 0.12


def test_the_demonstrations_mention_no_held_out_entity(tokenizer, pools, rng):
    rows = load_questions(str(MICRO / "test.jsonl"))
    held = frozenset(name for row in rows if row["held_out"] for name in row["path"])
    found = {True: set(), False: set()}
    for avoided in (True, False):
        avoid, phase = (held if avoided else frozenset()), PHASE._replace(count=100)
        for made in make.demonstrations(rng, tokenizer, pools, avoid, habit(0), phase):
            found[avoided] |= {passage.title for some in made.passages for passage in some}
    assert not found[True] & held and found[False] & held


# ---------------------------------------------------------------- the model


def test_the_model_is_small_and_knows_no_fact(micro, sets):
    """With a retriever that finds nothing it must be at a loss: the facts are invented."""
    model, tokenizer = micro
    assert model.num_parameters() < 2_000_000
    assert (MICRO / "model/model.safetensors").stat().st_size < 8_000_000
    nothing = SimpleNamespace(search=lambda queries, k: [[] for _ in queries])
    assert evaluate(model, tokenizer, nothing, sets["test"][:200])["em"] <= 0.05


def test_every_word_of_the_world_is_one_token(tokenizer, sets, corpus):
    texts = [passage.text for passage in corpus] + [row["question"] for row in sets["test"]]
    for text in {word for text in texts for word in re.findall(r"(?<= )\w+", text)}:
        assert len(tokenizer(f" {text}")["input_ids"]) == 1, text


@pytest.mark.parametrize("observations", [0.2, 0.0])
def test_the_loss_of_the_warm_start_is_the_plain_one(
    observations, tokenizer, micro, pools, rng, capsys
):
    """Rows of any length, each as if it stood alone."""
    phase, model = PHASE._replace(count=5, observations=observations), deepcopy(micro[0])
    demos = list(make.demonstrations(rng, tokenizer, pools, frozenset(), habit(0), phase))
    assert len({len(demo.response_ids) for demo in demos}) > 1
    losses, weights = [], []
    for demo in demos:
        logits = response_logits(model, demo)  # (T, V)
        losses.append(torch.nn.functional.cross_entropy(
            logits, torch.tensor(demo.response_ids), reduction="none"))  # fmt: skip
        weights += [1.0 if mask else observations for mask in demo.loss_mask]
    weights, losses = torch.tensor(weights), torch.cat(losses)  # (N,), (N,)
    plain = ((losses * weights).sum() / weights.sum()).item()
    make.warm_start(model, demos, rng, phase)
    assert f"batch     0 of 1  loss {plain:.3f}" in capsys.readouterr().out
    assert not torch.equal(next(model.parameters()), next(micro[0].parameters()))


def test_the_learning_rate_rises_and_falls(tokenizer, pools, rng, random_model, monkeypatch):
    demos, rates = make.demonstrations(rng, tokenizer, pools, frozenset(), habit(0), PHASE), []
    step = lambda self: rates.append(self.param_groups[0]["lr"])  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    make.warm_start(random_model, demos, rng, PHASE, batch=3)
    wanted = [1e-3 * min((i + 1) / 3, 1 - 0.9 * i / 20) for i in range(20)]
    assert rates == pytest.approx(wanted)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "flags",
    [
        ["--frobnicate"],
        ["--seed", "many"],
    ],
)
def test_wrong_flags_are_one_line(flags, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, make.main, "make.py", "--out", tmp_path / "made", *flags, status=2)
    line_of(capsys)
    assert not (tmp_path / "made").exists()


@pytest.fixture
def check(tmp_path, monkeypatch, sets):
    """Run --check on the first so many test questions."""

    def run(count: int, status: int = 0):
        make.write_jsonl(tmp_path / "few.jsonl", sets["test"][:count])
        how = "--check", MICRO / "model", "--questions", tmp_path / "few.jsonl"
        run_main(monkeypatch, make.main, "make.py", *how, status=status)

    return run


def test_a_model_is_measured_and_each_row_shows_the_reference_it_is_called_after(
    check, monkeypatch, capsys, sets
):
    """--check, on 24 questions."""
    seen, plain = [], make.privileged_prompt

    def prompt(tokenizer, question, reference, room):
        seen.append((question, reference.question))
        return plain(tokenizer, question, reference, room)

    monkeypatch.setattr(make, "privileged_prompt", prompt)
    monkeypatch.setattr(random, "sample", lambda rows, k: [*rows])  # a first that is its own
    check(24)
    told = json.loads(capsys.readouterr().out)
    size, *others = [told.pop(name) for name in ("pairs", "no_correct", "no_contrast", "too_long")]
    assert size + sum(others) == 24
    rows = "standard", "own_reference", "anothers_reference", "anothers_sharing_no_relation"
    for row in (told.pop(name) for name in rows):
        assert row.keys() == {"em", "em_supported", "searches", "em_by"}
    assert told.keys() == {
        "greedy", "greedy_by", "greedy_searches", "sampled", "sampled_by", "searches",
        "nothing_found",
    }  # fmt: skip
    chains = {row["question"]: {*row["chain"]} for row in sets["test"]}
    assert len(seen) == 3 * size > 0
    own, another, stranger = seen[:size], seen[size : 2 * size], seen[2 * size :]
    assert all(asked == shown for asked, shown in own)
    assert all(asked != shown for asked, shown in another)
    assert any(chains[asked] & chains[shown] for asked, shown in another)
    assert not any(chains[asked] & chains[shown] for asked, shown in stranger)


def test_too_few_pairs_to_compare_are_one_line(check, capsys):
    check(1, status=2)
    assert "too few" in line_of(capsys)
