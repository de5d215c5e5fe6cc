"""The micro world: invented facts, questions about them, and a small model that can
barely search.

    python -m micro.make                # rewrites micro/; half an hour on one core
    python -m micro.make --data-only    # corpus and questions only; seconds
    python -m micro.make --check micro/model    # measures a model; minutes

The world. Persons, towns, companies and novels, each with five passages. A passage
states one fact, in the corpus's own word for the relation, never the question's: who
asks for the mayor of Stupum Falls has to read
"Stupum Falls is warded by Mekik Miller." A search shows three passages. The query
"Stupum Falls mayor" finds any three of the five; with "warded" the right one comes
first. So there is a word to learn for each relation, and a chain of one to three
relations to follow. The entities fall in two parts without a relation between them;
half of the test questions are about the held-out part, which no other question
mentions.

The model. A Qwen2 of about a million parameters, warm-started on demonstrations by a
scripted and deliberately clumsy agent. This plays the part that instruction tuning
plays for Qwen2.5-3B-Instruct; neither GRPO nor OFSD ever sees a demonstration. All
demonstrations are about OTHER worlds, drawn afresh: other facts, and the words dealt
anew to the relations. So the model learns to search with a word and to read what it
finds, but it can know no fact of the world it is tested on. Of the words it has the
agent's habits, which are right there more often than chance.

Some demonstrations stand under OFSD's privileged prompt, and the agent uses the words
that the reference shows. If the reference solves this very question, the agent takes
the straight road. If it solves another one, it helps only with relations that both
share, and the agent is as clumsy as ever. So the model has to read the reference, and
not only to notice that there is one.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AddedToken,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    set_seed,
)

from eval import evaluate, rewards_of, score
from machinery.errors import BadInput
from machinery.json_lines import write_jsonl
from machinery.models import load_model, save_model
from machinery.passages import Passage, load_corpus
from machinery.questions import load_questions
from machinery.terminal import Parser, check_seed, run_script
from machinery.text import TAGS, chat_ids
from ofsd import PRIVILEGED, Pair, mine_pairs, privileged_prompt
from retriever import BM25
from rollout import Trajectory, parse_turn, rollout, standard_prompt
from tools.imitation import as_trajectory, imitation_step

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- the world

# Entities of a world.
COUNTS = {
    "person": 240,
    "town": 120,
    "company": 120,
    "novel": 120,
}
SUFFIXES = {
    "person": "Weaver Mason Carter Fisher Baker Cooper "
    "Miller Sawyer Potter Turner Glover Archer",
    "town": "Falls Harbor Bridge Hill Ford Cross Field Haven",
    "company": "Works Mills Foundry Press Motors Labs Trust Lines",
    "novel": "Letters Diaries Garden Winter Secret Journey Song Shadow",
}
# The corpus's words. Each fits any relation of its kind, as in
# "{name} is guided by {value}."
WORDS = {
    "person": "guided shaped claimed inspired sheltered",
    "town": "helmed warded nourished celebrated mirrored",
    "company": "steered backed anchored rivaled fueled",
    "novel": "adorned framed haunted carried echoed",
}
# The questions' words, as nouns and as clauses. A clause begins with the kind of entity
# that it leads to.
RELATIONS = {
    "person": "birthplace residence teacher employer debut",
    "town": "mayor architect patron port legend",
    "company": "founder director seat supplier creditor",
    "novel": "author hero setting publisher sequel",
}
CLAUSES = {
    "birthplace": "town that bore {}",
    "residence": "town that houses {}",
    "teacher": "person who taught {}",
    "employer": "company that employs {}",
    "debut": "novel first written by {}",
    "mayor": "person who governs {}",
    "architect": "person who planned {}",
    "patron": "company that funds {}",
    "port": "town that ships for {}",
    "legend": "novel that praises {}",
    "founder": "person who founded {}",
    "director": "person who runs {}",
    "seat": "town that hosts {}",
    "supplier": "company that delivers to {}",
    "creditor": "company that lends to {}",
    "author": "person who wrote {}",
    "hero": "person who acts in {}",
    "setting": "town described in {}",
    "publisher": "company that printed {}",
    "sequel": "novel that continues {}",
}
LEADS_TO = {relation: clause.split()[0] for relation, clause in CLAUSES.items()}
OPENINGS = ("Who or what is {}?", "Name {}.", "Tell me {}.", "I want to know {}.")


class QuestionSet(NamedTuple):
    count: int
    parts: list[int]  # the parts of the world that its questions are about
    # Lists of relations. A chain has relations of one list only.
    relations: tuple[list[str], ...] = (list(CLAUSES),)


# Half of the relations. An experiment trains on these, and tests on the others, too.
TRAINED = list(CLAUSES)[::2]
OTHERS = list(CLAUSES)[1::2]


# A set has a random state of its own, and it repeats no question of those above it. So
# a new set at the end changes no other.
SETS = {
    "train": QuestionSet(1080, [0]),
    "validation": QuestionSet(270, [0]),
    "test": QuestionSet(540, [0, 1]),
    "evidence-validation": QuestionSet(360, [0]),
    "evidence-test": QuestionSet(540, [0, 1]),
    "evidence-test-2": QuestionSet(540, [0, 1]),
    "evidence-test-3": QuestionSet(540, [0, 1]),
    "evidence-retention-train": QuestionSet(600, [0], (TRAINED,)),
    "evidence-retention": QuestionSet(540, [0, 1], (TRAINED, OTHERS)),
}


def name_pools(rng: random.Random) -> dict[str, list[str]]:
    """For each kind the first words of its names.

    They are invented, of two syllables, and all different. Each begins the names of
    about five entities, so half a name finds strangers.
    """
    consonants = "bdfghjklmnprstvz"
    onsets = [*consonants, "br", "dr", "gr", "kr", "tr", "st"]
    letters = product(onsets, "aeiou", consonants, "aeiou", "lnrsmk")
    all_words = ["".join(parts) for parts in letters]
    drawn = rng.sample(all_words, sum(COUNTS.values()) // 5)
    pools = {}
    for kind, count in COUNTS.items():
        size = count // 5
        pools[kind] = [word.title() for word in drawn[:size]]
        drawn = drawn[size:]
    return pools


def statement(name: str, word: str, value: str) -> str:
    """The text of a passage.

    >>> value_of(Passage("", "", statement("Stupum Falls", "warded", "Mekik Miller")))
    'Mekik Miller'
    """
    return f"{name} is {word} by {value}."


def value_of(passage: Passage) -> str:
    """What a passage says."""
    return passage.text.split(" by ")[1].rstrip(".")


class World:
    """Entities, the facts about them, and the passages that state these.

    kind[name]             person, town, company or novel
    part[name]             0, or 1: held out
    words[relation]        the corpus's word for it
    facts[name][relation]  a name
    corpus, index          the passages, and BM25 over them
    asked                  what the sets of questions have asked so far
    """

    def __init__(
        self,
        rng: random.Random,
        pools: dict[str, list[str]],
        held_out: float = 0.0,
        avoid: frozenset[str] = frozenset(),
    ):
        """held_out: the share of the entities in part 1. No name is one to avoid."""
        self.kind = {}
        self.part = {}
        self.asked = set()
        members = defaultdict(list)  # the names of each kind and part
        for kind, count in COUNTS.items():
            names = [
                f"{first} {last}"
                for first in pools[kind]
                for last in SUFFIXES[kind].split()
            ]
            allowed = [name for name in names if name not in avoid]
            for number, name in enumerate(rng.sample(allowed, count)):
                self.kind[name] = kind
                self.part[name] = int(number < held_out * count)
                members[kind, self.part[name]].append(name)

        # Each relation is dealt a word of its kind.
        self.words = {}
        for kind, relations in RELATIONS.items():
            dealt = rng.sample(WORDS[kind].split(), 5)
            self.words.update(zip(relations.split(), dealt, strict=True))

        self.facts = {}
        stated = []  # a title and a text for each fact
        for name, kind in self.kind.items():
            self.facts[name] = {}
            for relation in RELATIONS[kind].split():
                others = members[LEADS_TO[relation], self.part[name]]
                value = rng.choice([other for other in others if other != name])
                self.facts[name][relation] = value
                stated.append((name, statement(name, self.words[relation], value)))
        # Which three of its five passages a name finds is chance.
        rng.shuffle(stated)
        self.corpus = []
        for number, (title, text) in enumerate(stated):
            self.corpus.append(Passage(f"p{number}", title, text))
        self.index = BM25(self.corpus)

    def question(self, rng: random.Random, hops: int, part: int = 0) -> dict:
        """A random question about this part, and what leads to its answer: the chain of
        relations, the corpus's words for them, and the path of names."""
        path, chain = self.walk(rng, hops, part)
        while len(set(path)) <= hops:  # it runs in a circle
            path, chain = self.walk(rng, hops, part)

        as_clause = rng.choice([False, True])
        sought = path[0]
        for relation in chain:
            phrase = CLAUSES[relation] if as_clause else relation + " of {}"
            sought = "the " + phrase.format(sought)
        return {
            "question": rng.choice(OPENINGS).format(sought),
            "golden_answers": [path[-1]],
            "hops": hops,
            "chain": chain,
            "words": [self.words[relation] for relation in chain],
            "path": path,
        }

    def walk(
        self, rng: random.Random, hops: int, part: int
    ) -> tuple[list[str], list[str]]:
        """A random path of names, and the chain of relations that it follows."""
        names = [name for name, its_part in self.part.items() if its_part == part]
        path = [rng.choice(names)]
        chain = []
        for _ in range(hops):
            relation = rng.choice(list(self.facts[path[-1]]))
            chain.append(relation)
            path.append(self.facts[path[-1]][relation])
        return path, chain


def draw_questions(world: World, name: str, seed: int) -> list[dict]:
    """The questions of the set of that name, with parts, lists of relations and hops in
    equal shares."""
    rng = random.Random(f"{seed}, {name}")
    count, parts, lists = SETS[name]
    shares = list(product(parts, lists, (1, 2, 3)))
    questions = []
    for part, relations, hops in shares:
        wanted = len(questions) + count // len(shares)
        while len(questions) < wanted:
            question = world.question(rng, hops, part)
            if not set(question["chain"]) <= set(relations):
                continue
            substance = (question["path"][0], *question["chain"])
            if substance not in world.asked:
                world.asked.add(substance)
                question["held_out"] = bool(part)
                questions.append(question)
    rng.shuffle(questions)
    return with_ids(name, questions)


def with_ids(name: str, questions: list[dict]) -> list[dict]:
    """The questions, each with the id NAME-NUMBER."""
    rows = []
    for number, question in enumerate(questions):
        row = {"id": f"{name}-{number}"}
        row.update(question)
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the clumsy agent

# The agent's words. It has a favourite for each relation, with the probability
# FAVOURITE. The word that is right in the world the model is for has RIGHT; what is
# left goes to all five alike. For LUCKY relations of a kind the favourite is the right
# word: .76 in all, and .36 for the others.
FAVOURITE = 0.4
RIGHT = 0.3
LUCKY = 3
# Its other habits. It takes what it has found for the answer although the question goes
# on (EARLY); and at the end of the road it searches for the answer before it gives it
# (VERIFY). Both depend on the kind of what was found, so that some wear off sooner than
# others.
EARLY = {"person": 0.1, "town": 0.35, "company": 0.15, "novel": 0.25}
VERIFY = {"person": 0.5, "town": 0.2, "company": 0.4, "novel": 0.3}
# It makes a search again. This teaches the model early to copy a query's word.
AGAIN = 0.3
# It overlooks a word that a reference shows.
SLIP = 0.05
# As in train.py's defaults.
MAX_SEARCHES = 4
K = 3
PRIVILEGED_TOKENS = 224


def habitual_words(
    rng: random.Random, words: dict[str, str]
) -> dict[str, dict[str, float]]:
    """The agent's odds of each word, by relation.

    words: those of the world that the model is for.
    """
    odds = {}
    for kind in RELATIONS:
        relations = rng.sample(RELATIONS[kind].split(), 5)
        choices = WORDS[kind].split()
        lucky = relations[:LUCKY]
        others = relations[LUCKY:]
        # The favourite is the relation's own right word, or that of another relation.
        liked = lucky + others[-1:] + others[:-1]
        for relation, right_for in zip(relations, liked, strict=True):
            share = (1 - FAVOURITE - RIGHT) / len(choices)
            odds[relation] = dict.fromkeys(choices, share)
            odds[relation][words[right_for]] += FAVOURITE
            odds[relation][words[relation]] += RIGHT
    return odds


def demonstrate(
    rng: random.Random,
    world: World,
    question: dict,
    odds: dict[str, dict[str, float]],
    *,
    clumsy: bool,
    shown: dict[str, str] | None = None,
) -> list[str | list[Passage]]:
    """One scripted trajectory: what the agent writes (str) and what it is shown (lists
    of passages), in turn.

    shown: the words that a reference shows, by relation. The agent believes the first
    passage of a search, whether its word was right or not. Where it is not clumsy, SLIP
    is its only bad habit.

    The thoughts of going on (I need), of checking (Let me) and of answering (The
    answer) begin with words of their own: where two begin alike, to unlearn the one may
    be to unlearn the other.
    """
    shown = shown or {}
    steps = []  # two a search

    def search(thought: str, query: str) -> list[Passage]:
        passages = world.index.search([query], K)[0]
        steps.append(f"<think> {thought}</think>\n<search> {query}</search>")
        steps.append(passages)
        return passages

    entity = question["path"][0]
    learned = ""
    to_go = len(question["chain"])
    for relation in question["chain"]:
        # 1. The query: a word by habit, or the one that a reference shows.
        word = rng.choices(list(odds[relation]), odds[relation].values())[0]
        if rng.random() > SLIP:
            word = shown.get(relation, word)
        query = f"{entity} {relation} {word}"
        passages = search(f"{learned}I need to read about {entity}.", query)
        to_go -= 1

        # 2. Perhaps the same again, where that leaves searches enough.
        may_search = len(steps) // 2 + to_go < MAX_SEARCHES
        if clumsy and may_search and rng.random() < AGAIN:
            search("Let me search again.", query)

        # 3. What was found, and perhaps an early end.
        entity = value_of(passages[0])
        learned = f"It is {entity}. "
        kind = LEADS_TO[relation]
        if clumsy and to_go and rng.random() < EARLY[kind]:
            break

    may_search = to_go == 0 and len(steps) // 2 < MAX_SEARCHES
    if clumsy and may_search and rng.random() < VERIFY[kind]:
        search(f"{learned}Let me check.", entity)
        learned = ""
    steps.append(
        f"<think> {learned}The answer is {entity}.</think>\n<answer> {entity}</answer>"
    )
    return steps


# ---------------------------------------------------------------- tokenizer and model


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE, with merges learned from these texts until every word of
    theirs is one token; ChatML like Qwen's, the tags as added tokens, and a prompt that
    is the question."""
    # Qwen2's normaliser and pre-tokeniser, and no merge yet.
    bpe = Qwen2Tokenizer()._tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        search_prompt="{question}",
        model_max_length=1024,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(
        [AddedToken(tag, special=False, normalized=False) for tag in TAGS]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def make_model(tokenizer) -> Qwen2ForCausalLM:
    """A model with random weights.

    Qwen's initializer_range of 0.02 and rope_theta of 1e6 are for wide models and long
    texts: with them this one learns to copy much later. Half as many key-value heads as
    heads: decoding reads half as much.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def tokenizer_texts(
    rng: random.Random,
    world: World,
    pools: dict[str, list[str]],
    odds: dict[str, dict[str, float]],
) -> list[str]:
    """Texts with every word of the worlds, of the prompts and of the agent."""
    texts = ["user\nassistant\n" + PRIVILEGED + " nothing was found is by"]
    texts += [
        f" {' '.join(pools[kind])} {SUFFIXES[kind]} {WORDS[kind]}" for kind in COUNTS
    ]
    for _ in range(600):
        question = world.question(rng, 3)
        steps = demonstrate(rng, world, question, odds, clumsy=True)
        texts.append(question["question"])
        texts += [step for step in steps if isinstance(step, str)]
    return texts


# ---------------------------------------------------------------- the warm start


class Phase(NamedTuple):
    count: int  # demonstrations
    privileged: float  # the share of them under the privileged prompt
    own: float  # the share of those where the reference is of this very question
    short: bool  # the reference is its queries and its answer only
    observations: float  # the weight of what the environment wrote
    lr: float  # the learning rate, and
    last: float  # what is left of it at the end


# Copying comes first. Then short references teach to take a word from a reference: from
# whole ones alone that was not learned in 20,000 demonstrations. Nor was it from 6,000
# short ones after a first phase without any, by an agent that never made a search
# again.
PHASES = (
    Phase(
        count=6_000,
        privileged=0.4,
        own=1.0,
        short=True,
        observations=0.2,
        lr=2e-3,
        last=0.5,
    ),
    Phase(
        count=3_600,
        privileged=1.0,
        own=1.0,
        short=True,
        observations=0.0,
        lr=2e-3,
        last=0.5,
    ),
    Phase(
        count=9_000,
        privileged=0.7,
        own=0.75,
        short=False,
        observations=0.0,
        lr=1.5e-3,
        last=0.5,
    ),
    Phase(
        count=9_000,
        privileged=0.6,
        own=0.75,
        short=False,
        observations=0.0,
        lr=7.5e-4,
        last=0.01,
    ),
)


class Reference(NamedTuple):
    """What a privileged prompt of a demonstration shows."""

    trajectory: Trajectory
    words: dict[str, str]  # the corpus's words for the relations of its question


def demonstrations(
    rng: random.Random,
    tokenizer,
    pools: dict[str, list[str]],
    avoid: frozenset[str],
    odds: dict[str, dict[str, float]],
    phase: Phase,
) -> Iterator[Trajectory]:
    """Yield a phase's demonstrations, 400 from each fresh world, in which no entity has
    a name to avoid. odds: the agent's words by habit."""
    for number in tqdm(range(phase.count), desc="demonstrations", disable=None):
        if number % 400 == 0:
            world = World(rng, pools, avoid=avoid)
            previous = None  # the reference before this one, in the same world
        hops = rng.choices([1, 2, 3])[0]
        question = world.question(rng, hops)
        prompt = standard_prompt(tokenizer, question["question"])
        prompt_ids = chat_ids(tokenizer, prompt)
        steps = demonstrate(rng, world, question, odds, clumsy=True)
        if rng.random() < phase.privileged:
            reference = make_reference(
                rng, tokenizer, world, question, odds, steps, phase.short
            )
            own = previous is None or rng.random() < phase.own
            read = reference if own else previous
            steps = demonstrate(
                rng, world, question, odds, clumsy=not own, shown=read.words
            )
            prompt_ids = privileged_prompt(
                tokenizer, question["question"], read.trajectory, PRIVILEGED_TOKENS
            )
            previous = reference
        yield as_trajectory(tokenizer, steps, question["question"], prompt_ids)


def make_reference(
    rng: random.Random,
    tokenizer,
    world: World,
    question: dict,
    odds: dict[str, dict[str, float]],
    steps: list[str | list[Passage]],
    short: bool,
) -> Reference:
    """A reference for this question: these steps if their answer is right, or others.

    It is clumsy, too, but its answer is right. short: without thoughts and passages.
    """
    words = dict(zip(question["chain"], question["words"], strict=True))
    right_end = f"<answer> {question['golden_answers'][0]}</answer>"
    while not steps[-1].endswith(right_end):
        steps = demonstrate(rng, world, question, odds, clumsy=True, shown=words)
    if short:
        lines = []
        for text in steps[::2]:
            kind, content = parse_turn(text)
            lines.append(f"<{kind}> {content}</{kind}>")
        steps = ["\n".join(lines)]
    # Of the reference's prompt nothing is shown.
    trajectory = as_trajectory(tokenizer, steps, question["question"], prompt_ids=[])
    return Reference(trajectory, words)


def warm_start(
    model,
    demos: Iterable[Trajectory],
    rng: random.Random,
    phase: Phase,
    batch: int = 12,
) -> None:
    """Supervised training: cross-entropy on the agent's tokens, and at a small weight
    on the environment's (a title recurs in its passage: it teaches copying).

    The learning rate rises to phase.lr, and falls linearly.
    """
    # Batches of similar length, in random order: little padding.
    demos = sorted(demos, key=lambda t: len(t.prompt_ids) + len(t.response_ids))
    batches = [demos[i : i + batch] for i in range(0, len(demos), batch)]
    rng.shuffle(batches)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.01
    )
    rising = min(100, len(batches) // 10 + 1)  # updates
    bar = tqdm(batches, desc="warm start", disable=None)
    for number, trajectories in enumerate(bar):
        rise = (number + 1) / rising
        fall = 1 - (1 - phase.last) * number / len(batches)
        optimizer.param_groups[0]["lr"] = phase.lr * min(rise, fall)
        weights = [
            [max(mask, phase.observations) for mask in trajectory.loss_mask]
            for trajectory in trajectories
        ]
        stats = imitation_step(
            model, optimizer, trajectories, micro_batch=batch, weights=weights
        )
        if number % 50 == 0:
            loss = stats["loss"]
            bar.write(f"batch {number:5d} of {len(batches)}  loss {loss:.3f}")


# ---------------------------------------------------------------- the check of a model


class FindsNothing:
    """A retriever that finds no passage."""

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        return [[] for _ in queries]


def check(name: str, folder: Path, questions_file: str) -> dict:
    """What a policy for this world has to show on these questions.

    First EM: greedily, sampled, and where nothing is found. Then EM on the questions of
    which a group of five gave a pair, by the reference in the prompt: none (standard),
    this question's own, another's, and another's that shares no relation with it.
    Raises BadInput where the pairs are too few.
    """
    model, tokenizer = load_model(name)
    index = BM25(load_corpus(folder / "corpus.jsonl"))
    questions = load_questions(questions_file)
    greedy = evaluate(model, tokenizer, index, questions, progress="greedy")

    texts = [question["question"] for question in questions]
    pool = rollout(model, tokenizer, index, texts, group_size=5, progress="sampled")
    rewards = rewards_of(questions, pool)
    pairs, counts = mine_pairs(
        model, tokenizer, questions, pool, rewards, PRIVILEGED_TOKENS
    )
    pool_scores = score([question for question in questions for _ in range(5)], pool)

    others = other_references(pairs)
    if not pairs or len(others.strangers) < len(pairs):
        raise BadInput(
            f"{questions_file}: too few of its questions gave a pair to compare "
            "references"
        )
    own = [pair.reference for pair in pairs]
    standard = sample_again(model, tokenizer, index, pairs, None)
    by_own = sample_again(model, tokenizer, index, pairs, own)
    by_another = sample_again(model, tokenizer, index, pairs, others.any_other)
    by_stranger = sample_again(model, tokenizer, index, pairs, others.strangers)
    nothing_found = evaluate(model, tokenizer, FindsNothing(), questions)
    return {
        "greedy": greedy["em"],
        "greedy_by": greedy["em_by"],
        "greedy_searches": greedy["searches"],
        "sampled": pool_scores["em"],
        "sampled_by": pool_scores["em_by"],
        "searches": pool_scores["searches"],
        **counts,
        "standard": standard,
        "own_reference": by_own,
        "anothers_reference": by_another,
        "anothers_sharing_no_relation": by_stranger,
        "nothing_found": nothing_found["em"],
    }


class OtherReferences(NamedTuple):
    """A reference for each pair that is not its own, where there is one."""

    any_other: list[Trajectory]
    strangers: list[Trajectory]  # of questions that share no relation with the pair's


def other_references(pairs: list[Pair]) -> OtherReferences:
    """Drawn at random from the other pairs."""
    any_other = []
    strangers = []
    for pair in pairs:
        shuffled = random.sample(pairs, len(pairs))
        others = [other for other in shuffled if other is not pair]
        chain = set(pair.question["chain"])
        unlike = [
            other for other in others if chain.isdisjoint(other.question["chain"])
        ]
        any_other += [other.reference for other in others[:1]]
        strangers += [other.reference for other in unlike[:1]]
    return OtherReferences(any_other, strangers)


def sample_again(
    model,
    tokenizer,
    index,
    pairs: list[Pair],
    references: list[Trajectory] | None,
) -> dict:
    """Scores of three samples a pair: fresh ones, since the old ones chose the pairs.

    references: one a pair, for its privileged prompt; None: the standard prompt.
    """
    questions = [pair.question for pair in pairs]
    texts = [question["question"] for question in questions]
    prompts = None
    if references is not None:
        prompts = [
            privileged_prompt(tokenizer, text, reference, PRIVILEGED_TOKENS)
            for text, reference in zip(texts, references, strict=True)
        ]
    sampled = rollout(model, tokenizer, index, texts, group_size=3, prompts=prompts)
    scores = score([question for question in questions for _ in range(3)], sampled)
    return {name: scores[name] for name in ("em", "em_supported", "searches", "em_by")}


# ---------------------------------------------------------------- the command


def make_data(
    rng: random.Random, pools: dict[str, list[str]], folder: Path, seed: int
) -> World:
    """Draw the world, and write its passages and questions to the folder."""
    world = World(rng, pools, held_out=1 / 3)
    passages = [
        {"id": passage.id, "title": passage.title, "text": passage.text}
        for passage in world.corpus
    ]
    write_jsonl(folder / "corpus.jsonl", passages)
    for name in SETS:
        write_jsonl(folder / f"{name}.jsonl", draw_questions(world, name, seed))
    return world


def train_model(
    rng: random.Random,
    world: World,
    pools: dict[str, list[str]],
    folder: Path,
    seed: int,
) -> None:
    """Make the tokenizer and the model, warm-start it, and write it to the folder."""
    odds = habitual_words(rng, world.words)
    tokenizer = make_tokenizer(tokenizer_texts(rng, world, pools, odds))
    model = make_model(tokenizer)
    print(
        f"{len(tokenizer)} tokens in the vocabulary, "
        f"{model.num_parameters():,} parameters"
    )
    held_out = frozenset(name for name, part in world.part.items() if part == 1)
    for number, phase in enumerate(PHASES):
        rng = random.Random(f"{seed}, phase {number}")  # so a phase can be repeated
        demos = demonstrations(rng, tokenizer, pools, held_out, odds, phase)
        warm_start(model, demos, rng, phase)
    save_model(model, tokenizer, folder)


def parse_flags() -> argparse.Namespace:
    parser = Parser(description="Build the micro world and its model.")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--data-only", action="store_true", help="leave the model alone"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument(
        "--check", metavar="MODEL", help="build nothing; measure this model"
    )
    parser.add_argument(
        "--questions", help="of --check (default: test.jsonl in the folder)"
    )
    flags = parser.parse_args()
    check_seed(parser, flags.seed)
    return flags


def main() -> None:
    flags = parse_flags()
    set_seed(flags.seed)
    if flags.check:
        questions = flags.questions or str(flags.out / "test.jsonl")
        print(json.dumps(check(flags.check, flags.out, questions), indent=2))
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(flags.seed)
    pools = name_pools(rng)
    world = make_data(rng, pools, flags.out, flags.seed)
    if not flags.data_only:
        train_model(rng, world, pools, flags.out / "model", flags.seed)


if __name__ == "__main__":
    run_script(main)
