"""The micro world: invented facts, questions about them, and a small model that can barely search.

    python micro/make.py                # rewrites micro/ from seed 0; half an hour on one core
    python micro/make.py --data-only    # corpus and questions only; seconds
    python micro/make.py --check micro/model   # measure a model on the test questions; minutes

The world. Persons, towns, companies and novels, each with five passages. A passage states one fact,
in the corpus's own word for the relation, never the question's: who asks for the mayor of Vazik
Bridge has to read that Vazik Bridge is helmed by Kegon Sawyer. A search shows three passages. The
query "Vazik Bridge mayor" finds any three of the five; with "helmed" it finds the one. So what
there is to learn is which word to add, and to go on to the end of a chain of one to three
relations. The entities fall in two parts without a relation between them; half of the test
questions are about the held-out part, which no other question mentions.

The model. A Qwen2 of about a million parameters, warm-started on demonstrations by a scripted and
deliberately clumsy agent. This plays the part that instruction tuning plays for
Qwen2.5-3B-Instruct; neither GRPO nor OFSD ever sees a demonstration. All demonstrations are about
OTHER worlds, drawn afresh: other facts, and the words dealt anew to the relations. So the model
learns to search with a word and to read what is found, but it can know neither a fact nor a word
of the world it is tested on. It has the agent's habits, which are right there in part.

Some demonstrations stand under OFSD's privileged prompt, and the agent uses the words that the
reference shows. Three references in four solve this very question, and the agent takes the
straight road. Another question's reference shows it a word only where the two share a relation,
and the agent is as clumsy as ever. So the model has to read the reference, not just notice it.
"""

import json
import random
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from eval import evaluate, load_questions, rewards_of, score  # noqa: E402
from ofsd import PRIVILEGED, mine_pairs, privileged_prompt  # noqa: E402
from retriever import BM25, Parser, Passage, load_corpus, run_script  # noqa: E402
from rollout import (  # noqa: E402
    TAGS, Trajectory, chat_ids, encode, load_model, observation_ids, parse_turn, rollout,
    save_model, standard_prompt,
)  # fmt: skip

# ---------------------------------------------------------------- the world

COUNTS = {"person": 240, "town": 120, "company": 120, "novel": 120}  # entities of a world
HELD_OUT = 1 / 3  # the part that only test questions ask about
SUFFIXES = {
    "person": "Weaver Mason Carter Fisher Baker Cooper Miller Sawyer Potter Turner Glover Archer",
    "town": "Falls Harbor Bridge Hill Ford Cross Field Haven",
    "company": "Works Mills Foundry Press Motors Labs Trust Lines",
    "novel": "Letters Diaries Garden Winter Secret Journey Song Shadow",
}
# The corpus's words. Each fits any relation of its kind: "{name} is guided by {value}."
WORDS = {
    "person": "guided shaped claimed inspired sheltered",
    "town": "helmed warded nourished celebrated mirrored",
    "company": "steered backed anchored rivaled fueled",
    "novel": "adorned framed haunted carried echoed",
}
SUFFIXES, WORDS = ({kind: text.split() for kind, text in d.items()} for d in (SUFFIXES, WORDS))
# The questions' words: the relations of each kind, as a noun and as a clause. The clause begins
# with the kind that the relation leads to.
RELATIONS = {
    "person": {
        "birthplace": "town that bore {}", "residence": "town that houses {}",
        "teacher": "person who taught {}", "employer": "company that employs {}",
        "debut": "novel first written by {}",
    },
    "town": {
        "mayor": "person who governs {}", "architect": "person who planned {}",
        "patron": "company that funds {}", "port": "town that ships for {}",
        "legend": "novel that praises {}",
    },
    "company": {
        "founder": "person who founded {}", "director": "person who runs {}",
        "seat": "town that hosts {}", "supplier": "company that delivers to {}",
        "creditor": "company that lends to {}",
    },
    "novel": {
        "author": "person who wrote {}", "hero": "person who acts in {}",
        "setting": "town described in {}", "publisher": "company that printed {}",
        "sequel": "novel that continues {}",
    },
}  # fmt: skip
CLAUSES = {noun: clause for nouns in RELATIONS.values() for noun, clause in nouns.items()}
LEADS_TO = {noun: clause.split()[0] for noun, clause in CLAUSES.items()}
OPENINGS = ("Who or what is the {}?", "Name the {}.", "Tell me the {}.", "I want to know the {}.")
# Each set of questions and the parts it asks about. A set is drawn from a random state of its own
# and repeats no question of those above it, so a line at the end changes none of the others.
SETS = {
    "train": (1080, [0]), "validation": (270, [0]), "test": (540, [0, 1]),
    "evidence-validation": (360, [0]), "evidence-test": (540, [0, 1]),
}  # fmt: skip


def name_pools(rng: random.Random) -> dict[str, list[str]]:
    """Invented words of two syllables, all different: the first words of names, for each kind.
    Each begins the names of about five entities, so half a name finds strangers."""
    onsets = "b d f g h j k l m n p r s t v z br dr gr kr tr st".split()
    every = ["".join(x) for x in product(onsets, "aeiou", onsets[:16], "aeiou", "lnrsmk")]
    drawn = iter(rng.sample(every, sum(COUNTS.values()) // 5))
    return {kind: [next(drawn).title() for _ in range(n // 5)] for kind, n in COUNTS.items()}


class World:
    """kind[name]; part[name], 0 or 1; facts[name][relation], a name; words[relation], the corpus's
    word for it; the passages, and their index."""

    def __init__(self, rng: random.Random, pools: dict, held_out: float = 0.0, avoid=frozenset()):
        self.kind, self.part, self.asked, members = {}, {}, set(), defaultdict(list)
        for kind, count in COUNTS.items():
            names = [f"{first} {last}" for first in pools[kind] for last in SUFFIXES[kind]]
            for i, name in enumerate(rng.sample([n for n in names if n not in avoid], count)):
                self.kind[name], self.part[name] = kind, int(i < held_out * count)
                members[kind, self.part[name]].append(name)
        self.words: dict[str, str] = {}
        for kind, words in WORDS.items():  # they are dealt to the relations of the kind
            self.words |= zip(RELATIONS[kind], rng.sample(words, len(words)))
        self.facts: dict[str, dict[str, str]] = {name: {} for name in self.kind}
        for name, kind in self.kind.items():
            for relation in RELATIONS[kind]:
                others = members[LEADS_TO[relation], self.part[name]]
                self.facts[name][relation] = rng.choice([o for o in others if o != name])
        stated = [
            (name, f"{name} is {self.words[relation]} by {value}.")
            for name, values in self.facts.items() for relation, value in values.items()
        ]  # fmt: skip
        rng.shuffle(stated)  # which three of its five passages a name finds is chance
        self.corpus = [Passage(f"p{i}", *passage) for i, passage in enumerate(stated)]
        self.index = BM25(self.corpus)

    def question(self, rng: random.Random, hops: int, part: int = 0) -> dict:
        """A random question, "question" and "golden_answers", with what it is made of."""
        path: list[str] = []
        while len({*path}) <= hops:  # a chain that runs in a circle is drawn again
            path, chain = [rng.choice([name for name, its in self.part.items() if its == part])], []
            for _ in range(hops):
                chain.append(rng.choice(list(self.facts[path[-1]])))
                path.append(self.facts[path[-1]][chain[-1]])
        style, asked = rng.choice(["noun", "clause"]), path[0]
        for hop, relation in enumerate(chain):
            phrase = CLAUSES[relation] if style == "clause" else f"{relation} of {{}}"
            asked = phrase.format(f"the {asked}" if hop else asked)
        return {
            "question": rng.choice(OPENINGS).format(asked), "golden_answers": [path[-1]],
            "hops": hops, "chain": chain, "words": [self.words[relation] for relation in chain],
            "path": path,
        }  # fmt: skip


def draw_questions(world: World, name: str, seed: int) -> list[dict]:
    """The rows of the set of that name, with hops and parts in equal shares; no chain that was
    asked about this world before."""
    rng, rows, (count, parts) = random.Random(f"{seed}, {name}"), [], SETS[name]
    for part in parts:
        for hops in (1, 2, 3):
            wanted = len(rows) + count // len(parts) // 3
            while len(rows) < wanted:
                made = world.question(rng, hops, part)
                if (key := (made["path"][0], *made["chain"])) not in world.asked:
                    world.asked.add(key)
                    rows.append({**made, "held_out": bool(part)})
    rng.shuffle(rows)
    return [{"id": f"{name}-{i}", **row} for i, row in enumerate(rows)]


# ---------------------------------------------------------------- the clumsy agent

# The words it searches with, in any world: its favourite, and the word that is right in the world
# that the model is for, are this likely; else it takes any of the five. Of five relations so many
# have the right word for their favourite.
FAVOURITE, RIGHT, LUCKY = 0.4, 0.3, 3
SLIP = 0.05  # it slips, and uses no word of a reference
# It takes what it just found for the answer although the question goes on; and, at the end of the
# road, it searches for the answer before it gives it. Both depend on what the relation leads to.
EARLY = dict(person=0.1, town=0.35, company=0.15, novel=0.25)
VERIFY = dict(person=0.5, town=0.2, company=0.4, novel=0.3)
AGAIN = 0.3  # It makes a search again: so the model learns early to copy a query, word and all.
MAX_SEARCHES, K, PRIVILEGED_TOKENS = 4, 3, 224  # as in train.py's defaults
# The warm start, in phases: demonstrations; the share of them under the privileged prompt; how many
# of its references are this question's own, and whether they are shown whole or in short; the
# weight of what the environment wrote; the learning rate, and what is left of it at the end.
# Copying comes first. Short references are all the question's own: from whole ones alone reading
# was not learned in 20,000. That the agent makes searches again, or that short references stand in
# the first phase already, is what made them readable: without both, 6,000 short ones did not do.
PHASES = (
    (6_000, 0.4, 1.0, "short", 0.2, 2e-3, 0.5),
    (3_600, 1.0, 1.0, "short", 0.0, 2e-3, 0.5),
    (9_000, 0.7, 0.75, "whole", 0.0, 1.5e-3, 0.5),
    (9_000, 0.6, 0.75, "whole", 0.0, 7.5e-4, 0.01),
)


def habitual_words(rng: random.Random, words: dict[str, str]) -> dict[str, dict[str, float]]:
    """The agent's odds for each relation's word; words: those of the world the model is for."""
    odds = {}
    for kind, choices in WORDS.items():
        relations = rng.sample(list(RELATIONS[kind]), len(choices))
        likes = relations[:LUCKY] + relations[-1:] + relations[LUCKY:-1]  # each the one before it
        for relation, liked in zip(relations, likes):
            odds[relation] = dict.fromkeys(choices, (1 - FAVOURITE - RIGHT) / len(choices))
            odds[relation][words[liked]] += FAVOURITE
            odds[relation][words[relation]] += RIGHT
    return odds


def demonstrate(rng: random.Random, world: World, question: dict, odds: dict, *, clumsy: bool,
                shown: dict[str, str] = {}) -> list:  # fmt: skip
    """One scripted trajectory: texts the agent writes and lists of passages it is shown, in turn.
    odds: its words by habit; shown: the words that a reference shows it. It reads the first passage
    of a search, whether the word was right or not. Not clumsy, it takes the straight road.

    The thoughts of going on (I need), of checking (Let me) and of answering (The answer) begin with
    words of their own: where two begin alike, to unlearn the one may be to unlearn the other."""
    steps: list = []  # two a search

    def search(thought: str, query: str) -> list[Passage]:
        found = world.index.search([query], K)[0]
        steps.extend([f"<think> {thought}</think>\n<search> {query}</search>", found])
        return found

    def chance(probability: float) -> bool:
        return clumsy and rng.random() < probability

    entity, learned = question["path"][0], ""
    for hop, relation in enumerate(question["chain"]):
        word = rng.choices(*zip(*odds[relation].items()))[0]
        if rng.random() > SLIP:
            word = shown.get(relation, word)
        query = f"{entity} {relation} {word}"
        found = search(f"{learned}I need to read about {entity}.", query)
        room = MAX_SEARCHES - len(steps) // 2 > len(question["chain"]) - hop - 1
        if room and chance(AGAIN):
            search("Let me search again.", query)
        entity, leads_to = found[0].text.split(" by ")[1].rstrip("."), LEADS_TO[relation]
        learned = f"It is {entity}. "
        last = hop + 1 == len(question["chain"])
        if last or chance(EARLY[leads_to]):
            break
    if last and len(steps) < 2 * MAX_SEARCHES and chance(VERIFY[leads_to]):
        search(f"{learned}Let me check.", entity)
        learned = ""
    steps.append(f"<think> {learned}The answer is {entity}.</think>\n<answer> {entity}</answer>")
    return steps


def as_trajectory(tokenizer, steps: list, question: str, prompt_ids: list[int]) -> Trajectory:
    """A demonstration in the form that rollouts have."""
    trajectory = Trajectory(question, prompt_ids)
    for step in steps:
        if isinstance(step, str):
            ids = encode(tokenizer, step)
            trajectory.extend(ids, [0.0] * len(ids))
        else:
            trajectory.extend(observation_ids(tokenizer, step, 512))
            trajectory.passages.append(step)
    return trajectory


# ---------------------------------------------------------------- tokenizer and model


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with merges learned from these texts until every word of theirs is
    one token; ChatML like Qwen's, the tags as added tokens, and a prompt that is the question."""
    bpe = Qwen2Tokenizer()._tokenizer  # for its normaliser and pre-tokeniser
    start = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=start, show_progress=False)
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = bpe.normalizer, bpe.pre_tokenizer
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", search_prompt="{question}",
        model_max_length=1024,
    )  # fmt: skip
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def make_model(tokenizer) -> Qwen2ForCausalLM:
    """Qwen's 0.02 and 1e6 are for wide models and long texts: with them this one learns to copy
    much later. Half as many key-value heads as heads: decoding reads half as much."""
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=512, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ))  # fmt: skip


def demonstrations(rng: random.Random, tokenizer, pools, avoid, odds: dict, count: int,
                   privileged: float, share: float, reads: str) -> list[Trajectory]:  # fmt: skip
    """Demonstrations in fresh worlds; privileged: the share under the privileged prompt; share: of
    its references those of this question; reads: whether references are shown whole or in short,
    as their queries and their answer."""
    made: list[Trajectory] = []
    for i in tqdm(range(count), desc="demonstrations", disable=None):
        if i % 400 == 0:
            world, previous = World(rng, pools, avoid=avoid), None
        question = world.question(rng, rng.choices([1, 2, 3])[0])
        asked, words = question["question"], dict(zip(question["chain"], question["words"]))
        prompt = chat_ids(tokenizer, standard_prompt(tokenizer, asked))
        steps = demonstrate(rng, world, question, odds, clumsy=True)
        if rng.random() < privileged:
            while not steps[-1].endswith(f" {question['golden_answers'][0]}</answer>"):
                steps = demonstrate(rng, world, question, odds, clumsy=True, shown=words)
            if reads == "short":
                said = (parse_turn(step) for step in steps if isinstance(step, str))
                steps = ["\n".join(f"<{kind}> {content}</{kind}>" for kind, content in said)]
            reference = as_trajectory(tokenizer, steps, asked, prompt), words  # clumsy but right
            own = previous is None or rng.random() < share
            read, shown = reference if own else previous
            steps = demonstrate(rng, world, question, odds, clumsy=not own, shown=shown)
            prompt = privileged_prompt(tokenizer, asked, read, PRIVILEGED_TOKENS)
            previous = reference
        made.append(as_trajectory(tokenizer, steps, asked, prompt))
    return made


def warm_start(model, demos: list[Trajectory], rng: random.Random, *, lr: float, last: float,
               observation_weight: float, batch: int = 12) -> None:  # fmt: skip
    """Supervised training on demonstrations: cross-entropy on every response token, the
    observation's at a small weight (titles repeat inside passages: it teaches copying). The
    learning rate falls linearly from lr to last * lr."""
    # Batches of similar length, in random order: little padding.
    demos = sorted(demos, key=lambda demo: len(demo.prompt_ids) + len(demo.response_ids))
    batches = [demos[i : i + batch] for i in range(0, len(demos), batch)]
    rng.shuffle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = min(100, len(batches) // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - (1 - last) * step / len(batches))
    )
    model.train()
    with tqdm(batches, desc="warm start", disable=None) as bar:
        for step, picked in enumerate(bar):
            # Padded on the right only: a causal model never looks there, so no mask is needed.
            ids = [torch.tensor(demo.prompt_ids + demo.response_ids) for demo in picked]
            ids = pad_sequence(ids, batch_first=True).to(model.device)  # (B, S)
            masks = [torch.tensor(demo.loss_mask).clamp(min=observation_weight) for demo in picked]
            masks = [pad(mask, (len(d.prompt_ids) - 1, 0)) for mask, d in zip(masks, picked)]
            weights = pad_sequence(masks, batch_first=True).to(model.device)  # (B, S - 1)
            learned = weights > 0
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits, weights = model.lm_head(hidden[learned]), weights[learned]  # (N, V), (N,)
            losses = cross_entropy(logits, ids[:, 1:][learned], reduction="none")  # (N,)
            loss = (losses * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                bar.write(f"batch {step:5d} of {len(batches)}  loss {loss.item():.3f}")
    model.eval()


def write_jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check(name: str, folder: Path, asked: str) -> dict:
    """What a policy for this world has to show, on these questions. Greedy and sampled EM; EM where
    the retriever finds nothing; and, on fresh samples for the questions of which a group of five
    gave a pair, EM and supported EM by the reference that the prompt shows: none (standard), this
    question's own, another's, and another's that shares no relation with it."""
    model, tokenizer = load_model(name)
    index, questions = BM25(load_corpus(folder / "corpus.jsonl")), load_questions(asked)
    greedy = evaluate(model, tokenizer, index, questions, progress="greedy")
    texts = [question["question"] for question in questions]
    pool = rollout(model, tokenizer, index, texts, group_size=5, progress="pool")
    rewards = rewards_of(questions, pool)
    pairs, counts = mine_pairs(model, tokenizer, questions, pool, rewards, PRIVILEGED_TOKENS)
    pool = score([question for question in questions for _ in range(5)], pool)
    mined = [pair.question for pair in pairs]

    def sampled(choose=None) -> dict:
        """Of three samples a question, each with the reference of the question chosen for it."""
        prompts, texts = None, [question["question"] for question in mined]
        if choose:
            chosen = (next(j for j in order if choose(i, j)) for i, order in enumerate(orders))
            shown = zip(texts, (pairs[j].reference for j in chosen))
            prompts = [privileged_prompt(tokenizer, *both, PRIVILEGED_TOKENS) for both in shown]
        found = rollout(model, tokenizer, index, texts, group_size=3, prompts=prompts)
        row = score([question for question in mined for _ in range(3)], found)
        return {key: row[key] for key in ("em", "em_supported", "searches", "em_by")}

    orders = [random.sample(range(len(mined)), len(mined)) for _ in mined]
    chains = [{*question["chain"]} for question in mined]
    nothing = SimpleNamespace(search=lambda queries, k: [[] for _ in queries])
    return {
        "greedy": greedy["em"], "greedy_by": greedy["em_by"], "greedy_searches": greedy["searches"],
        "sampled": pool["em"], "sampled_by": pool["em_by"], "searches": pool["searches"], **counts,
        "standard": sampled(), "own_reference": sampled(lambda i, j: i == j),
        "anothers_reference": sampled(lambda i, j: i != j),
        "anothers_sharing_no_relation": sampled(lambda i, j: not chains[i] & chains[j]),
        "nothing_found": evaluate(model, tokenizer, nothing, questions)["em"],
    }  # fmt: skip


def main() -> None:
    parser = Parser(description="Build the micro world and its model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-only", action="store_true", help="leave the model alone")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--check", metavar="MODEL", help="build nothing; measure this model")
    parser.add_argument("--questions", help="of --check: test.jsonl where none are given")
    args = parser.parse_args()
    set_seed(args.seed)
    rng = random.Random(args.seed)
    if args.check:
        asked = args.questions or str(args.out / "test.jsonl")
        print(json.dumps(check(args.check, args.out, asked), indent=2))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    pools = name_pools(rng)
    world = World(rng, pools, held_out=HELD_OUT)
    corpus = [{"id": p.id, "title": p.title, "text": p.text} for p in world.corpus]
    write_jsonl(args.out / "corpus.jsonl", corpus)
    for name in SETS:
        write_jsonl(args.out / f"{name}.jsonl", draw_questions(world, name, args.seed))
    if args.data_only:
        return
    odds = habitual_words(rng, world.words)
    texts = ["user\nassistant\n" + PRIVILEGED + " nothing was found is by"]
    for parts in (pools, SUFFIXES, WORDS):
        texts += [f" {word}" for words in parts.values() for word in words]
    for _ in range(600):
        question = world.question(rng, 3)
        texts += [question["question"], *demonstrate(rng, world, question, odds, clumsy=True)[::2]]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens in the vocabulary, {model.num_parameters():,} parameters")
    held = frozenset(name for name, part in world.part.items() if part)
    for phase, (*how, weight, lr, last) in enumerate(PHASES):
        rng = random.Random(f"{args.seed}, phase {phase}")  # so that a phase can be repeated alone
        demos = demonstrations(rng, tokenizer, pools, held, odds, *how)
        warm_start(model, demos, rng, lr=lr, last=last, observation_weight=weight)
    save_model(model, tokenizer, args.out / "model")


if __name__ == "__main__":
    run_script(main)
