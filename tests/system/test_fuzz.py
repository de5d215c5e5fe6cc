"""Fuzzing with hypothesis of what reads foreign text; skipped where hypothesis is not installed."""

import json

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from eval import load_questions  # noqa: E402
from ofsd import privileged_prompt, spans  # noqa: E402
from retriever import (  # noqa: E402
    BM25, BadInput, Passage, bm25_score, load_corpus, printable, words,
)  # fmt: skip
from rollout import (  # noqa: E402
    TAGS, Trajectory, chat_ids, decode, encode, neutralise, observation_ids, parse_turn,
    standard_prompt,
)  # fmt: skip

FIXTURE = HealthCheck.function_scoped_fixture
LOOSE = settings(deadline=None, suppress_health_check=[FIXTURE], max_examples=300)
PIECES = [
    *TAGS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<", ">", "/", "{question}",
    "{reference}", "{}", "\n", "- ", "\x00", "\u202e", "\x1b[0m", "İ", "\ud800", "\udfff",
]  # fmt: skip
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join)
CHARACTERS, HALVES = st.characters(), st.characters(categories=["Cs"])
SURROGATES = st.text(CHARACTERS, max_size=20) | st.text(HALVES, max_size=5)
LEAF = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | SURROGATES
JSON = st.recursive(
    LEAF,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)
FIELDS = "id", "title", "text", "contents", "question", "golden_answers"
ROWS = st.lists(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON)), max_size=4)
GOOD_ROWS = st.fixed_dictionaries(
    {
        "id": JSON, "title": SURROGATES, "text": SURROGATES, "question": SURROGATES,
        "golden_answers": st.lists(SURROGATES, max_size=2),
    }
)  # fmt: skip


@LOOSE
@given(TEXT)
def test_parser(text):
    asked = parse_turn(text)
    if asked:
        kind, content = asked
        assert f"<{kind}>" in text and f"</{kind}>" in text
        assert content in text and f"</{kind}>" not in content
    # What comes after the first decision changes nothing: sampling may stop there.
    if asked:
        assert parse_turn(text + "<answer>late</answer>") == asked
    else:
        assert all(parse_turn(text[:end]) is None for end in range(len(text)))


@LOOSE
@given(TEXT)
def test_prompts_have_one_turn_and_keep_the_question(tokenizer, question):
    text = decode(tokenizer, chat_ids(tokenizer, standard_prompt(tokenizer, question)))
    assert text.count("<|im_start|>") == 2 and text.endswith("<|im_start|>assistant\n")
    assert not any(tag.lower() in neutralise(question, tokenizer).lower() for tag in TAGS)


@LOOSE
@given(st.lists(st.tuples(TEXT, TEXT), max_size=4), st.integers(20, 200))
def test_observations(tokenizer, passages, budget):
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(passages)]
    ids = observation_ids(tokenizer, passages, budget)
    text = decode(tokenizer, ids)
    assert text.startswith("\n<information>\n") and text.endswith("</information>\n")
    assert sum(map(text.count, TAGS)) == 2
    assert len(ids) <= max(budget, 20) and not {*ids} & {*tokenizer.all_special_ids}


@LOOSE
@given(TEXT, TEXT, TEXT, st.integers(0, 300))
def test_privileged_prompts_fit_or_are_none(tokenizer, question, own, passage, room):
    reference, shown = Trajectory(question, []), [Passage("0", passage, passage)]
    ids = encode(tokenizer, f"{own}<search> x </search>")
    reference.extend(ids, [0.0] * len(ids))
    reference.extend(observation_ids(tokenizer, shown, 60))
    reference.passages.append(shown)
    own_words = [decode(tokenizer, ids) for sampled, ids in spans(reference) if sampled][0]
    own_words = neutralise(own_words, tokenizer, tags=[]).strip()
    whole = privileged_prompt(tokenizer, question, reference, 10**6)
    ids = privileged_prompt(tokenizer, question, reference, room)
    for prompt in (whole, ids):
        if prompt is not None:
            text = decode(tokenizer, prompt)
            assert text.count("<|im_start|>") == 2 and own_words in text
    assert whole and (ids is None or len(ids) <= room)
    assert ids == whole or len(whole) > room  # what fits is not cut


@LOOSE
@given(ROWS | st.lists(GOOD_ROWS, min_size=1, max_size=3), st.just(b"") | st.binary(max_size=30))
def test_loaders_load_or_refuse_with_file_and_line(tokenizer, tmp_path, rows, rubbish):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + rubbish)
    for load in (load_questions, load_corpus):
        try:
            loaded = load(str(path))
        except BadInput as error:
            assert str(path) in str(error)
            continue
        assert loaded
        # What was loaded can be searched, asked and saved.
        if load is load_corpus:
            assert BM25(loaded).size == len(loaded)
            decode(tokenizer, observation_ids(tokenizer, loaded, 200)).encode()
        for row in loaded if load is load_questions else ():
            prompt = chat_ids(tokenizer, standard_prompt(tokenizer, row["question"]))
            decode(tokenizer, prompt).encode()
            assert row["golden_answers"] and isinstance(row["id"], str)
            assert json.loads(json.dumps(row["golden_answers"])) == row["golden_answers"]


@LOOSE
@given(SURROGATES)
def test_text_can_be_encoded_and_printed(tokenizer, text):
    decode(tokenizer, encode(tokenizer, text)).encode()
    shown = printable(text)
    shown.encode()
    assert shown.isprintable() or {"\n", "\t"} & {*text} or not text.isascii()
    assert not any(c in shown for c in "\x1b\x07\x00\u202e")


@LOOSE
@given(st.text(max_size=20) | TEXT)
def test_words_hold_letters_and_are_whole(text):
    """No word is empty or has a space in it (a saved index relies on it), and each stays itself."""
    found = words(text)
    assert " ".join(found).split() == found and all(found)
    assert words(text.replace("_", " ").upper() + " x")[-1:] == ["x"]
    assert all(word == word.lower() for word in found)


@LOOSE
@given(st.lists(TEXT, min_size=1, max_size=6), TEXT, st.integers(1, 9))
def test_any_query_on_any_corpus(texts, query, k):
    index = BM25([Passage(str(i), "", text) for i, text in enumerate(texts)])
    found = index.search([query], k)[0]
    assert len(found) <= min(k, len(texts))
    assert all(p.score > 0 and {*words(p.text)} & {*words(query)} for p in found)
    expected = [bm25_score(query, text, texts) for text in texts]
    assert index.scores(query) == pytest.approx(expected, rel=1e-5)
