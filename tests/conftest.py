"""Shared by all tests: how a script is run within this process, a short run, the micro
model, a random one of its shape, a corpus of three passages."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

# No test may depend on a network, and a wrong name should fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from machinery.models import load_model
from machinery.passages import Passage, load_corpus
from machinery.terminal import run_script
from retriever import BM25
from train import Config, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = Config(  # the settings of a run of seconds, with both stages
    rounds=1,
    grpo_steps=2,
    questions_per_step=4,
    group_size=3,
    ofsd_questions=12,
    ofsd_epochs=1,
    ofsd_batch=4,
    eval_limit=6,
    grpo_lr=1e-4,
    force_ofsd=True,
)


def exit_status(monkeypatch, main, script, *arguments):
    """Do what `python script arguments` does, in this process. Returns the status."""
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            run_script(main)
        except SystemExit as end:
            return end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    return 0


def run_here(monkeypatch, capsys, main, script, *arguments):
    """exit_status from the repository's folder, and what both streams got."""
    monkeypatch.chdir(ROOT)
    return exit_status(monkeypatch, main, script, *arguments), *capsys.readouterr()


def run_main(monkeypatch, main, script, *arguments, status=0):
    """What `python script arguments` does, in this process, ending with this status."""
    assert exit_status(monkeypatch, main, script, *arguments) == status


def line_of(capsys):
    """The one line on standard error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def read(folder, name):
    """The rows of one of a run's files of JSON lines."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def untimed(rows):
    """Metrics without the seconds, which are never the same twice."""
    return [{key: row[key] for key in row if not key.endswith("_s")} for row in rows]


def steps_of(folder, stage):
    rows = read(folder, "metrics.jsonl")
    return [row for row in rows if row["kind"] == "step" and row["stage"] == stage]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a run with the settings SMALL. It is shared: change nothing."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert train(replace(SMALL, out=str(folder))) == folder
    return folder


@pytest.fixture(scope="session")
def micro():
    """(model, tokenizer) of micro/model. Do not train it: it is shared."""
    return load_model(str(ROOT / "micro/model"))


@pytest.fixture(scope="session")
def tokenizer(micro):
    return micro[1]


@pytest.fixture
def random_model():
    """A fresh model of micro/model's shape with random weights: it babbles."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "micro/model")
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def small_model(tokenizer):
    """small_model(kind, **config): a model of another family with random weights."""

    def make(kind, **more):
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 512,
        }
        if kind == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
        sizes |= {"vocab_size": len(tokenizer), "initializer_range": 0.2}
        config = AutoConfig.for_model(kind, **sizes, **more)
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def micro_index():
    return BM25(load_corpus(ROOT / "micro/corpus.jsonl"))


@pytest.fixture
def three():
    """An index of three passages."""
    ada = "Ada Lovelace wrote about the Analytical Engine of Charles Babbage."
    return BM25(
        [
            Passage("0", "Ada Lovelace", ada),
            Passage("1", "Charles Babbage", "Charles Babbage was born in London."),
            Passage("2", "London", "London lies on the Thames."),
        ]
    )


@pytest.fixture
def command():
    """Run a script as a process of its own, which takes seconds only to start: for what
    a call of its main() cannot show. Returns the finished process, with its text."""

    def run(*args, cwd=ROOT):
        how = {"cwd": cwd, "capture_output": True, "text": True, "timeout": 600}
        return subprocess.run([sys.executable, *map(str, args)], **how)

    return run
