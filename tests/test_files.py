"""Files as they are found: corpora in both forms, long lists, damaged bytes."""

import gzip
import json
import re

import pytest

import train
from machinery.errors import BadInput
from machinery.json_lines import read_jsonl, write_jsonl
from machinery.passages import Passage, load_corpus, to_passage
from machinery.questions import load_training_questions


def test_both_forms_of_corpus_plain_and_gz(tmp_path):
    rows = [
        {"id": 7, "title": "T", "text": "x y"},
        {"id": "8", "contents": '"A title"\nthe\ntext'},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "c.jsonl").write_text(lines)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    expected = [Passage("7", "T", "x y"), Passage("8", "A title", "the\ntext")]
    assert load_corpus(tmp_path / "c.jsonl") == expected
    assert load_corpus(tmp_path / "c.jsonl.gz") == expected
    assert list(read_jsonl(tmp_path / "c.jsonl")) == rows  # as it stands, without form


def test_a_passage_may_carry_a_score():
    row = {"id": 1, "contents": '" A "\nb'}
    assert to_passage(row, 2.5) == Passage("1", " A ", "b", 2.5)
    assert to_passage(row).score == 0.0
    with pytest.raises(ValueError, match="a passage needs"):
        to_passage({"id": 1, "contents": None})


@pytest.mark.parametrize(
    ("row", "title", "text"),
    [
        # The title is the first line of contents.
        ({"title": "Ada", "contents": "Ada\nwrote"}, "Ada", "wrote"),
        ({"title": "Ada", "contents": '"Ada"\nwrote\nit'}, "Ada", "wrote\nit"),
        ({"title": '"Ada"', "contents": ' "Ada" \nwrote'}, "Ada", "wrote"),
        ({"title": "Ada ", "contents": "Ada"}, "Ada", ""),
        # It is not.
        ({"title": "Ada", "contents": "Ada wrote\nit"}, "Ada", "Ada wrote\nit"),
        ({"title": "Ada", "contents": "wrote\nAda"}, "Ada", "wrote\nAda"),
        ({"title": '"Ada"', "contents": "wrote"}, '"Ada"', "wrote"),
        # There is none.
        ({"title": "", "contents": "Ada\nwrote"}, "Ada", "wrote"),
        ({"title": None, "contents": '"Ada"\nwrote'}, "Ada", "wrote"),
        # The same with a text beside: it is not looked at.
        ({"title": "Ada", "contents": "wrote", "text": "x"}, "Ada", "wrote"),
    ],
)
def test_a_title_beside_contents_is_kept_unless_it_is_the_first_line(row, title, text):
    assert to_passage({"id": 0, **row}) == Passage("0", title, text)


def test_a_title_that_is_no_text_is_refused_and_not_lost():
    with pytest.raises(ValueError, match="a passage needs"):
        to_passage({"id": 0, "title": 1984, "contents": "a novel"})


def test_a_byte_order_mark_is_skipped(tmp_path):
    """Some editors write one at the beginning of a file."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "0", "title": "a", "text": "b"}\n', encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert load_corpus(path) == [Passage("0", "a", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"id": "0", "title": "a", "text": "b"}\n{"id": broken\n',
            "c.jsonl:2: Expecting value",
        ),
        (b'["id"]\n', "c.jsonl:1: expected a JSON object"),
        (b'{"id": "0", "title": "a"}\n', "c.jsonl:1: a passage needs"),
        (b'{"title": "a", "text": "b"}\n', "c.jsonl:1: a passage needs"),
        (b'{"id": "0", "title": 1, "text": "b"}\n', "c.jsonl:1: a passage needs"),
        (b"\xff\xfe\n", "c.jsonl:1: 'utf-8' codec can't decode"),
        (b"[" * 10**5, "c.jsonl:1: maximum recursion depth"),
        (b"", "c.jsonl: there is nothing in it"),
        (b"\n", "there is nothing in it"),
    ],
)
def test_a_malformed_corpus_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        load_corpus(path)
    assert str(error.value).startswith(str(path))
    assert error.value.__cause__ is not None


def test_a_corpus_that_cannot_be_read_is_refused(tmp_path):
    whole = gzip.compress(b'{"id": "0", "title": "a", "text": "b"}\n' * 1000)
    path = tmp_path / "c.jsonl.gz"
    wrong = bytes([whole[0], whole[1] ^ 1])
    for content in (
        whole[: len(whole) // 2],
        b"no gzip",
        wrong + whole[2:],
        whole[:-9] + b"x" * 9,
    ):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=f"^{re.escape(str(path))}"):
            load_corpus(path)
    missing = tmp_path / "nowhere"
    with pytest.raises(BadInput, match=re.escape(f"{missing}: [Errno 2] No such file")):
        load_corpus(missing)
    with pytest.raises(BadInput, match=re.escape(f"{tmp_path}: [Errno 21]")):
        load_corpus(tmp_path)


def test_a_bug_in_a_form_keeps_its_traceback(tmp_path):
    """Only a ValueError says that a line has another form."""
    write_jsonl(tmp_path / "c.jsonl", [{"id": 1}])

    def form(row):
        return row.nonsense

    with pytest.raises(AttributeError, match="nonsense"):
        list(read_jsonl(tmp_path / "c.jsonl", form))


def test_what_is_written_is_read_again(tmp_path):
    rows = [{"text": 'é 的 \U0001f600 \u2028 "\\" \n'}, {"half": "\ud83d x \ud800"}, {}]
    path = tmp_path / "c.jsonl"
    write_jsonl(path, iter(rows))
    assert list(read_jsonl(path)) == rows
    content = path.read_bytes()
    assert content.count(b"\n") == 3
    assert "é 的 \U0001f600".encode() in content  # readable, where it can be


def test_a_list_of_files_may_be_longer_than_a_path(tmp_path):
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number:02}-{'x' * 200}.jsonl")
        row = {"question": f"Who is number {number}?", "golden_answers": ["me"]}
        write_jsonl(paths[-1], [row])
    specs = ",".join(str(path) for path in paths)
    assert len(specs) > 4096
    questions = load_training_questions(specs, [], str.lower)
    assert questions[19]["question"] == "Who is number 19?"


def test_a_name_too_long_for_the_disk_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(BadInput, match=str(path)):
            load_corpus(path)


def test_an_inverted_byte_anywhere_in_a_gz_is_refused_or_does_no_harm(tmp_path):
    rows = [json.dumps({"id": i, "title": "t", "text": f"text {i}"}) for i in range(50)]
    whole = gzip.compress("\n".join(rows).encode(), mtime=0)
    expected = [f"text {i}" for i in range(50)]
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path = tmp_path / "c.jsonl.gz"
        path.write_bytes(damaged)
        try:
            assert [passage.text for passage in load_corpus(path)] == expected
        except BadInput as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(whole) / 2


def test_a_seed_beyond_32_bits_is_refused():
    assert train.Config(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(BadInput, match="seed must be int, at least 0 and below 2"):
        train.Config(seed=2**32)
