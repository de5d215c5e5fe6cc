"""How fast are rollouts? Four ways, on the same model, questions and token counts.

    python -m bench.sampling     # micro/model, 16 questions x 5; 2 minutes on 2 cores
    python -m bench.sampling --model path/to/SmolLM2-135M-Instruct \\
        --corpus passages.jsonl.gz --questions questions.jsonl.gz \\
        --num-questions 8 --group-size 4 --scripted --repeats 1 --ways abc

    (a) ours       rollout(): one cache through all turns, an observation is one chunk
    (b) re-encode  the common way: model.generate on the whole transcript, which is
                   encoded anew each turn
    (c) one token  model.generate with one cache, but an observation a token a step
    (d) TRL        a whole GRPO step of TRL's GRPOTrainer and one of ours, if trl is
                   installed

(a) samples. (b) and (c) then replay its trajectories: a logits processor forces each
token, so all three run the same number of tokens. That spares (b) and (c) what (a) does
pay for: to look for closing tags, and to keep log-probabilities. Tokens a second count
every token of the responses, sampled and observed. The ways take turns, --repeats
times, and medians are printed.

--scripted is for a model that does not write the tags yet. Its forward pass is computed
as always, and then a script of two searches and an answer overrules its choice.

For (d), a model with random weights answers in one turn, so nearly every completion
runs to the limit. In every second step 7 of 16 groups have no variance, which is the
share of the default run (results/): TRL computes those, too.
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, set_seed

from grpo import grpo_step
from machinery.models import load_model
from machinery.questions import load_questions
from machinery.text import chat_ids, decode, encode
from retriever import open_index
from rollout import Trajectory, observation_ids, rollout, spans, standard_prompt

K = 3  # passages per search
MAX_OBSERVATION_TOKENS = 512


class Clock:
    """Seconds spent in parts of the work: seconds[key] is the sum for that key."""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def running(self, key) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self.seconds[key] = self.seconds.get(key, 0.0) + spent


class Wrapped:
    """A model that computes as another one does, and has all that the other has."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)


class Scripted(Wrapped):
    """A model that computes as ever, but says what its script says.

    script is {prompt ids: response ids, observations included}. An additional layer of
    the cache keeps the token ids, so a row is known by its prompt wherever it is
    swapped to.
    """

    def __init__(self, model, script: dict[tuple, list[int]]):
        super().__init__(model)
        self.script = script

    def __call__(self, input_ids, position_ids, past_key_values, **options):
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )
        ids = input_ids[:, None, :, None].double()  # (n, 1 head, S, width 1)
        layer = self.config.num_hidden_layers
        history, _ = past_key_values.update(ids, ids, layer)
        for row in range(len(input_ids)):
            length = int(position_ids[row, -1]) + 1
            wanted = self.next_token(history[row, 0, :length, 0].long().tolist())
            if wanted is not None:
                output.logits[row, -1, wanted] = 1e4
        return output

    def next_token(self, ids: list[int]) -> int | None:
        """The token that follows these ids of prompt and response, by the script."""
        for prompt, response in self.script.items():
            said = len(ids) - len(prompt)
            if tuple(ids[: len(prompt)]) == prompt and said < len(response):
                return response[said]
        return None


class Timed(Wrapped):
    """A model whose forward passes are timed: one token a row, or chunks."""

    def __init__(self, model, clock: Clock):
        super().__init__(model)
        self.clock = clock

    def __call__(self, input_ids, **options):
        one_token_each = input_ids.shape[1] == 1
        kind = "decode" if one_token_each else "prefill and observations"
        with self.clock.running(kind):
            output = self.model(input_ids=input_ids, **options)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return output


class TimedIndex:
    """An index whose searches are timed."""

    def __init__(self, index, clock: Clock):
        self.index = index
        self.clock = clock

    def search(self, queries, k):
        with self.clock.running("retrieval"):
            return self.index.search(queries, k)


def write_script(tokenizer, index, questions: list[str]) -> dict[tuple, list[int]]:
    """For each prompt the ids of a response with two searches and an answer.

    The thoughts are of random lengths. The observations are included.
    """
    rng = random.Random(0)
    script = {}
    for question in questions:
        words = question.rstrip("?").split()
        ids = []
        for tag in ("search", "search", "answer"):
            thought = " ".join(rng.choices(words, k=rng.randrange(10, 30)))
            content = " ".join(rng.sample(words, min(4, len(words))))
            turn = f"<think> {thought} </think>\n<{tag}> {content} </{tag}>"
            ids += encode(tokenizer, turn)
            if tag == "search":
                passages = index.search([content], K)[0]
                ids += observation_ids(tokenizer, passages, MAX_OBSERVATION_TOKENS)
        prompt = chat_ids(tokenizer, standard_prompt(tokenizer, question))
        script[tuple(prompt)] = ids
    return script


# ---------------------------------------------------------------- (b) and (c): generate


class Force(LogitsProcessor):
    """Row i of the batch says tokens[i], and then the end-of-sequence token."""

    def __init__(self, tokens: list[list[int]], width: int, end: int):
        self.tokens = tokens
        self.width = width  # of the prompts
        self.end = end

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.width
        wanted = [row[step] if step < len(row) else self.end for row in self.tokens]
        index = torch.tensor(wanted, device=scores.device)[:, None]  # (n, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, index, 0.0)


def generate(
    model, tokenizer, texts: list[str], tokens: list[list[int]]
) -> list[list[int]]:
    """model.generate on these texts, left-padded, until row i has said tokens[i]."""
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    ).to(model.device)
    width = batch["input_ids"].shape[1]
    end = tokenizer.eos_token_id
    with torch.no_grad():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(map(len, tokens)),
            eos_token_id=end,
            pad_token_id=end,
            logits_processor=[Force(tokens, width, end)],
        )
    said = []
    for row, wanted in zip(output, tokens, strict=True):
        said.append(row[width : width + len(wanted)].tolist())
    return said


def re_encode(model, tokenizer, index, record: list[Trajectory]) -> None:
    """(b): in each turn the whole text so far is encoded, and generate reads it all."""
    texts = []
    turns = []
    for trajectory in record:
        texts.append(decode(tokenizer, trajectory.prompt_ids))
        turns.append([ids for sampled, ids in spans(trajectory) if sampled])

    number = 0
    going = list(range(len(record)))
    while going:
        tokens = [turns[i][number] for i in going]
        said = generate(model, tokenizer, [texts[i] for i in going], tokens)
        for i, ids in zip(going, said, strict=True):
            texts[i] += decode(tokenizer, ids)

        number += 1
        going = [i for i in going if len(turns[i]) > number]
        if not going:
            return
        results = index.search([record[i].queries[number - 1] for i in going], K)
        for i, passages in zip(going, results, strict=True):
            seen = observation_ids(tokenizer, passages, MAX_OBSERVATION_TOKENS)
            texts[i] += decode(tokenizer, seen)


def one_token(model, tokenizer, record: list[Trajectory]) -> None:
    """(c): one call of generate, in which observations are forced as well."""
    texts = [decode(tokenizer, trajectory.prompt_ids) for trajectory in record]
    generate(
        model, tokenizer, texts, [trajectory.response_ids for trajectory in record]
    )


def compare_sampling(args, questions: list[str], index) -> None:
    """(a), (b) and (c) in turn, and where the time of (a) goes."""
    model, tokenizer = load_model(args.model)
    speaker = model
    if args.scripted:
        speaker = Scripted(model, write_script(tokenizer, index, questions))

    def sampled(speaker, index) -> list[Trajectory]:
        return rollout(
            speaker, tokenizer, index, questions, group_size=args.group_size, seed=0
        )

    record = sampled(speaker, index)  # this also warms up
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        sampled(speaker, index)
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"peak GPU memory of (a): {peak:.2f} GB")
    total = sum(len(trajectory.response_ids) for trajectory in record)
    print_what_is_measured(args.model, model, record, total)

    ways = {"(a) ours": lambda: sampled(speaker, index)}
    if "b" in args.ways:
        ways["(b) re-encode each turn"] = lambda: re_encode(
            model, tokenizer, index, record
        )
    if "c" in args.ways:
        ways["(c) one token a step"] = lambda: one_token(model, tokenizer, record)
    print_speed(times_in_turn(ways, args.repeats), total)

    clock = Clock()
    with clock.running("all"):
        sampled(Timed(speaker, clock), TimedIndex(index, clock))
    print_shares(clock.seconds)


def times_in_turn(ways: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """The seconds of each way, which take turns."""
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    return times


def print_what_is_measured(name: str, model, record: list[Trajectory], total: int):
    facts = {
        "model": name,
        "trajectories": len(record),
        "tokens": total,
        "sampled": sum(sum(trajectory.loss_mask) for trajectory in record),
        "searches": sum(len(t.queries) for t in record) / len(record),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "torch": torch.__version__,
    }
    print(json.dumps(facts))


def print_speed(times: dict[str, list[float]], total: int) -> None:
    ours = median(times["(a) ours"])
    head = f"{'way':26}{'seconds':>9}{'range':>16}{'tokens/s':>11}"
    print(f"\n{head}{'(a) is faster by':>19}")
    for name, seconds in times.items():
        typical = median(seconds)
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        line = f"{name:26}{typical:9.2f}{spread:>16}{total / typical:11.0f}"
        print(f"{line}{typical / ours:18.2f}x")


def print_shares(seconds: dict[str, float]) -> None:
    """What each part takes of the whole. The rest is bookkeeping."""
    whole = seconds["all"]
    rest = 2 * whole - sum(seconds.values())
    shares = []
    for name, spent in seconds.items():
        if name != "all":
            shares.append(f"{name} {spent / whole:.1%}")
    print(f"time of (a): {', '.join(shares)}, bookkeeping {rest / whole:.1%}")


# ---------------------------------------------------------------- (d): a GRPO step


class Steps:
    """Steps of GRPO, ours and TRL's in turn, on the same questions and rewards.

    The clock's keys are (whose, what, number of the step).
    """

    def __init__(self, args, questions: list[str], index):
        self.args = args
        self.questions = questions
        self.index = index
        self.clock = Clock()
        self.number = 0
        self.lengths = []  # our mean response length in each step
        base, self.tokenizer = load_model(args.model)
        set_seed(0)
        self.start = AutoModelForCausalLM.from_config(base.config).eval()
        self.policy = copy.deepcopy(self.start)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=1e-6, weight_decay=0.0
        )

    def running(self, whose: str, what: str):
        return self.clock.running((whose, what, self.number))

    def reward(self, number: int) -> float:
        """Of trajectory `number`: the first of a group wins. But in every second step
        the first 7 of 16 groups have no variance."""
        group, place = divmod(number, self.args.group_size)
        if self.number % 2 == 1 and group < len(self.questions) * 7 // 16:
            return 0.0
        return float(place == 0)

    def our_step(self) -> None:
        size = self.args.group_size
        with self.running("ours", "step"):
            with self.running("ours", "sampling"):
                trajectories = rollout(
                    self.policy,
                    self.tokenizer,
                    self.index,
                    self.questions,
                    group_size=size,
                    max_turn_tokens=self.args.length,
                )
            rewards = [self.reward(i) for i in range(len(trajectories))]
            grpo_step(
                self.policy,
                self.optimizer,
                trajectories,
                torch.tensor(rewards).view(-1, size),  # (Q, G)
                micro_batch=self.args.micro_batch,
            )
        total = sum(len(trajectory.response_ids) for trajectory in trajectories)
        self.lengths.append(total / len(trajectories))


def compare_steps(args, questions: list[str], index) -> None:
    """A GRPO step of ours and one of TRL's in turn: a model with random weights, and
    one turn of --length tokens."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        print("(d) is skipped: trl is not installed")
        return
    steps = Steps(args, questions, index)
    count = 2 * args.repeats + 2  # the first two warm up

    class InTurn(TrainerCallback):
        def on_step_begin(self, args, state, control, **options):
            steps.number = state.global_step
            steps.our_step()

    class TimedTrainer(GRPOTrainer):
        # TRL's few milliseconds between its micro-batches are not counted, and neither
        # are its optimizer's.
        def training_step(self, *inputs, **options):
            with steps.running("TRL", "step"):
                return super().training_step(*inputs, **options)

    def rewards(completions, **columns) -> list[float]:
        return [steps.reward(i) for i in range(len(completions))]

    messages = [[{"role": "user", "content": question}] for question in questions]
    prompts = [{"prompt": message} for message in messages]
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=steps.start,
            processing_class=steps.tokenizer,
            callbacks=[InTurn()],
            reward_funcs=rewards,
            train_dataset=Dataset.from_list(prompts * count),
            args=GRPOConfig(
                output_dir=folder, max_steps=count, **their_settings(steps)
            ),
        )
        trainer.remove_callback(PrinterCallback)
        generate = steps.start.generate

        def timed_generate(*inputs, **options):
            with steps.running("TRL", "sampling"):
                return generate(*inputs, **options)

        steps.start.generate = timed_generate
        trainer.train()
    name = "completions/mean_length"
    lengths = [row[name] for row in trainer.state.log_history if name in row]
    print_steps(steps, sum(lengths) / count, count)


def their_settings(steps: Steps) -> dict:
    """The settings by which a step of TRL's does what a step of ours does."""
    args = steps.args
    rows = len(steps.questions) * args.group_size
    return {
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": rows // args.micro_batch,
        "num_generations": args.group_size,
        "max_completion_length": args.length,
        "temperature": 1.0,
        "beta": 0.0,
        "learning_rate": 1e-6,
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def print_steps(steps: Steps, their_length: float, count: int) -> None:
    args = steps.args
    our_length = sum(steps.lengths) / count
    print(
        f"\n(d) a whole GRPO step, {len(steps.questions)} questions x "
        f"{args.group_size}, one turn of at most {args.length} tokens, random weights; "
        f"ours wrote {our_length:.1f} tokens a response, TRL {their_length:.1f}"
    )
    head = f"{'groups with variance':26}{'ours':>9}{'sampling':>10}"
    print(f"{head}{'TRL':>9}{'sampling':>10}{'ours is faster by':>19}")
    for first, kind in ((2, "all"), (3, "9 of 16")):

        def typical(whose: str, what: str, first: int = first) -> float:
            numbers = range(first, count, 2)
            return median(steps.clock.seconds[whose, what, i] for i in numbers)

        ours = typical("ours", "step")
        theirs = typical("TRL", "step")
        print(
            f"{kind:26}{ours:8.2f}s{typical('ours', 'sampling'):9.2f}s"
            f"{theirs:8.2f}s{typical('TRL', 'sampling'):9.2f}s{theirs / ours:18.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of rollouts, side by side.")
    parser.add_argument("--model", default="micro/model")
    parser.add_argument("--questions", default="micro/validation.jsonl")
    parser.add_argument("--corpus", default="micro/corpus.jsonl")
    parser.add_argument("--num-questions", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", default="abcd", help="which of (a) to (d) to run")
    parser.add_argument(
        "--length", type=int, default=128, help="(d): tokens of a completion"
    )
    parser.add_argument(
        "--micro-batch", type=int, default=20, help="(d): sequences a forward pass"
    )
    parser.add_argument(
        "--scripted", action="store_true", help="the model says what a script says"
    )
    args = parser.parse_args()
    index = open_index(args.corpus)
    rows = load_questions(args.questions)[: args.num_questions]
    questions = [row["question"] for row in rows]
    if set(args.ways) & set("abc"):
        compare_sampling(args, questions, index)
    if "d" in args.ways:
        compare_steps(args, questions, index)


if __name__ == "__main__":
    main()
