"""The micro world: invented facts, questions about them, and a small model that can barely search.

    python micro/make.py                # rewrites micro/ from seed 0; half an hour on one core
    python micro/make.py --data-only    # corpus and questions only; seconds
    python micro/make.py --check micro/model   # measure a model on the test questions; minutes

The world. Persons, towns, companies and novels, each with five passages. A passage states one fact,
in the corpus's own word for the relation, never the question's: who asks for the mayor of Stupum
Falls has to read "Stupum Falls is warded by Mekik Miller." A search shows three passages. The query
"Stupum Falls mayor" finds any three of the five; with "warded" the right one comes first. So there
is a word to learn for each relation, and a chain of one to three relations to follow. The entities
fall in two parts without a relation between them; half of the test questions are about the held-out
part, which no other question mentions.

The model. A Qwen2 of about a million parameters, warm-started on demonstrations by a scripted and
deliberately clumsy agent. This plays the part that instruction tuning plays for
Qwen2.5-3B-Instruct; neither GRPO nor OFSD ever sees a demonstration. All demonstrations are about
OTHER worlds, drawn afresh: other facts, and the words dealt anew to the relations. So the model
learns to search with a word and to read what it finds, but it can know no fact of the world it is
tested on. Of the words it has the agent's habits, which are right there more often than chance.

Some demonstrations stand under OFSD's privileged prompt, and the agent uses the words that the
reference shows. If that solves this very question, the agent takes the straight road. If it solves
another, it helps only with relations that both share, and the agent is as clumsy as ever. So the
model has to read the reference, and not only notice that there is one.
"""

import json
import random
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tokenizers import pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from eval import evaluate, load_questions, rewards_of, score  # noqa: E402
from ofsd import PRIVILEGED, mine_pairs, privileged_prompt  # noqa: E402
from retriever import BM25, BadInput, Parser, Passage, load_corpus, run_script  # noqa: E402
from rollout import TAGS, Trajectory, chat_ids, encode, load_model, observation_ids  # noqa: E402
from rollout import parse_turn, rollout, save_model, standard_prompt  # noqa: E402

# ---------------------------------------------------------------- the world

COUNTS = {"person": 240, "town": 120, "company": 120, "novel": 120}  # entities of a world
SUFFIXES = {
    "person": "Weaver Mason Carter Fisher Baker Cooper Miller Sawyer Potter Turner Glover Archer",
    "town": "Falls Harbor Bridge Hill Ford Cross Field Haven",
    "company": "Works Mills Foundry Press Motors Labs Trust Lines",
    "novel": "Letters Diaries Garden Winter Secret Journey Song Shadow",
}
# The corpus's words. Each fits any relation of its kind, as in "{name} is guided by {value}."
WORDS = {
    "person": "guided shaped claimed inspired sheltered",
    "town": "helmed warded nourished celebrated mirrored",
    "company": "steered backed anchored rivaled fueled",
    "novel": "adorned framed haunted carried echoed",
}
# The questions' words, as nouns and as clauses. A clause begins with the kind that it leads to.
RELATIONS = {
    "person": "birthplace residence teacher employer debut",
    "town": "mayor architect patron port legend",
    "company": "founder director seat supplier creditor",
    "novel": "author hero setting publisher sequel",
}
CLAUSES = {
    "birthplace": "town that bore {}", "residence": "town that houses {}",
    "teacher": "person who taught {}", "employer": "company that employs {}",
    "debut": "novel first written by {}", "mayor": "person who governs {}",
    "architect": "person who planned {}", "patron": "company that funds {}",
    "port": "town that ships for {}", "legend": "novel that praises {}",
    "founder": "person who founded {}", "director": "person who runs {}",
    "seat": "town that hosts {}", "supplier": "company that delivers to {}",
    "creditor": "company that lends to {}", "author": "person who wrote {}",
    "hero": "person who acts in {}", "setting": "town described in {}",
    "publisher": "company that printed {}", "sequel": "novel that continues {}",
}  # fmt: skip
LEADS_TO = {relation: clause.split()[0] for relation, clause in CLAUSES.items()}
OPENINGS = "Who or what is {}?", "Name {}.", "Tell me {}.", "I want to know {}."
# Questions of each set, and the parts they are about. A set has a random state of its own, and it
# repeats no question of those above it: so a new one at the end changes no other.
SETS = {
    "train": (1080, [0]), "validation": (270, [0]), "test": (540, [0, 1]),
    "evidence-validation": (360, [0]), "evidence-test": (540, [0, 1]),
    "evidence-test-2": (540, [0, 1]),
}  # fmt: skip


def name_pools(rng: random.Random) -> dict[str, list[str]]:
    """For each kind the first words of its names: invented, of two syllables, all different. Each
    begins the names of about five entities, so half a name finds strangers."""
    onsets = "b d f g h j k l m n p r s t v z br dr gr kr tr st".split()
    every = ["".join(x) for x in product(onsets, "aeiou", onsets[:16], "aeiou", "lnrsmk")]
    drawn = iter(rng.sample(every, sum(COUNTS.values()) // 5))
    return {kind: [next(drawn).title() for _ in range(n // 5)] for kind, n in COUNTS.items()}


class World:
    """kind[name]; part[name], 0 or 1; words[relation], the corpus's; facts[name][relation], a name;
    corpus, the passages, and their index; asked, what the sets of questions asked so far."""

    def __init__(self, rng: random.Random, pools: dict, held_out: float = 0.0, avoid=frozenset()):
        self.kind, self.part, self.words, self.asked = {}, {}, {}, set()
        members = defaultdict(list)  # the names of each kind and part
        for kind, count in COUNTS.items():
            names = [f"{first} {last}" for first in pools[kind] for last in SUFFIXES[kind].split()]
            for i, name in enumerate(rng.sample([n for n in names if n not in avoid], count)):
                self.kind[name], self.part[name] = kind, int(i < held_out * count)
                members[kind, self.part[name]].append(name)
        for kind, relations in RELATIONS.items():  # each is dealt a word of its kind
            self.words |= zip(relations.split(), rng.sample(WORDS[kind].split(), 5))
        self.facts, stated = {name: {} for name in self.kind}, []
        for name, kind in self.kind.items():
            for relation in RELATIONS[kind].split():
                others = members[LEADS_TO[relation], self.part[name]]
                value = rng.choice([other for other in others if other != name])
                self.facts[name][relation] = value
                stated.append((name, f"{name} is {self.words[relation]} by {value}."))
        rng.shuffle(stated)  # which three of its five passages a name finds is chance
        self.corpus = [Passage(f"p{i}", *passage) for i, passage in enumerate(stated)]
        self.index = BM25(self.corpus)

    def question(self, rng: random.Random, hops: int, part: int = 0) -> dict:
        """A random question, its answer, its relations, the corpus's words for them, their path."""
        path: list[str] = []
        while len({*path}) <= hops:  # a chain that runs in a circle is drawn again
            path, chain = [rng.choice([name for name, its in self.part.items() if its == part])], []
            for _ in range(hops):
                chain.append(rng.choice(list(self.facts[path[-1]])))
                path.append(self.facts[path[-1]][chain[-1]])
        as_clause, asked = rng.choice([False, True]), path[0]
        for relation in chain:
            asked = "the " + (CLAUSES[relation] if as_clause else relation + " of {}").format(asked)
        return {
            "question": rng.choice(OPENINGS).format(asked), "golden_answers": [path[-1]],
            "hops": hops, "chain": chain, "words": [self.words[relation] for relation in chain],
            "path": path,
        }  # fmt: skip


def draw_questions(world: World, name: str, seed: int) -> list[dict]:
    """The rows of the set of that name, with parts and hops in equal shares."""
    rng, rows, (count, parts) = random.Random(f"{seed}, {name}"), [], SETS[name]
    for part, hops in product(parts, (1, 2, 3)):
        wanted = len(rows) + count // len(parts) // 3
        while len(rows) < wanted:
            made = world.question(rng, hops, part)
            if (key := (made["path"][0], *made["chain"])) not in world.asked:
                world.asked.add(key)
                rows.append({**made, "held_out": bool(part)})
    rng.shuffle(rows)
    return [{"id": f"{name}-{i}", **row} for i, row in enumerate(rows)]


# ---------------------------------------------------------------- the clumsy agent

# The agent's words. It has a favourite for each relation, with the probability FAVOURITE. The word
# that is right in the world the model is for has RIGHT; what is left goes to all five alike. For
# LUCKY relations of a kind the favourite is the right word: .76 in all, and .36 for the others.
FAVOURITE, RIGHT, LUCKY = 0.4, 0.3, 3
# Its other habits. It takes what it has found for the answer although the question goes on; and at
# the end of the road it searches for the answer before it gives it. Both depend on the kind of what
# was found, so that some wear off sooner than others.
EARLY = dict(person=0.1, town=0.35, company=0.15, novel=0.25)
VERIFY = dict(person=0.5, town=0.2, company=0.4, novel=0.3)
AGAIN = 0.3  # It makes a search again. This teaches the model early to copy a query's word.
SLIP = 0.05  # It overlooks a word that a reference shows.
MAX_SEARCHES, K, PRIVILEGED_TOKENS = 4, 3, 224  # as in train.py's defaults


def habitual_words(rng: random.Random, words: dict[str, str]) -> dict[str, dict[str, float]]:
    """The agent's odds of each word, by relation. words: of the world that the model is for."""
    odds = {}
    for kind in RELATIONS:
        relations, choices = rng.sample(RELATIONS[kind].split(), 5), WORDS[kind].split()
        lucky, others = relations[:LUCKY], relations[LUCKY:]
        for relation, liked in zip(relations, lucky + others[-1:] + others[:-1]):
            odds[relation] = dict.fromkeys(choices, (1 - FAVOURITE - RIGHT) / len(choices))
            odds[relation][words[liked]] += FAVOURITE  # its own word, or another relation's
            odds[relation][words[relation]] += RIGHT
    return odds


def demonstrate(rng, world: World, question: dict, odds: dict, *, clumsy: bool, shown=None) -> list:
    """One scripted trajectory: texts that the agent writes and lists of passages that it is shown,
    in turn. shown: the words that a reference shows. The agent believes the first passage of a
    search, whether its word was right or not. Where it is not clumsy, SLIP is its only bad habit.

    The thoughts of going on (I need), of checking (Let me) and of answering (The answer) begin with
    words of their own: where two begin alike, to unlearn the one may be to unlearn the other."""
    steps: list = []  # two a search

    def search(thought: str, query: str) -> list[Passage]:
        found = world.index.search([query], K)[0]
        steps.extend([f"<think> {thought}</think>\n<search> {query}</search>", found])
        return found

    entity, learned, to_go = question["path"][0], "", len(question["chain"])
    for relation in question["chain"]:
        word = rng.choices(list(odds[relation]), odds[relation].values())[0]
        if rng.random() > SLIP:
            word = (shown or {}).get(relation, word)
        query, to_go = f"{entity} {relation} {word}", to_go - 1
        found = search(f"{learned}I need to read about {entity}.", query)
        if clumsy and len(steps) // 2 + to_go < MAX_SEARCHES and rng.random() < AGAIN:
            search("Let me search again.", query)
        entity = found[0].text.split(" by ")[1].rstrip(".")
        learned, kind = f"It is {entity}. ", LEADS_TO[relation]
        if clumsy and to_go and rng.random() < EARLY[kind]:
            break
    if clumsy and not to_go and len(steps) // 2 < MAX_SEARCHES and rng.random() < VERIFY[kind]:
        search(f"{learned}Let me check.", entity)
        learned = ""
    steps.append(f"<think> {learned}The answer is {entity}.</think>\n<answer> {entity}</answer>")
    return steps


def as_trajectory(tokenizer, steps: list, question: str, prompt_ids, budget=512) -> Trajectory:
    """A demonstration in the form that rollouts have. budget: tokens of an observation."""
    trajectory = Trajectory(question, prompt_ids)
    for step in steps:
        if isinstance(step, str):
            trajectory.extend(ids := encode(tokenizer, step), [0.0] * len(ids))
        else:
            trajectory.extend(observation_ids(tokenizer, step, budget))
            trajectory.passages.append(step)
    return trajectory


# ---------------------------------------------------------------- tokenizer and model


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with merges learned from these texts until every word of theirs is
    one token; ChatML like Qwen's, the tags as added tokens, and a prompt that is the question."""
    bpe = Qwen2Tokenizer()._tokenizer  # with its normaliser and pre-tokeniser, and no word yet
    start = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=start, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
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


class Phase(NamedTuple):
    count: int  # demonstrations
    privileged: float  # the share of them under the privileged prompt
    own: float  # the share of those where the reference is of this very question
    short: bool  # the reference is its queries and its answer, without thoughts and passages
    observations: float  # the weight of what the environment wrote
    lr: float  # the learning rate, and
    last: float  # what is left of it at the end


# The warm start. Copying comes first. Then short references teach to take a word from a reference:
# from whole ones alone that was not learned in 20,000 demonstrations. Nor was it from 6,000 short
# ones after a first phase without any, by an agent that never made a search again.
PHASES = (
    Phase(6_000, privileged=0.4, own=1.0, short=True, observations=0.2, lr=2e-3, last=0.5),
    Phase(3_600, privileged=1.0, own=1.0, short=True, observations=0.0, lr=2e-3, last=0.5),
    Phase(9_000, privileged=0.7, own=0.75, short=False, observations=0.0, lr=1.5e-3, last=0.5),
    Phase(9_000, privileged=0.6, own=0.75, short=False, observations=0.0, lr=7.5e-4, last=0.01),
)


def demonstrations(rng, tokenizer, pools, avoid, odds, phase: Phase):
    """Yield a phase's Trajectories, 400 from each fresh world, in which no entity has a name to
    avoid. odds: the agent's words by habit."""
    for i in tqdm(range(phase.count), desc="demonstrations", disable=None):
        if i % 400 == 0:
            world, previous = World(rng, pools, avoid=avoid), None
        question = world.question(rng, rng.choices([1, 2, 3])[0])
        asked, words = question["question"], dict(zip(question["chain"], question["words"]))
        prompt = chat_ids(tokenizer, standard_prompt(tokenizer, asked))
        steps = demonstrate(rng, world, question, odds, clumsy=True)
        if rng.random() < phase.privileged:
            # A reference is clumsy, too, but its answer is right.
            while not steps[-1].endswith(f"<answer> {question['golden_answers'][0]}</answer>"):
                steps = demonstrate(rng, world, question, odds, clumsy=True, shown=words)
            if phase.short:
                said = map(parse_turn, steps[::2])
                steps = ["\n".join(f"<{kind}> {content}</{kind}>" for kind, content in said)]
            reference = as_trajectory(tokenizer, steps, asked, prompt), words
            own = previous is None or rng.random() < phase.own
            read, shown = reference if own else previous
            steps = demonstrate(rng, world, question, odds, clumsy=not own, shown=shown)
            prompt = privileged_prompt(tokenizer, asked, read, PRIVILEGED_TOKENS)
            previous = reference
        yield as_trajectory(tokenizer, steps, asked, prompt)


def warm_start(model, demos, rng, phase: Phase, batch: int = 12) -> None:
    """Supervised training: cross-entropy on the agent's tokens, and on the environment's at a small
    weight (a title recurs in its passage: it teaches copying). The learning rate falls linearly."""
    # Batches of similar length, in random order: little padding.
    demos = sorted(demos, key=lambda demo: len(demo.prompt_ids) + len(demo.response_ids))
    batches = [demos[i : i + batch] for i in range(0, len(demos), batch)]
    rng.shuffle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    warm = min(100, len(batches) // 10 + 1)
    bar = tqdm(batches, desc="warm start", disable=None)
    for step, picked in enumerate(bar):
        share = min((step + 1) / warm, 1 - (1 - phase.last) * step / len(batches))
        optimizer.param_groups[0]["lr"] = phase.lr * share
        # Padded on the right only: a causal model never looks there, so no mask is needed.
        ids = [torch.tensor(demo.prompt_ids + demo.response_ids) for demo in picked]
        ids = pad_sequence(ids, batch_first=True)  # (B, S)
        masks = [torch.tensor(demo.loss_mask).clamp(min=phase.observations) for demo in picked]
        masks = [pad(mask, (len(demo.prompt_ids) - 1, 0)) for mask, demo in zip(masks, picked)]
        weights = pad_sequence(masks, batch_first=True)  # (B, S - 1)
        learned = weights > 0  # (B, S - 1), N of them
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False)[0]  # (B, S - 1, H)
        logits, weights = model.lm_head(hidden[learned]), weights[learned]  # (N, V), (N,)
        losses = cross_entropy(logits, ids[:, 1:][learned], reduction="none")  # (N,)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.write(f"batch {step:5d} of {len(batches)}  loss {loss.item():.3f}")


def write_jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check(name: str, folder: Path, asked: str) -> dict:
    """What a policy for this world has to show, on the questions asked: EM, greedily, sampled, and
    where nothing is found; then EM on those of which a group of five gave a pair, by the reference
    in the prompt: none (standard), this question's own, another's, and another's that shares no
    relation with it. Raises BadInput where the pairs are too few."""
    model, tokenizer = load_model(name)
    index, questions = BM25(load_corpus(folder / "corpus.jsonl")), load_questions(asked)
    greedy = evaluate(model, tokenizer, index, questions, progress="greedy")
    texts = [question["question"] for question in questions]
    pool = rollout(model, tokenizer, index, texts, group_size=5, progress="sampled")
    rewards = rewards_of(questions, pool)
    pairs, counts = mine_pairs(model, tokenizer, questions, pool, rewards, PRIVILEGED_TOKENS)
    pool = score([question for question in questions for _ in range(5)], pool)
    another, stranger = [], []  # for each pair one whose reference it is shown
    for pair in pairs:
        others = [other for other in random.sample(pairs, len(pairs)) if other is not pair]
        chain = {*pair.question["chain"]}
        another += others[:1]
        stranger += [other for other in others if not chain & {*other.question["chain"]}][:1]
    if not pairs or len(stranger) < len(pairs):
        raise BadInput(f"{asked}: too few of its questions gave a pair to compare references")

    def sampled(shown: list = ()) -> dict:
        """Of three samples a pair, fresh ones, since the old ones chose the pairs."""
        texts = [pair.question["question"] for pair in pairs]
        both = zip(texts, (pair.reference for pair in shown))
        prompts = [privileged_prompt(tokenizer, *x, PRIVILEGED_TOKENS) for x in both] or None
        found = rollout(model, tokenizer, index, texts, group_size=3, prompts=prompts)
        row = score([pair.question for pair in pairs for _ in range(3)], found)
        return {key: row[key] for key in ("em", "em_supported", "searches", "em_by")}

    nothing = SimpleNamespace(search=lambda queries, k: [[] for _ in queries])
    return {
        "greedy": greedy["em"], "greedy_by": greedy["em_by"], "greedy_searches": greedy["searches"],
        "sampled": pool["em"], "sampled_by": pool["em_by"], "searches": pool["searches"], **counts,
        "standard": sampled(), "own_reference": sampled(pairs),
        "anothers_reference": sampled(another), "anothers_sharing_no_relation": sampled(stranger),
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
    world = World(rng, pools, held_out=1 / 3)
    corpus = [{"id": p.id, "title": p.title, "text": p.text} for p in world.corpus]
    write_jsonl(args.out / "corpus.jsonl", corpus)
    for name in SETS:
        write_jsonl(args.out / f"{name}.jsonl", draw_questions(world, name, args.seed))
    if args.data_only:
        return
    odds = habitual_words(rng, world.words)
    texts = ["user\nassistant\n" + PRIVILEGED + " nothing was found is by"]
    texts += [f" {' '.join(pools[kind])} {SUFFIXES[kind]} {WORDS[kind]}" for kind in COUNTS]
    for question in (world.question(rng, 3) for _ in range(600)):
        texts += [question["question"], *demonstrate(rng, world, question, odds, clumsy=True)[::2]]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens in the vocabulary, {model.num_parameters():,} parameters")
    held = frozenset(name for name, part in world.part.items() if part)
    for number, phase in enumerate(PHASES):
        rng = random.Random(f"{args.seed}, phase {number}")  # so a phase can be repeated alone
        warm_start(model, demonstrations(rng, tokenizer, pools, held, odds, phase), rng, phase)
    save_model(model, tokenizer, args.out / "model")


if __name__ == "__main__":
    run_script(main)
