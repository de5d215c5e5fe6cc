"""Fuzzing of what reads foreign text; skipped where hypothesis is not installed."""

import json

import pytest

pytest.importorskip("hypothesis")

from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from machinery.errors import BadInput
from machinery.passages import Passage, load_corpus
from machinery.questions import load_questions
from machinery.terminal import printable
from machinery.text import TAGS, chat_ids, decode, encode, neutralise
from ofsd import privileged_prompt
from retriever import BM25, bm25_score, words
from rollout import Trajectory, observation_ids, parse_turn, spans, standard_prompt

LOOSE = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=300,
)
PIECES = [
    *TAGS,
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<",
    ">",
    "/",
    "{question}",
    "{reference}",
    "{}",
    "\n",
    "- ",
    "\x00",
    "\u202e",
    "\x1b[0m",
    "İ",
    "\ud800",
    "\udfff",
]
TEXT = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12
).map("".join)
CHARACTERS = st.characters()
HALVES = st.characters(categories=["Cs"])
SURROGATES = st.text(CHARACTERS, max_size=20) | st.text(HALVES, max_size=5)
LEAF = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | SURROGATES


def nested(values):
    lists = st.lists(values, max_size=3)
    return lists | st.dictionaries(st.text(max_size=5), values, max_size=3)


JSON = st.recursive(LEAF, nested, max_leaves=8)
FIELDS = ("id", "title", "text", "contents", "question", "golden_answers")
ROWS = st.lists(
    JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON)), max_size=4
)
GOOD_ROWS = st.fixed_dictionaries(
    {
        "id": JSON,
        "title": SURROGATES,
        "text": SURROGATES,
        "question": SURROGATES,
        "golden_answers": st.lists(SURROGATES, max_size=2),
    }
)
FILES = ROWS | st.lists(GOOD_ROWS, min_size=1, max_size=3)


@LOOSE
@given(TEXT)
def test_parser(text):
    asked = parse_turn(text)
    if asked:
        kind, content = asked
        assert f"<{kind}>" in text and f"</{kind}>" in text
        assert content in text and f"</{kind}>" not in content
        # What comes after the first decision changes nothing: sampling may stop there.
        assert parse_turn(text + "<answer>late</answer>") == asked
    else:
        assert all(parse_turn(text[:end]) is None for end in range(len(text)))


@LOOSE
@given(TEXT)
def test_prompts_have_one_turn_and_keep_the_question(tokenizer, question):
    text = decode(tokenizer, chat_ids(tokenizer, standard_prompt(tokenizer, question)))
    assert text.count("<|im_start|>") == 2 and text.endswith("<|im_start|>assistant\n")
    harmless = neutralise(question, tokenizer).lower()
    assert not any(tag in harmless for tag in TAGS)


@LOOSE
@given(st.lists(st.tuples(TEXT, TEXT), max_size=4), st.integers(20, 200))
def test_observations(tokenizer, texts, budget):
    passages = [Passage("0", title, text) for title, text in texts]
    ids = observation_ids(tokenizer, passages, budget)
    text = decode(tokenizer, ids)
    assert text.startswith("\n<information>\n") and text.endswith("</information>\n")
    assert sum(map(text.count, TAGS)) == 2
    assert len(ids) <= max(budget, 20) and not {*ids} & {*tokenizer.all_special_ids}


def with_normalizer(normalizer):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "micro/model")
    tokenizer._tokenizer.normalizer = normalizer
    return tokenizer


def wide(text):
    """The same text in full-width characters."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


WIDE_TEXT = st.lists(TEXT | TEXT.map(wide), max_size=4).map("".join)
UNACCENTED = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
LOWER_CASE = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
READERS = {
    "none": with_normalizer(None),
    "nfkc": with_normalizer(normalizers.NFKC()),
    "unaccented": with_normalizer(UNACCENTED),
    "lower case": with_normalizer(LOWER_CASE),
    "bert": with_normalizer(normalizers.BertNormalizer()),
}


@pytest.mark.parametrize("name", READERS)
@LOOSE
@given(WIDE_TEXT)
def test_whatever_a_tokenizer_makes_of_text_it_makes_no_markup(name, text):
    reader = READERS[name]
    ids = encode(reader, neutralise(text, reader))
    assert not {*ids} & {*reader.added_tokens_decoder}
    assert not any(tag in decode(reader, ids).lower() for tag in TAGS)


@LOOSE
@given(TEXT, TEXT, TEXT, st.integers(0, 300))
def test_privileged_prompts_fit_or_are_none(tokenizer, question, own, passage, room):
    reference = Trajectory(question, [])
    shown = [Passage("0", passage, passage)]
    ids = encode(tokenizer, f"{own}<search> x </search>")
    reference.extend(ids, [0.0] * len(ids))
    reference.extend(observation_ids(tokenizer, shown, 60))
    reference.passages.append(shown)
    sampled, ids = next(spans(reference))
    assert sampled
    own_text = neutralise(decode(tokenizer, ids), tokenizer, tags=()).strip()
    whole = privileged_prompt(tokenizer, question, reference, 10**6)
    ids = privileged_prompt(tokenizer, question, reference, room)
    for prompt in (whole, ids):
        if prompt is not None:
            text = decode(tokenizer, prompt)
            assert text.count("<|im_start|>") == 2 and own_text in text
    assert whole and (ids is None or len(ids) <= room)
    assert ids == whole or len(whole) > room  # what fits is not cut


@LOOSE
@given(FILES, st.just(b"") | st.binary(max_size=30))
def test_questions_are_loaded_or_refused_with_their_file(
    tokenizer, tmp_path, rows, rubbish
):
    path = write(tmp_path, rows, rubbish)
    try:
        questions = load_questions(path)
    except BadInput as error:
        assert path in str(error)
        return
    # What was loaded can be asked and saved.
    assert questions
    for question in questions:
        prompt = standard_prompt(tokenizer, question["question"])
        decode(tokenizer, chat_ids(tokenizer, prompt)).encode()
        answers = question["golden_answers"]
        assert answers and isinstance(question["id"], str)
        assert json.loads(json.dumps(answers)) == answers


@LOOSE
@given(FILES, st.just(b"") | st.binary(max_size=30))
def test_a_corpus_is_loaded_or_refused_with_its_file(
    tokenizer, tmp_path, rows, rubbish
):
    path = write(tmp_path, rows, rubbish)
    try:
        corpus = load_corpus(path)
    except BadInput as error:
        assert path in str(error)
        return
    # What was loaded can be searched and read.
    assert corpus
    assert BM25(corpus).size == len(corpus)
    decode(tokenizer, observation_ids(tokenizer, corpus, 200)).encode()


def write(folder, rows, rubbish):
    """The path of a file of JSON lines, with rubbish at its end."""
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    path = folder / "file.jsonl"
    path.write_bytes(b"".join(lines) + rubbish)
    return str(path)


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
    """No word is empty or has a space in it, and each stays itself.

    A saved index relies on it.
    """
    parts = words(text)
    assert " ".join(parts).split() == parts and all(parts)
    assert words(text.replace("_", " ").upper() + " x")[-1:] == ["x"]
    assert all(word == word.lower() for word in parts)


@LOOSE
@given(st.lists(TEXT, min_size=1, max_size=6), TEXT, st.integers(1, 9))
def test_any_query_on_any_corpus(texts, query, k):
    index = BM25([Passage(str(i), "", text) for i, text in enumerate(texts)])
    passages = index.search([query], k)[0]
    assert len(passages) <= min(k, len(texts))
    for passage in passages:
        assert passage.score > 0 and {*words(passage.text)} & {*words(query)}
    expected = [bm25_score(query, text, texts) for text in texts]
    assert index.scores(query) == pytest.approx(expected, rel=1e-5)
