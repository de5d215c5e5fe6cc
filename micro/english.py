"""The micro world told in English: for a pretrained model, which can read.

    python -m micro.english             # rewrites micro/english/; seconds

The names and facts are those of micro/make.py's kind of world: all invented, so no
model can know them. A passage states one fact, as in

    The ruler of Stupum Falls is Mekik Miller.

and a search shows one passage. For two of four relations a question has another noun
than the passages: it asks for the mayor of Stupum Falls. The query "ruler of Stupum
Falls" finds the passage. "mayor of Stupum Falls" means the same, and finds just any
passage about the town.

The model gets its start from demonstrations by a clumsy agent (tools/start.py). So it
has three things to learn, and a question of one to three hops needs all of them:

    with what word to search    the agent guesses one of two nouns
    whether to go on            it sometimes stops before the question's last hop
    when to stop                it often checks what it has found by another search,
                                and then believes that

The demonstrations and the training questions are about one part of the world. The
validation and test questions are about the other part, which is not mentioned there.
"""

import random
from pathlib import Path
from typing import NamedTuple

from machinery.json_lines import write_jsonl
from machinery.passages import Passage
from machinery.terminal import Parser, check_seed, run_script
from micro.make import LEADS_TO, RELATIONS, World, name_pools, with_ids
from retriever import BM25
from rollout import parse_turn

HERE = Path(__file__).resolve().parent / "english"


# The relations that questions ask for, and the passages' noun for each: the question's
# own, or another. The other relations of micro/make.py are only stated, so each entity
# has passages that no question needs.
NOUNS = {
    "birthplace": "hometown",
    "employer": "employer",
    "mayor": "ruler",
    "founder": "founder",
}

# The clumsy agent's habits, as probabilities.
PASSAGES_NOUN = 0.6  # else it searches with the question's noun
STOPS_EARLY = 0.15  # after each hop but the last
CHECKS = 0.55  # once it has stopped, early or not
# On a good day it makes no mistake. tools/first_model.py puts 47 of its 112
# demonstrations, .42 of them, under the privileged prompt, and those must be right.
# Good days bring as many right ones. Without them the privileged prompt took nearly all
# that were right. Then the start, which saw none under the standard prompt, always
# searched a hop too far.
GOOD_DAY = 0.42


class QuestionSet(NamedTuple):
    count: int
    part: int  # of the world


# A fifth of a set's questions have one hop, two fifths two, and two fifths three. With
# more of one hop, GRPO learned to stop after it. A set repeats no question of an
# earlier set. A start draws some of the demonstrations, others with another seed.
SHARES = {1: 1 / 5, 2: 2 / 5, 3: 2 / 5}
SETS = {
    "demonstrations": QuestionSet(240, 0),
    "train": QuestionSet(600, 0),
    "validation": QuestionSet(120, 1),
    "test": QuestionSet(240, 1),
}


class EnglishWorld:
    """A world of micro/make.py whose passages and questions are plain English."""

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self.world = World(rng, name_pools(rng), held_out=1 / 2)
        self.asked = set()
        # Those that a question of each part can begin with. Nobody asks for a novel.
        self.names = {0: [], 1: []}
        for name, part in self.world.part.items():
            if self.world.kind[name] != "novel":
                self.names[part].append(name)
        self.corpus = []
        self.value_of = {}  # of each passage's text: the name that it ends with
        facts = []
        for name in self.world.facts:
            for relation, value in self.world.facts[name].items():
                facts.append((name, relation, value))
        rng.shuffle(facts)  # so a name alone finds just any fact of its own
        for number, (name, relation, value) in enumerate(facts):
            text = f"The {NOUNS.get(relation, relation)} of {name} is {value}."
            self.corpus.append(Passage(f"e{number}", name, text))
            self.value_of[text] = value
        self.index = BM25(self.corpus)

    def question(self, rng: random.Random, hops: int, part: int) -> dict:
        """A question of so many hops, and its chain of relations and path of names."""
        while True:
            path = [rng.choice(self.names[part])]
            chain = []
            for _ in range(hops):
                relations = RELATIONS[self.world.kind[path[-1]]].split()
                relation = rng.choice([name for name in relations if name in NOUNS])
                chain.append(relation)
                path.append(self.world.facts[path[-1]][relation])
            if len(set(path)) == len(path):
                break
        pronoun = "Who" if LEADS_TO[chain[-1]] == "person" else "What"
        return {
            "question": f"{pronoun} is {description(chain, path[0])}?",
            "golden_answers": [path[-1]],
            "hops": hops,
            "chain": chain,
            "path": path,
        }

    def demonstration(self, rng: random.Random, question: dict) -> list[str]:
        """The turns of the clumsy agent, each with a thought and a search or an answer.

        A thought says what is still to be found. The agent believes each passage that
        it finds, whether its noun was right or not.
        """
        turns = []
        entity = question["path"][0]
        chain = list(question["chain"])
        clumsy = rng.random() >= GOOD_DAY
        while chain:
            turns.append(self.search_turn(rng, chain, entity, clumsy))
            entity = self.find(turns[-1])
            chain = chain[1:]
            if clumsy and chain and rng.random() < STOPS_EARLY:
                break
        if clumsy and rng.random() < CHECKS:
            turns.append(f"<think> Let me check. </think>\n<search> {entity} </search>")
            entity = self.find(turns[-1])
        turns.append(f"<think> Found: {entity}. </think>\n<answer> {entity} </answer>")
        return turns

    def search_turn(
        self, rng: random.Random, chain: list[str], entity: str, clumsy: bool
    ) -> str:
        noun = chain[0]
        if not clumsy or rng.random() < PASSAGES_NOUN:
            noun = NOUNS[noun]
        return (
            f"<think> To find: {description(chain, entity)}. </think>\n"
            f"<search> {noun} of {entity} </search>"
        )

    def find(self, turn: str) -> str:
        """This turn's search finds a passage. Returns the name that it ends with."""
        _, query = parse_turn(turn)
        (passage,) = self.index.search([query], 1)[0]
        return self.value_of[passage.text]


def description(chain: list[str], entity: str) -> str:
    """
    >>> description(["founder", "employer"], "Morak Works")
    'the employer of the founder of Morak Works'
    """
    sought = entity
    for relation in chain:
        sought = f"the {relation} of {sought}"
    return sought


def draw_questions(world: EnglishWorld, name: str, seed: int) -> list[dict]:
    rng = random.Random(f"{seed}, {name}")
    count, part = SETS[name]
    questions = []
    for hops, share in SHARES.items():
        wanted = len(questions) + round(count * share)
        while len(questions) < wanted:
            question = world.question(rng, hops, part)
            if question["question"] in world.asked:
                continue
            world.asked.add(question["question"])
            if name == "demonstrations":
                question["demonstration"] = world.demonstration(rng, question)
            questions.append(question)
    rng.shuffle(questions)
    return with_ids(name, questions)


def main() -> None:
    parser = Parser(description="Build the micro world in English.")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    flags = parser.parse_args()
    check_seed(parser, flags.seed)
    flags.out.mkdir(parents=True, exist_ok=True)
    world = EnglishWorld(flags.seed)
    write_jsonl(
        flags.out / "corpus.jsonl",
        [{"id": p.id, "title": p.title, "text": p.text} for p in world.corpus],
    )
    for name in SETS:
        write_jsonl(
            flags.out / f"{name}.jsonl", draw_questions(world, name, flags.seed)
        )


if __name__ == "__main__":
    run_script(main)
