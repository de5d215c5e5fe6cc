"""What the lessons share: the micro world, its model, and groups sampled in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eval import rewards_of
from machinery.models import load_model
from machinery.questions import load_questions
from retriever import BM25, open_index
from rollout import Trajectory, rollout

MICRO = Path(__file__).resolve().parent.parent / "micro"


class World(NamedTuple):
    """What a rollout needs: a policy, its tokenizer, and an index to search."""

    model: Any
    tokenizer: Any
    index: BM25


class Group(NamedTuple):
    """A question, the trajectories sampled for it, and the reward of each."""

    question: dict
    trajectories: list[Trajectory]
    rewards: list[float]


def load_world() -> World:
    """The micro model, its tokenizer, and the index of the micro world's passages."""
    model, tokenizer = load_model(str(MICRO / "model"))
    return World(model, tokenizer, open_index(MICRO / "corpus.jsonl"))


def sample_groups(world: World, hops: int, size: int = 5) -> Iterator[Group]:
    """For one training question of so many hops after another: a group, sampled now."""
    for question in load_questions(str(MICRO / "train.jsonl")):
        if question["hops"] != hops:
            continue
        trajectories = rollout(
            world.model,
            world.tokenizer,
            world.index,
            [question["question"]],
            group_size=size,
            seed=0,
        )
        yield Group(question, trajectories, rewards_of([question], trajectories))


def relation_words() -> dict[str, str]:
    """For each relation of the micro world, the word that the corpus has for it.

    >>> relation_words()["mayor"]
    'warded'
    """
    word_of = {}
    for question in load_questions(str(MICRO / "train.jsonl")):
        word_of.update(zip(question["chain"], question["words"], strict=True))
    return word_of


def words_tried(trajectory: Trajectory) -> list[str]:
    """The last word of each query that is more than a name.

    >>> trajectory = Trajectory("?", [])
    >>> trajectory.queries = ["Bevor Bridge mayor warded", "Jivor Turner"]
    >>> words_tried(trajectory)
    ['warded']
    """
    tried = []
    for query in trajectory.queries:
        parts = query.split()
        if len(parts) > 2:
            tried.append(parts[-1])
    return tried


def counted(number: int, noun: str) -> str:
    """A number with its noun, which is put in the plural where there is not one.

    >>> counted(1, "token"), counted(3, "token"), counted(2, "search")
    ('1 token', '3 tokens', '2 searches')
    """
    if number == 1:
        return f"1 {noun}"
    ending = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"
