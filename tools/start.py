"""Give a real model its start: teach it, by a few hundred demonstrations, to search and to answer.

    python tools/start.py --model M --questions Q.jsonl --corpus C.jsonl --out FOLDER

A model that never writes the tags earns no reward, and GRPO has nothing to start from. This script
writes the demonstrations itself, for training questions. It searches for the question as it stands,
then for each of its "supporting_titles" that it has not found, if the question has them. If a
passage that it found holds the answer, the trajectory becomes a demonstration. Other questions are
left out. Then the model is trained on what the script wrote, one pass, by cross-entropy; what the
retriever wrote has no loss.

OFSD's teacher must be able to read a reference. So --privileged of the demonstrations stand under
the privileged prompt, each with itself as the reference. Without them SmolLM2 copied the answer of
the reference and did not search (docs/real-models.md).

--prompt, --k, --max-searches and --max-observation-tokens mean what they mean in train.py, and
should have the same values there. The prompt is kept with the tokenizer, so train.py and eval.py
find it in FOLDER.
"""

import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from eval import load_questions, supported  # noqa: E402
from grpo import backward_in_chunks, clip_and_update, policy_hidden, token_logprobs  # noqa: E402
from micro.make import as_trajectory  # noqa: E402
from ofsd import privileged_prompt  # noqa: E402
from retriever import BadInput, Parser, Passage, open_index, run_script  # noqa: E402
from rollout import (  # noqa: E402
    Trajectory, chat_ids, context_length, load_model, save_model, standard_prompt,
)  # fmt: skip


def demonstrate(index, question: dict, *, k: int = 3, max_searches: int = 4) -> list | None:
    """What the script writes (str) and is shown (lists of passages), in turn. None where no passage
    that it found holds the answer."""
    steps, found = [], []
    for query in [question["question"], *question.get("supporting_titles", [])][:max_searches]:
        if query in (passage.title for passage in found):
            continue
        thought = "I need more." if found else "I should look it up."
        passages = index.search([query], k)[0]
        steps += [f"<think> {thought} </think>\n<search> {query} </search>", passages]
        found += passages
        for answer in question["golden_answers"]:
            if supported(Trajectory("", [], answer=answer, passages=[found])):
                said = f"<think> The passages say it. </think>\n<answer> {answer} </answer>"
                return [*steps, said]
    return None


def write_out(tokenizer, question: str, steps: list, budget: int) -> Trajectory:
    """The steps as a trajectory under the standard prompt, with an end-of-sequence token."""
    prompt = chat_ids(tokenizer, standard_prompt(tokenizer, question))
    trajectory = as_trajectory(tokenizer, steps, question, prompt, budget)
    trajectory.extend([tokenizer.eos_token_id], [0.0])
    return trajectory


def show_reference(model, tokenizer, demonstration: Trajectory) -> Trajectory:
    """The same response under OFSD's privileged prompt, with itself as the reference."""
    room = context_length(model) - len(demonstration.response_ids)
    prompt = privileged_prompt(tokenizer, demonstration.question, demonstration, room)
    return replace(demonstration, prompt_ids=prompt or demonstration.prompt_ids)


def imitate(model, demonstrations: list[Trajectory], *, lr: float, batch: int) -> None:
    """One pass of supervised training, in the order given. The learning rate falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    starts = tqdm(range(0, len(demonstrations), batch), desc="demonstrations", disable=None)
    for start in starts:
        part = demonstrations[start : start + batch]
        pairs = [pair for t in part for pair in zip(t.response_ids, t.loss_mask)]
        ids = torch.tensor([token for token, mask in pairs if mask], device=model.device)  # (N,)
        loss = partial(imitation_loss, num_tokens=len(ids))
        stats = backward_in_chunks(model, loss, policy_hidden(model, part), ids)
        optimizer.param_groups[0]["lr"] = lr * (1 - start / len(demonstrations))
        clip_and_update(optimizer, 1.0)
        if start // batch % 10 == 0:
            value = sum(one["loss"] for one in stats)
            starts.write(f"{start:5d} of {len(demonstrations)} demonstrations  loss {value:.3f}")


def imitation_loss(logits, ids, *, num_tokens: int):
    """Cross-entropy of n of an update's num_tokens: logits (n, V), ids (n,)."""
    loss = -token_logprobs(logits, ids).sum() / num_tokens
    return loss, {"loss": loss.item()}


def main() -> None:
    parser = Parser(description="Teach a real model to search and to answer.")
    parser.add_argument("--model", required=True, help="a model folder or hub name")
    parser.add_argument("--questions", required=True, help="training questions")
    parser.add_argument("--corpus", required=True, help="passages")
    parser.add_argument("--out", required=True, help="the folder to write, a new one")
    parser.add_argument("--count", type=int, default=400, help="demonstrations")
    parser.add_argument("--privileged", type=int, default=0, help="how many of them show a reference")
    parser.add_argument("--prompt", default="", help="wording of the prompt, with {question} in it")
    parser.add_argument("--k", type=int, default=3, help="passages a search")
    parser.add_argument("--max-searches", type=int, default=4, help="searches a demonstration")
    parser.add_argument("--max-observation-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="demonstrations an update")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate, which falls to 0")
    parser.add_argument("--seed", type=int, default=0, help="which demonstrations, in which order")
    args = parser.parse_args()
    if min(args.count, args.k, args.max_searches, args.max_observation_tokens, args.batch) < 1:
        parser.error("--count, --k, --batch and the limits are at least 1")
    if not 0 <= args.privileged <= args.count:
        parser.error("--privileged is a part of --count")
    if args.prompt and "{question}" not in args.prompt:
        parser.error("--prompt must hold {question}, where the question goes")
    if Path(args.out).exists():
        raise BadInput(f"{args.out} exists already: choose another --out, or remove it")
    rows, index = load_questions(args.questions), open_index(args.corpus)
    model, tokenizer = load_model(args.model)
    if args.prompt:
        tokenizer.init_kwargs["search_prompt"] = args.prompt
    rng, demonstrations = random.Random(args.seed), []
    for row in rng.sample(rows, len(rows)):
        steps = demonstrate(index, row, k=args.k, max_searches=args.max_searches)
        if steps:
            asked = tokenizer, row["question"]
            demonstrations.append(write_out(*asked, steps, args.max_observation_tokens))
        if len(demonstrations) == args.count:
            break
    if not demonstrations:
        raise BadInput(f"{args.questions}: for no question does {args.corpus} hold a passage with "
                       "the answer that BM25 finds")  # fmt: skip
    shown = args.privileged * len(demonstrations) // args.count  # the same share of fewer ones
    for i in range(shown):
        demonstrations[i] = show_reference(model, tokenizer, demonstrations[i])
    rng.shuffle(demonstrations)
    print(f"{len(demonstrations)} demonstrations from {len(rows)} questions, {shown} privileged")
    torch.manual_seed(args.seed)
    imitate(model, demonstrations, lr=args.lr, batch=args.batch)
    save_model(model, tokenizer, Path(args.out))


if __name__ == "__main__":
    run_script(main)
