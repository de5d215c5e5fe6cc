"""Fuzzing with hypothesis of what reads foreign text; skipped where hypothesis is not installed."""

import json

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from eval import load_questions  # noqa: E402
from ofsd import privileged_prompt  # noqa: E402
from retriever import BM25, BadInput, Passage, load_corpus, printable, encodable, words  # noqa: E402
from rollout import TAGS, Trajectory, chat_ids, decode, encode, neutralise, observation_ids, parse_turn, standard_prompt  # noqa: E402

LOOSE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
PIECES = [*TAGS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<", ">", "/", "{question}", "{reference}", "{}", "\n", "- ", "\x00", "\u202e", "\x1b[0m"]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join)
SURROGATES = st.text(st.characters(), max_size=20) | st.text(st.characters(categories=["Cs"]), max_size=5)
JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5) | SURROGATES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=8)


@LOOSE
@given(TEXT)
def test_parser(text):
    asked = parse_turn(text)
    if asked:
        kind, content = asked
        assert f"<{kind}>" in text and f"</{kind}>" in text and content in text and f"</{kind}>" not in content
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
    ids = observation_ids(tokenizer, [Passage(str(i), title, text) for i, (title, text) in enumerate(passages)], budget)
    text = decode(tokenizer, ids)
    assert text.startswith("\n<information>\n") and text.endswith("</information>\n") and sum(map(text.count, TAGS)) == 2
    assert len(ids) <= max(budget, 20) and not {*ids} & {*tokenizer.all_special_ids}


@LOOSE
@given(TEXT, TEXT, TEXT, st.integers(0, 300))
def test_privileged_prompts_fit_or_are_none(tokenizer, question, own, passage, room):
    reference = Trajectory(question, [])
    reference.extend(encode(tokenizer, f"{own}<search> x </search>"), [0.0] * len(encode(tokenizer, f"{own}<search> x </search>")))
    reference.extend(observation_ids(tokenizer, [Passage("0", passage, passage)], 60))
    for reads in ("whole", "queries"):
        ids = privileged_prompt(tokenizer, question, reference, room, reads)
        assert ids is None or (len(ids) <= room and decode(tokenizer, ids).count("<|im_start|>") == 2)


@LOOSE
@given(st.lists(JSON | st.fixed_dictionaries({"id": JSON, "title": JSON, "text": JSON, "question": JSON, "golden_answers": JSON}), max_size=4), st.binary(max_size=30))
def test_loaders_load_or_refuse_with_file_and_line(tmp_path, rows, rubbish):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + rubbish)
    for load in (load_questions, load_corpus):
        try:
            loaded = load(str(path))
        except BadInput as error:
            assert str(path) in str(error)
        else:
            assert loaded
            json.dumps([vars(row) if isinstance(row, Passage) else [row["question"], row["golden_answers"]] for row in loaded], ensure_ascii=False).encode()


@LOOSE
@given(SURROGATES)
def test_text_can_be_written_and_printed(text):
    encodable(text).encode()
    assert printable(text).isprintable() or {"\n", "\t"} & {*text} or not text.isascii()
    assert not any(c in printable(text) for c in "\x1b\x07\x00\u202e")


@LOOSE
@given(st.lists(TEXT, min_size=1, max_size=6), TEXT, st.integers(1, 9))
def test_any_query_on_any_corpus(texts, query, k):
    index = BM25([Passage(str(i), "", text) for i, text in enumerate(texts)])
    found = index.search([query], k)[0]
    assert len(found) <= min(k, len(texts)) and all(p.score > 0 and {*words(p.text)} & {*words(query)} for p in found)
