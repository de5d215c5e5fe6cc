"""A pretrained model, which is there only if SMOLLM2_DIR names its folder."""

import os
from pathlib import Path

import pytest
from conftest import read, run_main, steps_of

from eval import evaluate, load_questions
from machinery.json_lines import write_jsonl
from machinery.models import load_model
from retriever import open_index
from tools import start
from train import Config, train

DATA = Path(__file__).resolve().parent.parent.parent / "shared/data"


@pytest.mark.slow
@pytest.mark.skipif(
    "SMOLLM2_DIR" not in os.environ, reason="SMOLLM2_DIR names no folder"
)
@pytest.mark.skipif(
    not (DATA / "hotpotqa").is_dir(), reason="the real questions are not there"
)
def test_smollm2_is_started_and_then_learns_by_both_losses_from_real_questions(
    tmp_path, monkeypatch
):
    """At first it writes no tag. Shown eight questions five times each it searches and
    answers, some of them rightly, and GRPO and OFSD go on from there."""
    corpus = str(DATA / "hotpotqa/corpus.jsonl.gz")
    base = os.environ["SMOLLM2_DIR"]
    index = open_index(corpus)
    rows = load_questions(str(DATA / "hotpotqa/questions.jsonl.gz"))
    shown = [row for row in rows[:100] if start.demonstrate(index, row)][:8]
    for name, part in (("shown", shown * 5), ("train", shown), ("test", rows[-4:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    model, tokenizer = load_model(base)
    untrained = evaluate(model, tokenizer, index, shown[:2], max_turn_tokens=96)
    assert untrained["answered"] == untrained["searches"] == 0
    out = tmp_path / "started"
    how = (
        "--questions",
        tmp_path / "shown.jsonl",
        "--corpus",
        corpus,
        "--batch",
        2,
        "--count",
        40,
    )
    run_main(monkeypatch, start.main, "start", "--model", base, "--out", out, *how)
    folder = train(
        Config(
            model=str(out),
            questions=str(tmp_path / "train.jsonl"),
            eval_questions=str(tmp_path / "test.jsonl"),
            corpus=corpus,
            out=str(tmp_path / "run"),
            rounds=1,
            grpo_steps=2,
            questions_per_step=4,
            group_size=4,
            grpo_lr=5e-6,
            ofsd_questions=8,
            ofsd_epochs=1,
            ofsd_batch=4,
            ofsd_lr=5e-6,
            force_ofsd=True,
            micro_batch=2,
            max_turn_tokens=96,
            max_observation_tokens=300,
            max_privileged_tokens=1200,
        )
    )
    evals = [row for row in read(folder, "metrics.jsonl") if row["kind"] == "eval"]
    assert [row["stage"] for row in evals] == ["base", "grpo-1", "ofsd-1"]
    assert evals[0]["answered"] > 0.5 and evals[0]["searches"] > 0.5
    first, _ = steps_of(folder, "grpo-1")
    assert first["reward"] > 0 and first["logprob_gap"] < 1e-3
    distilled = steps_of(folder, "ofsd-1")
    assert distilled and all(
        row["loss"] > 0 and row["grad_norm"] > 0 for row in distilled
    )
