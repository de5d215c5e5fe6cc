"""Files and terminals as they are found: long lists, damaged bytes, letters that do not show."""

import gzip
import io
import json
import sys

import pytest

import retriever
import train
from eval import load_mixture
from retriever import BadInput, load_corpus, run_script


def test_a_list_of_files_may_be_longer_than_a_path(tmp_path):
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number:02}-{'x' * 200}.jsonl")
        row = {"question": f"Who is number {number}?", "golden_answers": ["me"]}
        paths[-1].write_text(json.dumps(row) + "\n")
    specs = ",".join(map(str, paths))
    assert len(specs) > 4096
    assert [row["question"] for row in load_mixture(specs, [])][19] == "Who is number 19?"


def test_a_name_too_long_for_the_disk_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(BadInput, match=str(path)):
            load_corpus(path)


def test_an_inverted_byte_anywhere_in_a_gz_is_refused_or_does_no_harm(tmp_path):
    rows = [json.dumps({"id": i, "title": "t", "text": f"text {i}"}) for i in range(50)]
    whole, refused = gzip.compress("\n".join(rows).encode(), mtime=0), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path = tmp_path / "c.jsonl.gz"
        path.write_bytes(damaged)
        try:
            assert [p.text for p in load_corpus(path)] == [f"text {i}" for i in range(50)]
        except BadInput as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(whole) / 2


def test_a_message_repeats_a_name_as_it_was_given(tmp_path, monkeypatch, capsys):
    name = f"{tmp_path}/two  spaces.jsonl"
    monkeypatch.setattr(sys, "argv", ["retriever.py", "--corpus", name, "x"])
    with pytest.raises(SystemExit) as done:
        run_script(retriever.main)
    assert done.value.code == 2 and "two  spaces.jsonl" in capsys.readouterr().err


def test_a_seed_beyond_32_bits_is_refused():
    assert train.Config(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(BadInput, match="seed must be int, at least 0 and below 2"):
        train.Config(seed=2**32)


def test_what_a_terminal_cannot_show_is_shown_as_an_escape(monkeypatch):
    written = io.BytesIO()
    narrow = io.TextIOWrapper(written, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    run_script(lambda: print("Ōsaka"))
    assert written.getvalue() == b"\\u014csaka\n"  # and it is there at once, without a flush
