"""Shared by the tests: the micro model, a random one of its shape, a corpus of three passages."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# No test may depend on a network, and a wrong name should fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from retriever import BM25, Passage, load_corpus, run_script  # noqa: E402
from rollout import load_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def exit_status(monkeypatch, main, script, *arguments):
    """Do what `python script arguments` does, in this process. Returns the exit status."""
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
    """exit_status from the repository's folder, and what was written to both streams."""
    monkeypatch.chdir(ROOT)
    return exit_status(monkeypatch, main, script, *arguments), *capsys.readouterr()


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
        sizes = dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=512,
        )  # fmt: skip
        if kind == "gpt2":
            sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)
        sizes |= dict(vocab_size=len(tokenizer), initializer_range=0.2)
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
    return BM25([
        Passage("0", "Ada Lovelace", ada),
        Passage("1", "Charles Babbage", "Charles Babbage was born in London."),
        Passage("2", "London", "London lies on the Thames."),
    ])  # fmt: skip


@pytest.fixture
def command():
    """Run a script of the repository; the finished process, with its text."""

    def run(*args, cwd=ROOT):
        how = dict(cwd=cwd, capture_output=True, text=True, timeout=600)
        return subprocess.run([sys.executable, *map(str, args)], **how)

    return run


@pytest.fixture
def refused(command):
    """Run a script that must refuse its input: one line on standard error, exit status 2."""

    def run(*args):
        done = command(*args)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    return run
