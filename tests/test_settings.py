"""machinery/settings.py: values of the wrong kind, and who wins. The command's own
tests are in test_train.py."""

import json
import sys
from dataclasses import replace

import pytest

from machinery.errors import BadInput
from machinery.settings import parse_flags
from train import Config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", True),
        ("rounds", 2.0),
        ("rounds", "2"),
        ("rounds", None),
        ("rounds", -1),
        ("rounds", 2**32),
        ("group_size", 0),
        ("grpo_lr", 0.0),
        ("grpo_lr", float("nan")),
        ("grpo_lr", float("inf")),
        ("grpo_lr", False),
        ("ofsd", 1),
        ("ofsd", "true"),
        ("model", 7),
        ("norm", "mean"),
        ("norm", ["token"]),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_name(name, value):
    with pytest.raises(BadInput, match=f"^{name} must be "):
        Config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds", 0), ("kl_coef", 0), ("kl_coef", 0.0), ("grpo_lr", 1), ("k", 2**32 - 1)],
)
def test_a_limit_itself_is_taken(name, value):
    assert getattr(Config(**{name: value}), name) == value


def flags(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return parse_flags(Config)


def test_a_flag_wins_over_a_file_and_a_file_over_the_defaults(monkeypatch, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"rounds": 5, "k": 7}))
    assert flags(monkeypatch) == (Config(), False)
    assert flags(monkeypatch, "--config", file) == (Config(rounds=5, k=7), False)
    both = flags(monkeypatch, "--config", file, "--rounds", 0)
    assert both == (Config(rounds=0, k=7), False)


def test_a_run_that_goes_on_keeps_its_settings_and_finds_its_folder(
    monkeypatch, tmp_path
):
    """Wherever it has been moved to."""
    settings = {"rounds": 5, "out": "runs/where-it-was"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    expected = replace(Config(rounds=5), out=str(tmp_path))
    assert flags(monkeypatch, "--resume", tmp_path) == (expected, True)
    assert flags(monkeypatch, "--resume", tmp_path, "--rounds", 5) == (expected, True)
    with pytest.raises(BadInput, match="has rounds 5, and is resumed as it is"):
        flags(monkeypatch, "--resume", tmp_path, "--rounds", 4)
