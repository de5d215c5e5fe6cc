"""The micro world: invented facts, questions about them, and a small model that can just about search.

    python micro/make.py              # rewrites everything in micro/ from seed 0; about 25 minutes on 2 cores
    python micro/make.py --data-only  # corpus and questions only; seconds
    python micro/make.py --check micro/model  # measure a model on the test questions; a minute

The world. Persons, towns, companies and novels, about a thousand, each with a passage of one
sentence that names its relations to others. A name is an invented word and one for its kind
(Kegon Sawyer, Vazik Bridge); words are shared, so half a name finds strangers. A question
asks for the end of a chain of 1 to 3 relations. The entities fall in two parts without a
relation between them; half of the test questions are about the held-out part, which no
training, validation or warm-start question mentions.

The model. A Qwen2 of about a million parameters, warm-started on demonstrations by a scripted
and deliberately clumsy agent. This plays the part that instruction tuning plays for
Qwen2.5-3B-Instruct; neither GRPO nor OFSD ever sees a demonstration. All demonstrations are
about OTHER worlds, drawn afresh with other facts: the model learns how to search and copy,
and cannot know a single fact of the world it is tested on.

More than half of the demonstrations stand under the standard prompt and are clumsy. The others stand
under OFSD's privileged prompt: with a reference that solves this very question (four in
five) the response is efficient; with one of another question it is as clumsy as ever, so that
the model has to read the reference and not only notice that there is one.
"""

import json
import random
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from eval import evaluate, load_questions, rewards_of, teacher_edge  # noqa: E402
from ofsd import PRIVILEGED, mine_pairs, privileged_prompt  # noqa: E402
from retriever import BM25, Parser, Passage, load_corpus, run_script  # noqa: E402
from rollout import (  # noqa: E402
    TAGS, Trajectory, chat_ids, encode, load_model, observation_ids, rollout, standard_prompt,
)  # fmt: skip
from train import Config  # noqa: E402

# ---------------------------------------------------------------- the world

COUNTS = {"person": 470, "town": 150, "company": 180, "novel": 210}  # entities of a world
HELD_OUT = 1 / 3  # the part that only test questions ask about
SUFFIXES = {
    "person": "Weaver Mason Carter Fisher Baker Cooper Miller Sawyer Potter Turner Glover Archer".split(),
    "town": "Falls Harbor Bridge Hill Ford Cross Field Haven".split(),
    "company": "Works Mills Foundry Press Motors Labs Trust Lines".split(),
    "novel": "Letters Diaries Garden Winter Secret Journey Song Shadow".split(),
}
# relation: (of what, to what, as a noun, as a clause, possessive)
RELATIONS = {
    "spouse": ("person", "person", "spouse of {}", "person married to {}"),
    "birthplace": ("person", "town", "birthplace of {}", "town where {} was born"),
    "employer": ("person", "company", "employer of {}", "company that employs {}"),
    "founder": ("company", "person", "founder of {}", "person who founded {}"),
    "seat": ("company", "town", "seat of {}", "town that hosts {}"),
    "author": ("novel", "person", "author of {}", "person who wrote {}"),
    "setting": ("novel", "town", "setting of {}", "town described in {}"),
    "mayor": ("town", "person", "mayor of {}", "person who governs {}"),
}
SENTENCES = {
    "person": "{name} was born in {birthplace}, married {spouse} and works for {employer}.",
    "company": "{name} was founded by {founder} and has its seat in {seat}.",
    "novel": "{name} is a novel by {author} set in {setting}.",
    "town": "{name} is a town and its mayor is {mayor}.",
}
OPENINGS = ("Who or what is the {}?", "Name the {}.", "Tell me the {}.", "I want to know the {}.")


def name_pools(rng: random.Random) -> dict[str, list[str]]:
    """Invented words, two syllables each, all different: the first word of a name, for each kind."""
    onsets, vowels, ends = "b d f g h j k l m n p r s t v z br dr gr kr tr st".split(), "aeiou", "l n r s m k".split()
    seen: dict[str, None] = {}
    while len(seen) < sum(COUNTS.values()) // 5:  # so each word begins the names of about five
        name = rng.choice(onsets) + rng.choice(vowels) + rng.choice(onsets[:16]) + rng.choice(vowels) + rng.choice(ends)
        seen[name.capitalize()] = None
    invented = iter(seen)
    return {kind: [next(invented) for _ in range(count // 5)] for kind, count in COUNTS.items()}


class World:
    """facts[name][relation] -> name; kind[name]; the passages; part 0 or 1 of each name."""

    def __init__(self, rng: random.Random, pools: dict[str, list[str]], held_out: float = 0.0, avoid=frozenset()):
        self.kind: dict[str, str] = {}
        self.part: dict[str, int] = {}
        self.facts: dict[str, dict[str, str]] = {}
        members: dict[tuple[str, int], list[str]] = {}
        for kind, count in COUNTS.items():
            while sum(k == kind for k in self.kind.values()) < count:
                name = f"{rng.choice(pools[kind])} {rng.choice(SUFFIXES[kind])}"
                if name not in self.kind and name not in avoid:
                    self.kind[name] = kind
                    self.part[name] = int(len(members.get((kind, 1), [])) < held_out * count)
                    members.setdefault((kind, self.part[name]), []).append(name)
        for name, kind in self.kind.items():
            self.facts[name] = {
                relation: rng.choice([other for other in members[to, self.part[name]] if other != name])
                for relation, (of, to, *_) in RELATIONS.items()
                if of == kind
            }
        for (kind, _), names in members.items():
            if kind == "person":  # marriage goes both ways
                for one, two in zip(names[::2], names[1::2]):
                    self.facts[one]["spouse"], self.facts[two]["spouse"] = two, one
        order = sorted(self.kind, key=lambda name: rng.random())
        self.corpus = [
            Passage(f"p{i}", name, SENTENCES[self.kind[name]].format(name=name, **self.facts[name]))
            for i, name in enumerate(order)
        ]
        self.index = BM25(self.corpus)

    def question(self, rng: random.Random, hops: int, part: int = 0) -> dict | None:
        """A random question: {"question", "golden_answers", "hops", "chain", "path"}; None when
        the chain drawn runs in a circle."""
        path, chain = [rng.choice([name for name in self.kind if self.part[name] == part])], []
        for _ in range(hops):
            chain.append(rng.choice(list(self.facts[path[-1]])))
            path.append(self.facts[path[-1]][chain[-1]])
        if len(set(path)) < len(path):
            return None
        style = rng.choice(["noun", "clause", "possessive"])
        if style == "possessive":
            asked = f"Who or what is {path[0]}" + "".join(f"'s {relation}" for relation in chain) + "?"
        else:
            phrase = path[0]
            for relation in chain:
                phrase = RELATIONS[relation][2 + (style == "clause")].format(phrase if phrase is path[0] else f"the {phrase}")
            asked = rng.choice(OPENINGS).format(phrase)
        return {"question": asked, "golden_answers": [path[-1]], "hops": hops, "chain": chain, "path": path}


# ---------------------------------------------------------------- the clumsy agent

# Probabilities of the agent's bad habits. The first query is the whole question, or half a name;
# a search is made again; a passage about a stranger is taken for the right one; a value is misread.
HABITS = dict(whole=0.35, partial=0.12, again=0.12, stranger=0.4, misread=0.04)
# Two more are stronger after some relations than after others, so that some wear off with a
# little practice and some hardly ever: what was just found is taken for the answer although the
# question goes on; and, at the end of the road, the answer is searched for before it is given.
EARLY = dict(spouse=0.9, birthplace=0.25, employer=0.65, founder=0.35, seat=0.2, author=0.4, setting=0.85, mayor=0.35)
VERIFY = dict(spouse=0.3, birthplace=0.8, employer=0.4, founder=0.7, seat=0.75, author=0.3, setting=0.6, mayor=0.7)
MAX_SEARCHES, K, PRIVILEGED_TOKENS = 4, 3, 224  # as in train.py's defaults
# The warm start, in phases: demonstrations, the share of them under the privileged prompt, the
# learning rate, and what is left of it at the end. Searching and copying come first; reading a
# reference takes most of the demonstrations.
PHASES = ((12_000, 0.0, 2e-3, 0.8), (36_000, 0.6, 2e-3, 0.01))


def demonstrate(rng: random.Random, world: World, question: dict, clumsy: bool) -> list:
    """One scripted trajectory: texts the agent writes and lists of passages it is shown, in
    turn. Without its bad habits it takes the straight road to the answer.

    The thoughts of going on (I need), of checking (Let me) and of answering (The answer) begin with
    words of their own: where two begin alike, to unlearn the one may be to unlearn the other."""
    steps: list = []
    searches = 0

    def search(thought: str, query: str) -> list[str]:
        nonlocal searches
        searches += 1
        found = world.index.search([query], K)[0]
        steps.extend([f"<think> {thought}</think>\n<search> {query}</search>", found])
        return [passage.title for passage in found]

    def answer(thought: str, name: str) -> list:
        steps.append(f"<think> {thought}</think>\n<answer> {name}</answer>")
        return steps

    def chance(probability: float) -> bool:
        return clumsy and rng.random() < probability

    entity, learned = question["path"][0], ""
    for hop, relation in enumerate(question["chain"]):
        thought = f"{learned}I need the {relation} of {entity}."
        if hop == 0 and chance(HABITS["whole"]):
            titles = search(thought, question["question"])
        else:
            titles = search(thought, entity.split()[0] if chance(HABITS["partial"]) else entity)
        if searches < MAX_SEARCHES and chance(HABITS["again"]):
            titles = search("Let me search again.", entity)
        if entity not in titles and searches < MAX_SEARCHES and not chance(HABITS["stranger"]):
            titles = search(f"I did not find {entity}.", entity)
        if entity not in titles or relation not in world.facts[entity]:  # takes a stranger's passage
            likely = [title for title in titles if relation in world.facts[title]]
            if not likely:
                return answer(f"I did not find {entity}.", entity)
            entity = likely[0]
        value = world.facts[entity][relation]
        if chance(HABITS["misread"]):
            value = rng.choice([*world.facts[entity].values(), *world.facts[rng.choice(titles)].values()])
        learned = f"The {relation} of {entity} is {value}. "
        entity = value
        last = hop + 1 == len(question["chain"])
        if last or searches == MAX_SEARCHES or chance(EARLY[relation]):
            break
    if last and searches < MAX_SEARCHES and chance(VERIFY[relation]):
        search(f"{learned}Let me check.", entity)
        learned = ""
    return answer(f"{learned}The answer is {entity}.", entity)


def as_trajectory(
    tokenizer, steps: list, question: str, prompt_ids: list[int], budget: int = 512
) -> Trajectory:
    """A demonstration in the form that rollouts have. budget: tokens of an observation."""
    trajectory = Trajectory(question, prompt_ids)
    for step in steps:
        if isinstance(step, str):
            ids = encode(tokenizer, step)
            trajectory.extend(ids, [0.0] * len(ids))
        else:
            trajectory.extend(observation_ids(tokenizer, step, budget))
            trajectory.passages.append(step)
    return trajectory


# ---------------------------------------------------------------- tokenizer and model


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with merges learned from these texts until every word of theirs is
    one token; ChatML like Qwen's, the tags as added tokens, and a prompt that is just the question."""
    bpe = Qwen2Tokenizer()._tokenizer  # for its normaliser and pre-tokeniser
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = bpe.normalizer, bpe.pre_tokenizer
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", search_prompt="{question}", model_max_length=1024,
    )  # fmt: skip
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def make_model(tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=512, max_position_embeddings=1024, tie_word_embeddings=True,
        # Qwen's 0.02 and 1e6 are for wide models and long texts: with them this one learns to copy much later.
        initializer_range=0.06, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def demonstrations(
    rng: random.Random, tokenizer, pools, avoid, count: int, privileged: float, a_world: int = 800
) -> list[Trajectory]:
    """Demonstrations in fresh worlds; privileged: the share that stands under the privileged prompt."""
    made: list[Trajectory] = []
    with tqdm(total=count, desc="demonstrations", disable=None) as bar:
        while len(made) < count:
            if len(made) % a_world == 0:
                world, previous = World(rng, pools, avoid=avoid), None
            question = world.question(rng, rng.choices([1, 2, 3], [2, 3, 4])[0])
            if question is None:
                continue
            asked = question["question"]
            prompt = chat_ids(tokenizer, standard_prompt(tokenizer, asked))
            steps = demonstrate(rng, world, question, clumsy=True)
            if rng.random() < privileged:  # a correct reference of the same question four times in five
                for _ in range(50):
                    if question["golden_answers"][0] in steps[-1].split("<answer>")[1]:
                        break
                    steps = demonstrate(rng, world, question, clumsy=True)
                reference = as_trajectory(tokenizer, steps, asked, prompt)
                own = rng.random() < 0.8 or previous is None
                steps = demonstrate(rng, world, question, clumsy=not own)
                prompt = privileged_prompt(tokenizer, asked, reference if own else previous, PRIVILEGED_TOKENS)
                previous = reference
            made.append(as_trajectory(tokenizer, steps, asked, prompt))
            bar.update()
    return made


def padded_logits(model, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """The logits that predict each response token, in one forward pass without a cache:
    (B, T, V), T = the longest response. What stands after a shorter response means nothing.

    Rows are padded on the right only: a causal model never looks there, so no mask is needed.
    """
    device, starts = model.device, torch.tensor([len(prompt) for prompt in prompts])
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    ids = pad_sequence(rows, batch_first=True).to(device)  # (B, S)
    first = int(starts.min()) - 1  # the position that predicts the earliest response token
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first)
    size = max(len(response) for response in responses)
    # Response token t of row b is predicted at position starts[b] + t - 1.
    columns = (starts[:, None] - 1 - first + torch.arange(size)).clamp(max=output.logits.shape[1] - 1)  # (B, T)
    return output.logits[torch.arange(len(rows))[:, None], columns.to(device)].float()  # (B, T, V)


def warm_start(model, demos: list[Trajectory], rng: random.Random, *, lr: float, last: float,
               batch: int = 12, observation_weight: float = 0.2) -> None:  # fmt: skip
    """Supervised training on demonstrations: cross-entropy on every response token, the
    observation's at a small weight (titles repeat inside passages: it teaches copying). The
    learning rate falls linearly from lr to last * lr."""
    # Batches of similar length, in random order: little padding.
    order = sorted(range(len(demos)), key=lambda i: len(demos[i].prompt_ids) + len(demos[i].response_ids))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    rng.shuffle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = min(100, len(batches) // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - (1 - last) * step / len(batches))
    )
    model.train()
    with tqdm(batches, desc="warm start", disable=None) as bar:
        for step, chosen in enumerate(bar):
            picked = [demos[i] for i in chosen]
            logits = padded_logits(model, [d.prompt_ids for d in picked], [d.response_ids for d in picked])
            targets, weights = torch.zeros(logits.shape[:2], dtype=torch.long), torch.zeros(logits.shape[:2])
            for row, demo in enumerate(picked):
                targets[row, : len(demo.response_ids)] = torch.tensor(demo.response_ids)
                weights[row, : len(demo.loss_mask)] = torch.tensor(demo.loss_mask).clamp(min=observation_weight)
            targets, weights = targets.to(logits.device), weights.to(logits.device)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (B * T,)
            losses = losses.view_as(targets)  # (B, T)
            loss = (losses * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                policy = ((losses * (weights == 1)).sum() / (weights == 1).sum()).item()
                bar.write(f"batch {step:5d} of {len(batches)}  loss {loss.item():.3f}  on the agent's tokens {policy:.3f}")
    model.eval()


def write_jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def check(name: str) -> dict:
    """What a policy for this world has to show, on the test questions: greedy and sampled EM, EM
    where the retriever finds nothing, and, on the questions of which a sampled group of five gave
    a pair, sampled EM with the reference in the prompt (teacher) and without (student)."""
    model, tokenizer = load_model(name)
    index, questions = BM25(load_corpus(HERE / "corpus.jsonl")), load_questions(str(HERE / "test.jsonl"))
    set_seed(0)

    def sample(questions: list[dict], **how) -> list[Trajectory]:
        return rollout(model, tokenizer, index, [q["question"] for q in questions], **how)

    run = SimpleNamespace(config=Config(), model=model, tokenizer=tokenizer, sample=sample)
    greedy = evaluate(model, tokenizer, index, questions, progress="greedy")
    pool = sample(questions, group_size=run.config.group_size, progress="sampled")
    sampled = rewards_of(questions, pool)
    pairs, counts = mine_pairs(model, tokenizer, questions, pool, sampled, run.config.max_privileged_tokens)
    nothing = SimpleNamespace(search=lambda queries, k: [[] for _ in queries])
    return {
        "greedy": greedy["em"], "sampled": sum(sampled) / len(sampled), **counts,
        **(teacher_edge(run, pairs) if pairs else {}),
        "nothing_found": evaluate(model, tokenizer, nothing, questions)["em"],
    }  # fmt: skip


def main() -> None:
    parser = Parser(description="Build the micro world and its model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-only", action="store_true", help="leave the model alone")
    parser.add_argument("--out", default=str(HERE), help="folder to write to")
    parser.add_argument("--check", metavar="MODEL", help="build nothing; measure this model on the test questions")
    args = parser.parse_args()
    out = Path(args.out)
    if args.check:
        print(json.dumps(check(args.check), indent=2))
        return
    out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    rng = random.Random(args.seed)
    pools = name_pools(rng)
    world = World(rng, pools, held_out=HELD_OUT)
    write_jsonl(out / "corpus.jsonl", ({"id": p.id, "title": p.title, "text": p.text} for p in world.corpus))

    seen_texts, asked_chains = set(), set()

    def questions(
        rng: random.Random, name: str, count: int, parts: list[int], shares: dict[int, int], goes_on: float = 1.0
    ) -> list[str]:
        """Write a set in which hops stand in these shares; no text and no chain occurs twice, in any set.
        goes_on: at most so likely is the clumsy agent not to stop early."""
        rows = []
        for part in parts:
            for hops, share in shares.items():
                wanted = len(rows) + round(count / len(parts) * share / sum(shares.values()))
                while len(rows) < wanted:
                    made = world.question(rng, hops, part)
                    if made and prod(1 - EARLY[relation] for relation in made["chain"][:-1]) > goes_on:
                        continue
                    if made and made["question"] not in seen_texts and (key := (made["path"][0], *made["chain"])) not in asked_chains:
                        seen_texts.add(made["question"])
                        asked_chains.add(key)
                        rows.append({**made, "held_out": bool(part)})
        rng.shuffle(rows)
        write_jsonl(out / f"{name}.jsonl", ({"id": f"{name}-{i}", **row} for i, row in enumerate(rows)))
        return [row["question"] for row in rows]

    all_texts = [passage.text for passage in world.corpus]
    for name, count, parts in (("train", 1080, [0]), ("validation", 270, [0]), ("test", 540, [0, 1])):
        all_texts += questions(rng, name, count, parts, {1: 2, 2: 3, 3: 4})
    # For results/evidence.py: the agent seldom goes on after either of the first two links. They come last,
    # and from random states of their own: the others stay as they were.
    later = [("train", 480, [0]), ("validation", 360, [0])] + [(test, 540, [0, 1]) for test in ("test", "test-2", "test-3")]
    for name, count, parts in ((f"evidence-{name}", *rest) for name, *rest in later):
        questions(random.Random(f"{args.seed}, {name}"), name, count, parts, {3: 1}, goes_on=0.1)
    if args.data_only:
        return

    held = frozenset(name for name, part in world.part.items() if part)
    sample = [demonstrate(rng, world, q, clumsy=True) for q in (world.question(rng, 3) for _ in range(300)) if q]
    all_texts += [step for steps in sample for step in steps if isinstance(step, str)]
    all_texts += [" " + word for word in sum([*pools.values(), *SUFFIXES.values()], [])] + ["user\nassistant\n" + PRIVILEGED + " nothing was found"]
    tokenizer = make_tokenizer(all_texts)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens in the vocabulary, {sum(p.numel() for p in model.parameters()):,} parameters")
    for phase, (count, privileged, lr, last) in enumerate(PHASES):
        rng = random.Random(f"{args.seed}, phase {phase}")  # its own, so that a phase can be repeated alone
        warm_start(model, demonstrations(rng, tokenizer, pools, held, count, privileged), rng, lr=lr, last=last)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


if __name__ == "__main__":
    run_script(main)
