"""How fast are rollouts? Four ways side by side, on the same model, questions and token counts.

    python bench/rollout.py                        # micro/model, 16 questions x 5; some two minutes on 2 cores
    python bench/rollout.py --model path/to/SmolLM2-135M-Instruct --corpus passages.jsonl.gz \
        --questions questions.jsonl.gz --num-questions 8 --group-size 4 --scripted --repeats 1

    (a) ours        rollout(): one cache through all turns, an observation is one chunk
    (b) re-encode   the common way: model.generate on the whole transcript, encoded anew each turn
    (c) one token   model.generate with one cache, but an observation fed a token a step
    (d) TRL         one whole GRPO step of TRL's GRPOTrainer against one of ours (where trl is installed)

(a) samples; (b) and (c) then replay its trajectories: a logits processor forces each token, so
all three run the same number of tokens. That spares (b) and (c) what (a) does pay for: looking
for closing tags and keeping log-probabilities. Tokens a second counts every token of the
responses, sampled and observed. The ways take turns, --repeats times; medians are printed.

--scripted is for a model that does not yet write the tags: its forward pass is computed as
always, and then its choice is overruled by a script of two searches and an answer for each
question, of random lengths. For (d), a model with random weights answers in one turn, so that
nearly every completion runs to the limit; both sides report the tokens they wrote.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not bench/: it holds a rollout.py too

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LogitsProcessor, set_seed  # noqa: E402

from eval import load_questions  # noqa: E402
from ofsd import spans  # noqa: E402
from retriever import BM25, load_corpus  # noqa: E402
from rollout import RowCache, chat_ids, decode, encode, load_model, observation_ids, rollout, standard_prompt  # noqa: E402
from train import Config, frozen_copy, grpo_step  # noqa: E402


class Scripted:
    """A model that computes as ever but says what its script says. An additional layer of the
    cache keeps the token ids, so that a row is known by its prompt wherever it is swapped to."""

    def __init__(self, model, script: dict[tuple, list[int]]):
        self.model, self.script = model, script
        self.device, self.dtype, self.generation_config = model.device, model.dtype, model.generation_config
        self.config = copy.copy(model.config)
        self.config.num_hidden_layers += 1
        self.config.get_text_config = lambda: self.config
        self.forward = model.forward  # for its signature

    def __call__(self, input_ids, position_ids, past_key_values, **kwargs):
        output = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs)
        kept = input_ids[:, None, :, None].double()  # (n, 1 head, S, width 1)
        history, _ = past_key_values.update(kept, kept, self.model.config.num_hidden_layers)
        for row in range(len(input_ids)):
            ids = history[row, 0, : int(position_ids[row, -1]) + 1, 0].long().tolist()
            prompt = next((p for p in self.script if tuple(ids[: len(p)]) == p), None)
            if prompt is not None and len(ids) - len(prompt) < len(self.script[prompt]):
                output.logits[row, -1, self.script[prompt][len(ids) - len(prompt)]] = 1e4
        return output


def write_script(tokenizer, index, questions: list[str]) -> dict[tuple, list[int]]:
    """For each prompt the ids of a response with two searches, observations included."""
    rng, script = random.Random(0), {}
    for question in questions:
        words, ids = question.rstrip("?").split(), []
        for number in range(3):
            thought = " ".join(rng.choices(words, k=rng.randrange(10, 30)))
            content = " ".join(rng.sample(words, min(4, len(words))))
            tag = "answer" if number == 2 else "search"
            ids += encode(tokenizer, f"<think> {thought} </think>\n<{tag}> {content} </{tag}>")
            if tag == "search":
                ids += observation_ids(tokenizer, index.search([content], 3)[0], 512)
        script[tuple(chat_ids(tokenizer, standard_prompt(tokenizer, question)))] = ids
    return script


class Force(LogitsProcessor):
    """Row i of the batch says tokens[i], then the end-of-sequence token."""

    def __init__(self, tokens: list[list[int]], width: int, eos: int):
        self.tokens, self.width, self.eos = tokens, width, eos

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.width
        wanted = [row[step] if step < len(row) else self.eos for row in self.tokens]
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, torch.tensor(wanted, device=scores.device)[:, None], 0.0)


def generate(model, tokenizer, texts: list[str], tokens: list[list[int]]) -> list[list[int]]:
    """model.generate on these texts, left-padded, until row i has said tokens[i]."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(map(len, tokens)),
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            logits_processor=[Force(tokens, width, tokenizer.eos_token_id)],
        )  # fmt: skip
    return [row[width : width + len(said)].tolist() for row, said in zip(out, tokens)]


def re_encode(model, tokenizer, index, record) -> None:
    texts = [decode(tokenizer, row.prompt_ids) for row in record]
    turns = [[ids for sampled, ids in spans(row) if sampled] for row in record]
    number, going = 0, list(range(len(record)))
    while going:
        said = generate(model, tokenizer, [texts[i] for i in going], [turns[i][number] for i in going])
        for i, ids in zip(going, said):
            texts[i] += decode(tokenizer, ids)
        number += 1
        going = [i for i in going if len(turns[i]) > number]
        found = index.search([record[i].queries[number - 1] for i in going], 3) if going else []
        for i, passages in zip(going, found):
            texts[i] += decode(tokenizer, observation_ids(tokenizer, passages, 512))


def one_token(model, tokenizer, index, record) -> None:
    generate(model, tokenizer, [decode(tokenizer, row.prompt_ids) for row in record], [row.response_ids for row in record])


class Clock:
    """Seconds spent in what it wraps."""

    def __init__(self):
        self.spent: dict[str, float] = {}

    def wrap(self, function, name):
        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            key = name if isinstance(name, str) else name(*args)
            self.spent[key] = self.spent.get(key, 0.0) + time.perf_counter() - began
            return result

        return timed


def where_the_time_goes(sample, index) -> None:
    clock, forward = Clock(), RowCache.forward
    kind = lambda cache, chunks: "decode" if max(map(len, chunks)) == 1 else "prefill and observations"  # noqa: E731
    RowCache.forward = clock.wrap(forward, kind)
    try:
        timed = clock.wrap(lambda: sample(SimpleNamespace(search=clock.wrap(index.search, "retrieval"))), "all")
        timed()
    finally:
        RowCache.forward = forward
    whole = clock.spent.pop("all")
    shares = {**clock.spent, "bookkeeping": whole - sum(clock.spent.values())}
    print("time of (a): " + ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in shares.items()))


# ---------------------------------------------------------------- (d): one whole GRPO step


def grpo_steps(args, questions, index) -> None:
    """A GRPO step of ours and of TRL's: random weights of the model's shape, one turn of --length tokens."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        print("(d) is skipped: trl is not installed")
        return
    base, tokenizer = load_model(args.model)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(base.config).eval()
    rows, size, length = len(questions) * args.group_size, args.group_size, args.length
    config = Config(group_size=size, micro_batch=rows)
    rewards = torch.tensor([[float(i == 0) for i in range(size)]] * len(questions))
    start, ours = frozen_copy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, weight_decay=0.0)
    times, tokens = [], []
    for _ in range(args.repeats + 1):  # the first one warms up
        began = time.perf_counter()
        sampled = rollout(ours, tokenizer, index, questions, group_size=size, max_turn_tokens=length)
        grpo_step(ours, start, optimizer, sampled, rewards, config)
        times.append(time.perf_counter() - began)
        tokens.append(sum(len(row.response_ids) for row in sampled))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model, processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [float(i % size == 0) for i in range(len(completions))],
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in questions] * (args.repeats + 1)),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=rows, num_generations=size, max_completion_length=length,
                max_steps=args.repeats + 1, learning_rate=1e-6, beta=0.0, temperature=1.0, logging_steps=1, report_to=[],
                disable_tqdm=True, bf16=False, gradient_checkpointing=False, save_strategy="no", shuffle_dataset=False,
            ),
        )  # fmt: skip
        theirs, step = Clock(), trainer.training_step
        trainer.training_step = theirs.wrap(step, lambda *_: f"step {len(theirs.spent)}")
        trainer.train()
    their_times = list(theirs.spent.values())[1:]
    log = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    mean_length = sum(row["completions/mean_length"] for row in log[1:]) / len(log[1:])
    one, two = median(times[1:]), median(their_times)
    print(f"\n(d) a whole GRPO step, {len(questions)} questions x {size}, one turn of at most {length} tokens, random weights")
    print(f"ours {one:6.2f} s, {sum(tokens[1:]) / args.repeats / rows:.1f} tokens a response")
    print(f"TRL  {two:6.2f} s, {mean_length:.1f} tokens a response: ours is {two / one:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of rollouts, side by side.")
    parser.add_argument("--model", default="micro/model")
    parser.add_argument("--questions", default="micro/validation.jsonl")
    parser.add_argument("--corpus", default="micro/corpus.jsonl")
    parser.add_argument("--num-questions", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--length", type=int, default=128, help="tokens of a completion in (d)")
    parser.add_argument("--scripted", action="store_true", help="the model says what a script says")
    args = parser.parse_args()
    index = BM25(load_corpus(args.corpus))
    questions = [row["question"] for row in load_questions(args.questions)[: args.num_questions]]
    model, tokenizer = load_model(args.model)
    speaker = Scripted(model, write_script(tokenizer, index, questions)) if args.scripted else model
    sample = lambda retriever: rollout(speaker, tokenizer, retriever, questions, group_size=args.group_size, seed=0)  # noqa: E731

    record = sample(index)  # also warms up
    total = sum(len(row.response_ids) for row in record)
    print(json.dumps({
        "model": args.model, "trajectories": len(record), "tokens": total, "sampled": sum(sum(r.loss_mask) for r in record),
        "searches": sum(len(r.queries) for r in record) / len(record), "threads": torch.get_num_threads(),
        "device": str(model.device), "torch": torch.__version__,
    }))  # fmt: skip
    ways = {
        "(a) ours": lambda: sample(index),
        "(b) re-encode each turn": lambda: re_encode(model, tokenizer, index, record),
        "(c) one token a step": lambda: one_token(model, tokenizer, index, record),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    ours = median(times["(a) ours"])
    print(f"\n{'way':26}{'seconds':>9}{'range':>16}{'tokens/s':>11}{'(a) is faster by':>19}")
    for name, took in times.items():
        print(f"{name:26}{median(took):9.2f}{f'{min(took):.2f}-{max(took):.2f}':>16}{total / median(took):11.0f}{median(took) / ours:18.2f}x")
    where_the_time_goes(sample, index)
    grpo_steps(args, questions, index)


if __name__ == "__main__":
    main()
