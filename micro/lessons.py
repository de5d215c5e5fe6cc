"""One lesson for each of the six files: what it does, shown on the micro world in a few seconds.

    python retriever.py     how one query is scored, word by word
    python rollout.py       one trajectory, live (--question, --seed, --logprobs)
    python eval.py          a table, and the worst answers
    python grpo.py          one group: rewards, advantages, and what one update does
    python ofsd.py          one pair: both prompts, and the divergence at each token

train.py has none: run without flags it is the whole of Search-E1.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from eval import interval, load_questions, print_results, rewards_of, score
from grpo import frozen_copy, group_advantages, grpo_step, policy_hidden, policy_logprobs
from ofsd import mine_pairs, token_divergences
from retriever import Parser, bm25_score, load_corpus, open_index, printable, run_script, words
from rollout import decode, load_model, rollout
from train import Config

MICRO = Path(__file__).resolve().parent


def start():
    """The micro model, its tokenizer, and the index of its world."""
    model, tokenizer = load_model(str(MICRO / "model"))
    return model, tokenizer, open_index(MICRO / "corpus.jsonl")


def paint(text: str, colour: str) -> str:
    """Text in an ANSI colour, if standard output is a terminal and NO_COLOR is not set."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{colour}m{text}\033[0m"
    return text


def groups(model, tokenizer, index, hops: int):
    """Yield each training question of so many hops, a group of five, and its rewards."""
    for question in load_questions(str(MICRO / "train.jsonl")):
        if question["hops"] == hops:
            group = rollout(model, tokenizer, index, [question["question"]], group_size=5, seed=0)
            yield question, group, rewards_of([question], group)


def searched_with(trajectory) -> list[str]:
    """The last words of its queries, of those that are more than a name."""
    return [query.split()[-1] for query in trajectory.queries if len(query.split()) > 2]


def retriever_lesson() -> None:
    """How a query is scored, word by word: in the question's words, and in the corpus's."""
    corpus = load_corpus(MICRO / "corpus.jsonl")
    index = open_index(MICRO / "corpus.jsonl")
    print(f"{index.size} passages. A word counts more if few of them hold it (idf).")
    for query in ("Who is mayor of Bevor Bridge?", "Bevor Bridge mayor warded"):
        impacts = {word: index.scores(word) for word in words(query)}  # (N,) each
        df = np.array([(scores > 0).sum() for scores in impacts.values()])  # (W,)
        idf = np.log(1 + (index.size - df + 0.5) / (df + 0.5))  # (W,)
        heads = "".join(f"{word:>7}" for word in impacts)
        print(f"\nQuery: {query}\n\n{'':9}{heads}     sum")
        print("passages " + "".join(f"{count:7}" for count in df))
        print("idf      " + "".join(f"{value:7.2f}" for value in idf))
        for passage in index.search([query], 6)[0]:
            cells = "".join(f"{scores[int(passage.id[1:])]:7.3f}" for scores in impacts.values())
            print(f"{passage.id:9}{cells}{passage.score:8.3f}  {passage.text}")
    best, texts = index.search([query], 1)[0][0], [f"{p.title} {p.text}" for p in corpus]
    plain = bm25_score(query, f"{best.title} {best.text}", texts)
    print(f"\nThe plain formula, bm25_score, gives {plain:.3f} for {best.id} in the last query.\n"
          "A policy is shown three. No passage says mayor, so the five of Bevor Bridge are equal.\n"
          "This corpus says warded. Such words are what there is to learn.\n"
          "Your own: python retriever.py --corpus FILE WORDS")  # fmt: skip


def rollout_lesson() -> None:
    """One trajectory of micro/model: who wrote what, and how likely the policy found it."""
    parser = Parser(description="Play one trajectory of micro/model.")
    asked = "Who or what is the birthplace of the mayor of Bevor Bridge?"
    parser.add_argument("--question", default=asked)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logprobs", action="store_true", help="a token a line, with its log pi")
    args = parser.parse_args()
    model, tokenizer, index = start()
    row = rollout(model, tokenizer, index, [args.question], seed=args.seed % 2**32)[0]
    print(f"question: {printable(args.question)}\n")
    print("Sampled by the policy (loss_mask 1), written by the environment (loss_mask 0):\n")
    last = None
    for token, sampled, value in zip(row.response_ids, row.loss_mask, row.logprobs):
        if sampled != last:
            who = "policy> " if sampled else "environment> "
            print(("" if last is None else "\n") + who, end="\n" if args.logprobs else "")
        text = printable(decode(tokenizer, [token]))
        if args.logprobs:
            print(f"    {text!r:24}" + (f"{value:8.3f}" if sampled else "       -"))
        else:
            print(paint(text, "32" if sampled else "34"), end="", flush=True)
        last = sampled
        time.sleep(0.03 if sys.stdout.isatty() else 0)  # as one would read it
    own, count, answer = sum(row.loss_mask), len(row.loss_mask), printable(str(row.answer))
    print(f"\n\n{len(row.queries)} searches; {own} of {count} tokens are the policy's; "
          f"it ended by: {row.finish_reason}; answer: {answer}")  # fmt: skip


def eval_lesson() -> None:
    """micro/model on the first 60 test questions: the table, and where it went wrong."""
    model, tokenizer, index = start()
    questions = load_questions(str(MICRO / "test.jsonl"))[:60]
    asked = [question["question"] for question in questions]
    trajectories = rollout(model, tokenizer, index, asked, temperature=0.0)
    row = score(questions, trajectories)
    print_results({"micro": row})
    print("EM " + ", ".join(f"{kind} {em:.3f}" for kind, em in row["em_by"].items())
          + f"; right and supported by a passage: {row['em_supported']:.3f}")  # fmt: skip
    rewards = rewards_of(questions, trajectories)
    wrong = [i for i, reward in enumerate(rewards) if not reward]
    chosen = [zip(searched_with(trajectories[i]), questions[i]["words"]) for i in wrong]
    strays = sum(any(word != right for word, right in pairs) for pairs in chosen)
    print(f"\n{len(wrong)} are wrong; {strays} of them searched with another relation's word.\n"
          "The worst, by searches spent:\n")  # fmt: skip
    for i in sorted(wrong, key=lambda i: -len(trajectories[i].queries))[:5]:
        said, right = trajectories[i].answer, questions[i]["golden_answers"][0]
        print(printable(f"{asked[i]}\n    searched: {'; '.join(trajectories[i].queries)}\n"
                        f"    said: {said}\n    right: {right}, found with: "
                        + ", then ".join(questions[i]["words"])))  # fmt: skip
    print("\nYour own: python eval.py --help")


def grpo_lesson() -> None:
    """One group of micro/model: rewards, advantages, weights, and one update."""
    Parser(description="One group of micro/model: its advantages, and one update.").parse_args()
    model, tokenizer, index = start()
    sampled = groups(model, tokenizer, index, hops=2)  # a group of equals teaches nothing
    question, group, rewards = next(row for row in sampled if len({*row[2]}) > 1)
    before = log_probabilities(model, group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rewards = torch.tensor([rewards])  # (1, G)
    stats = grpo_step(model, frozen_copy(model), optimizer, group, rewards, Config(micro_batch=5))
    after = log_probabilities(model, group)
    num_tokens = sum(sum(t.loss_mask) for t in group)
    print(f"question: {question['question']}  (answer: {question['golden_answers'][0]})\n")
    print(f"{'answer':17}{'reward':>7}{'advantage':>10}{'tokens':>7}{'weight a token':>16}"
          f"{'log pi':>9}{'after':>9}   words searched with")  # fmt: skip
    advantages = group_advantages(rewards)[0].tolist()
    for t, reward, A, old, new in zip(group, rewards[0], advantages, before, after):
        print(f"{str(t.answer):17}{reward:7.0f}{A:10.3f}{sum(t.loss_mask):7d}{A / num_tokens:16.5f}"
              f"{old:9.3f}{new:9.3f}   {', '.join(searched_with(t))}")  # fmt: skip
    print(f"\nThe loss was {stats['loss']:.1e}: minus the mean advantage of all tokens. Its\n"
          f"gradient had the norm {stats['grad_norm']:.3f}, and one update moved log pi as the\n"
          "two columns say: up for the right ones, down for the wrong ones.")  # fmt: skip


def log_probabilities(model, group) -> list[float]:
    """log pi of each whole trajectory, of the policy's tokens only."""
    values = []
    for t in group:
        ids = [token for token, sampled in zip(t.response_ids, t.loss_mask) if sampled]
        logprobs = policy_logprobs(model, policy_hidden(model, [t]), torch.tensor(ids))
        values.append(logprobs.sum().item())
    return values


def ofsd_lesson() -> None:
    """One pair of micro/model: both prompts, and what the teacher would say otherwise."""
    Parser(description="One pair of micro/model, and the divergence at each token.").parse_args()
    model, tokenizer, index = start()
    for question, group, rewards in groups(model, tokenizer, index, hops=1):
        pairs = mine_pairs(model, tokenizer, [question], group, rewards, 400)[0]
        # Most went wrong: it is a word that they like. And one search shows it best.
        if pairs and sum(rewards) < 3 and len(pairs[0].student.queries) == 1:
            break
    pair = pairs[0]
    for reader, ids in (("student", pair.student.prompt_ids), ("teacher", pair.prompt)):
        print(paint(f"---- the {reader}'s prompt ({len(ids)} tokens)", "1"))
        print(decode(tokenizer, ids).strip() + "\n")
    values = token_divergences(model, pair)
    title = paint("---- the student's own trajectory", "1")
    print(f"{title}, wrong: {pair.student.answer}, not {pair.question['golden_answers'][0]}.")
    print("A number in braces is the KL to the teacher at that token, in nats, where it is above\n"
          ".05; the environment's words have none.\n")  # fmt: skip
    for token, value in zip(pair.student.response_ids, values):
        shade = "34" if value is None else "0" if value < 0.05 else "33" if value < 0.5 else "31"
        mark = f"{{{value:.2f}}}" if abs(value or 0) >= 0.05 else ""
        print(paint(decode(tokenizer, [token]), shade) + mark, end="")
    kl = [value for value in values if value is not None]
    large = [value for value in kl if abs(value) >= 0.05]
    print(f"\n\n{len(kl)} tokens, mean KL {sum(kl) / len(kl):.3f}: the loss. {len(large)} tokens "
          f"carry {sum(large) / (sum(kl) or 1):.0%} of it.")  # fmt: skip
