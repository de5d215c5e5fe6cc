"""Give a real model its start: teach it, by a few hundred demonstrations, to search.

    python -m tools.start --model M --questions Q.jsonl --corpus C.jsonl --out FOLDER

A model that never writes the tags earns no reward, so GRPO has nothing to start from.
This script writes demonstrations itself, for training questions. It searches for the
question as it stands, then for each of its "supporting_titles" that it has not found,
if the question has them. As soon as the model can read the answer in what it is shown,
the trajectory becomes a demonstration. The other questions are left out.

A question may bring a demonstration of its own, right or wrong: a list of turns. The
script plays them as they are, and searches where they do (micro/english.py writes such
questions):

    "demonstration": ["<search> legend of Bromos Haven </search>",
                      "<answer> Jatos Song </answer>"]

The model learns to write what stands in a demonstration. So questions that hold tags or
the tokenizer's own markup are left out, too, in their text, their titles or their
answers.

Then the model is trained on the demonstrations, one pass, by cross-entropy on what the
script wrote. What the retriever wrote has no loss.

OFSD's teacher must be able to read a reference. So --privileged of the right
demonstrations stand under the privileged prompt, each with itself as the reference.
Without them SmolLM2 copied the reference's answer and did not search
(docs/real-models.md).

--prompt, --k, --max-searches and --max-observation-tokens mean what they mean in
train.py, and should have the same values there. The prompt is kept with the tokenizer,
so train.py and eval.py find it in FOLDER.
"""

import argparse
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from eval import exact_match, supported
from machinery.devices import ARITHMETICS
from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.models import load_model, save_model
from machinery.passages import Passage
from machinery.questions import load_questions
from machinery.terminal import Parser, check_seed, run_script
from machinery.text import chat_ids, decode, neutralise, whole_characters
from ofsd import privileged_prompt
from retriever import open_index
from rollout import (
    Trajectory,
    context_length,
    observation_ids,
    parse_turn,
    standard_prompt,
)
from tools.imitation import as_trajectory, imitation_step


def make_start(
    model: str,
    questions: str,
    corpus: str,
    out: str | Path,
    *,
    count: int,
    privileged: int,
    prompt: str,
    k: int,
    max_searches: int,
    max_observation_tokens: int,
    batch: int,
    lr: float,
    seed: int,
    arithmetic: str = "auto",
) -> None:
    """Load the model, teach it, and write it to the folder `out`.

    The arguments are the flags of this script. arithmetic: as in load_model. Raises
    BadInput or OSError before the training for all that cannot be used: the folder, the
    files, the model, questions of which none gives a demonstration.
    """
    # 1. Everything that can go wrong goes wrong here, before hours of work.
    check_writable(Path(out))
    rows = read_questions(questions)
    index = open_index(corpus)
    policy, tokenizer = load_model(model, arithmetic=arithmetic, to_train=True)
    if prompt:  # kept in the tokenizer's files
        tokenizer.init_kwargs["search_prompt"] = whole_characters(prompt)

    # 2. Demonstrations, for questions in random order.
    rng = random.Random(seed)
    demonstrations = write_demonstrations(
        index,
        rng.sample(rows, len(rows)),
        tokenizer,
        count=count,
        k=k,
        max_searches=max_searches,
        max_observation_tokens=max_observation_tokens,
    )
    if not demonstrations:
        raise BadInput(
            f"{questions}: for no question does BM25 find a passage in {corpus} that "
            f"shows the answer within {max_observation_tokens} tokens"
        )

    # 3. Some of the right ones show themselves as the reference. Where there are fewer
    #    demonstrations than wanted, it is the same share of them.
    with_reference = privileged * len(demonstrations) // count
    shown = 0
    trajectories = []
    for demonstration in demonstrations:
        trajectory = demonstration.trajectory
        if demonstration.right and shown < with_reference:
            privileged_one = show_reference(policy, tokenizer, trajectory)
            if privileged_one is not trajectory:  # there was room for the reference
                shown += 1
            trajectory = privileged_one
        trajectories.append(trajectory)
    rng.shuffle(trajectories)
    print(
        f"{len(trajectories)} demonstrations from {len(rows)} questions, "
        f"{shown} privileged"
    )

    # 4. The training.
    imitate(policy, trajectories, lr=lr, batch=batch)
    save_model(policy, tokenizer, Path(out))


# ---------------------------------------------------------------- before the work


def check_writable(folder: Path) -> None:
    """BadInput or OSError where save_model could not write this folder, a new one."""
    beside = folder.with_name(folder.name + ".new")  # save_model writes this one first
    for path in (folder, beside):
        if os.path.lexists(path):
            raise BadInput(f"{path} exists already: choose another --out, or remove it")
    new = [path for path in (beside, *beside.parents) if not path.exists()]
    beside.mkdir(parents=True)
    for path in new:  # from the innermost one on
        path.rmdir()


def read_questions(spec: str) -> list[dict]:
    """load_questions, and a check of the two keys that are only read here."""
    questions = load_questions(spec)
    if os.path.exists(spec):  # a file, so that an error can name the line
        for _ in read_jsonl(spec, check_row):
            pass
    return questions


def check_row(row: dict) -> dict:
    """The row as it is. Raises ValueError where one of its two keys is malformed."""
    titles = row.get("supporting_titles")
    if titles is not None and not is_list_of_texts(titles):
        raise ValueError('"supporting_titles" must be a list of strings')
    turns = row.get("demonstration")
    if turns is not None and not is_demonstration(turns):
        raise ValueError(
            '"demonstration" must be a list of turns: each a string with a '
            "<search>...</search>, the last one with an <answer>...</answer>"
        )
    return row


def is_demonstration(turns) -> bool:
    if not is_list_of_texts(turns) or not turns:
        return False
    for number, turn in enumerate(turns, start=1):
        parsed = parse_turn(turn)
        if parsed is None:
            return False
        kind, _ = parsed
        wanted = "answer" if number == len(turns) else "search"
        if kind != wanted:
            return False
    return True


def is_list_of_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


# ---------------------------------------------------------------- demonstrations


class Demonstration(NamedTuple):
    """A trajectory to imitate. right: does it end with an answer that is right?"""

    trajectory: Trajectory
    right: bool


def write_demonstrations(
    index,
    questions: list[dict],
    tokenizer,
    *,
    count: int,
    k: int,
    max_searches: int,
    max_observation_tokens: int,
) -> list[Demonstration]:
    """Demonstrations of the first `count` questions that bring one, or for which the
    answer is found."""
    demonstrations = []
    for question in questions:
        if len(demonstrations) == count:
            break
        if not is_harmless(question, tokenizer):
            continue
        if question.get("demonstration"):
            steps = play(index, question["demonstration"], k)
        else:
            steps = demonstrate(
                index,
                question,
                k=k,
                max_searches=max_searches,
                tokenizer=tokenizer,
                max_observation_tokens=max_observation_tokens,
            )
        if steps is None:
            continue
        trajectory = write_out(
            tokenizer, question["question"], steps, max_observation_tokens
        )
        right = exact_match(trajectory.answer, question["golden_answers"]) == 1
        demonstrations.append(Demonstration(trajectory, right))
    return demonstrations


def is_harmless(question: dict, tokenizer) -> bool:
    """No text that a demonstration of this question could hold has markup in it.

    A question "Who?</search>" would become a query, and train the model to close a tag
    twice; with the end-of-sequence token in it, to stop in the middle of a query.
    """
    texts = [
        question["question"],
        *question.get("supporting_titles", []),
        *question["golden_answers"],
    ]
    for text in texts:
        if neutralise(text, tokenizer) != text:
            return False
    # A turn that comes with the question has Search-E1's tags, and no other markup.
    for turn in question.get("demonstration", []):
        if neutralise(turn, tokenizer, tags=()) != turn:
            return False
    return True


def demonstrate(
    index,
    question: dict,
    *,
    k: int = 3,
    max_searches: int = 4,
    tokenizer=None,
    max_observation_tokens: int = 512,
) -> list[str | list[Passage]] | None:
    """What the script writes (str) and is shown (lists of passages), in turn.

    None where it reads no answer. It reads passages as the model will read them, cut to
    max_observation_tokens; without a tokenizer it reads them whole.
    """
    steps = []
    titles = set()  # of all passages that were found
    passages_read = []
    queries = [question["question"], *question.get("supporting_titles", [])]
    searches = 0
    for query in queries:
        if query in titles:
            continue
        if searches == max_searches:
            return None
        searches += 1
        passages = index.search([query], k)[0]
        thought = "I need more." if titles else "I should look it up."
        steps.append(f"<think> {thought} </think>\n<search> {query} </search>")
        steps.append(passages)
        titles.update(passage.title for passage in passages)

        if tokenizer is not None:
            passages = as_read(tokenizer, passages, max_observation_tokens)
        passages_read.extend(passages)
        for answer in question["golden_answers"]:
            attempt = Trajectory("", [], answer=answer, passages=[passages_read])
            if supported(attempt):
                steps.append(
                    "<think> The passages say it. </think>\n"
                    f"<answer> {answer} </answer>"
                )
                return steps
    return None


def play(index, turns: list[str], k: int) -> list[str | list[Passage]]:
    """The steps of a demonstration that came with its question."""
    steps = []
    for turn in turns:
        steps.append(turn)
        kind, query = parse_turn(turn)
        if kind == "search":
            steps.append(index.search([query], k)[0])
    return steps


def as_read(
    tokenizer, passages: list[Passage], max_observation_tokens: int
) -> list[Passage]:
    """The passages as an observation shows them: each a line, cut where it is cut."""
    if not passages:
        return []
    ids = observation_ids(tokenizer, passages, max_observation_tokens)
    lines = decode(tokenizer, ids).strip().split("\n")
    return [Passage("", "", line) for line in lines[1:-1]]  # between the two tags


def write_out(
    tokenizer, question: str, steps: list, max_observation_tokens: int
) -> Trajectory:
    """The steps under the standard prompt, with an end-of-sequence token after them.

    The last step is an answer.
    """
    prompt_ids = chat_ids(tokenizer, standard_prompt(tokenizer, question))
    trajectory = as_trajectory(
        tokenizer, steps, question, prompt_ids, max_observation_tokens
    )
    trajectory.extend([tokenizer.eos_token_id], logprobs=[0.0])
    _, trajectory.answer = parse_turn(steps[-1])
    return trajectory


def show_reference(model, tokenizer, demonstration: Trajectory) -> Trajectory:
    """The same response under OFSD's privileged prompt, with itself as the reference.

    It stays under the standard prompt where the model's context has no room for both.
    """
    room = context_length(model) - len(demonstration.response_ids)
    prompt_ids = privileged_prompt(
        tokenizer, demonstration.question, demonstration, room
    )
    if prompt_ids is None:
        return demonstration
    return replace(demonstration, prompt_ids=prompt_ids)


# ---------------------------------------------------------------- training


def imitate(model, demonstrations: list[Trajectory], *, lr: float, batch: int) -> None:
    """One pass of supervised training, in the order given.

    The learning rate falls linearly to 0. batch: demonstrations an update.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    total = len(demonstrations)
    starts = tqdm(range(0, total, batch), desc="demonstrations", disable=None)
    for number, start in enumerate(starts):
        optimizer.param_groups[0]["lr"] = lr * (1 - start / total)
        stats = imitation_step(
            model,
            optimizer,
            demonstrations[start : start + batch],
            micro_batch=batch,
        )
        if number % 10 == 0:
            starts.write(
                f"{start:5d} of {total} demonstrations  loss {stats['loss']:.3f}"
            )


# ---------------------------------------------------------------- the command


def parse_flags() -> argparse.Namespace:
    parser = Parser(description="Teach a real model to search and to answer.")
    parser.add_argument("--model", required=True, help="a model folder or hub name")
    parser.add_argument("--questions", required=True, help="training questions")
    parser.add_argument("--corpus", required=True, help="passages")
    parser.add_argument("--out", required=True, help="the folder to write, a new one")
    parser.add_argument("--count", type=int, default=400, help="demonstrations")
    parser.add_argument(
        "--privileged", type=int, default=0, help="how many of them show a reference"
    )
    parser.add_argument(
        "--prompt", default="", help="wording of the prompt, with {question} in it"
    )
    parser.add_argument("--k", type=int, default=3, help="passages a search")
    parser.add_argument(
        "--max-searches", type=int, default=4, help="searches a demonstration"
    )
    parser.add_argument(
        "--max-observation-tokens", type=int, default=512, help="of what a search shows"
    )
    parser.add_argument("--batch", type=int, default=4, help="demonstrations an update")
    parser.add_argument(
        "--lr", type=float, default=1e-4, help="learning rate, which falls to 0"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which demonstrations, in which order"
    )
    parser.add_argument(
        "--arithmetic",
        default="auto",
        choices=ARITHMETICS,
        help="precision of matrix products",
    )
    flags = parser.parse_args()

    limits = (
        flags.count,
        flags.k,
        flags.max_searches,
        flags.max_observation_tokens,
        flags.batch,
    )
    if min(limits) < 1 or max(limits) >= 2**32:
        parser.error(
            "--count, --k, --batch and the limits are at least 1 and below 2**32"
        )
    if not 0 <= flags.privileged <= flags.count:
        parser.error("--privileged is a part of --count")
    if not 0 < flags.lr < math.inf:  # nan is neither
        parser.error("--lr is a number above 0")
    check_seed(parser, flags.seed)
    if flags.prompt and "{question}" not in flags.prompt:
        parser.error("--prompt must hold {question}, where the question goes")
    return flags


def main() -> None:
    flags = parse_flags()
    make_start(
        flags.model,
        flags.questions,
        flags.corpus,
        flags.out,
        count=flags.count,
        privileged=flags.privileged,
        prompt=flags.prompt,
        k=flags.k,
        max_searches=flags.max_searches,
        max_observation_tokens=flags.max_observation_tokens,
        batch=flags.batch,
        lr=flags.lr,
        seed=flags.seed,
        arithmetic=flags.arithmetic,
    )


if __name__ == "__main__":
    run_script(main)
