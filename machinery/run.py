"""A run and its folder: what it samples, tests, logs, and how it goes on when stopped.

    config.json          the settings
    metrics.jsonl        a line for each test, step and mining
    trajectories.jsonl   every tested answer, a group of each GRPO stage, mined pairs
    model/               the last model, as transformers loads it
    checkpoints/last.pt  everything else that a stopped run needs

A run that is resumed ends as one that was never stopped, bit for bit.
"""

import contextlib
import json
import math
import os
import pickle
import random
import time
import zlib
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import torch

from eval import exact_match, normalize_answer, score
from machinery.adapters import add_adapters, merge_adapters
from machinery.devices import choose_device
from machinery.errors import BadInput
from machinery.json_lines import write_jsonl
from machinery.models import (
    check_sampling,
    check_training,
    frozen_copy,
    place_model,
    read_model,
    refusing,
    save_model,
)
from machinery.passages import Passage
from machinery.questions import load_questions, load_training_questions
from machinery.ranks import gather, rank, rank_count
from machinery.records import first_varied, reading_of, token_moves
from machinery.remote import RemoteRetriever
from machinery.tables import print_stages, report
from machinery.text import chat_ids, decode, whole_characters
from ofsd import Pair, privileged_prompt, token_divergences
from retriever import open_index
from rollout import Trajectory, rollout, spans, standard_prompt

try:
    import fcntl
except ImportError:  # Windows has no such locks, and does without
    fcntl = None

LIMITS = (
    "max_searches",
    "k",
    "max_tokens",
    "max_turn_tokens",
    "max_observation_tokens",
)
SHOWN_PAIRS = 20  # so many pairs of a stage are logged token by token


class Run:
    """The policy and its tools, the questions, and the files of the run.

    logs: files of the folder that grow with the run. One that is resumed cuts them to
    where its checkpoint was.
    """

    logs = ("metrics.jsonl", "trajectories.jsonl")

    def __init__(self, config, resume: bool = False):
        """What can be wrong with the input is found before any work is done."""
        self.began = time.time()
        self.config = replace(config, date=config.date or time.strftime("%Y-%m-%d"))
        name = time.strftime(f"%Y%m%d-%H%M%S-seed{config.seed}")
        self.folder = Path(config.out or f"runs/{name}")
        if self.folder.exists() and rank() == 0 and not resume:
            raise BadInput(
                f"{self.folder} exists already: choose another --out, or remove it"
            )
        self.device = choose_device(config.device)
        self.load_questions()
        self.open_retriever()
        self.load_policy()
        self.rng = random.Random(config.seed)  # draws all that is random in the run
        self.tokens_sampled = 0  # since the last line of metrics.jsonl

        # What a stage keeps in checkpoints, besides the policy.
        self.evaluations = []
        self.waiting = []  # numbers of the training questions whose turn comes
        self.mined = None  # what an OFSD stage has mined, while it lasts
        self.stage_objects = {}  # the optimizer and the teacher of a stage
        self.saved = {}  # the checkpoint, until the stage that wrote it has begun
        self.inputs = self.fingerprints()
        if resume:
            self.lock()
            self.restore()
        elif rank() == 0:
            self.folder.mkdir(parents=True)
            settings = json.dumps(asdict(self.config), indent=2)
            (self.folder / "config.json").write_text(settings + "\n", encoding="utf-8")
            self.lock()

    def load_questions(self) -> None:
        config = self.config
        self.all_test_questions = load_questions(config.eval_questions)
        self.train_set = load_training_questions(
            config.questions, self.all_test_questions, normalize_answer
        )
        self.test_set = self.all_test_questions
        if config.eval_limit > 0:
            self.test_set = self.test_set[: config.eval_limit]

    def open_retriever(self) -> None:
        config = self.config
        if config.retriever_url:
            self.retriever = RemoteRetriever(config.retriever_url)
        else:
            self.retriever = open_index(config.corpus)
        # Is the server there, and does it answer in its form?
        self.retriever.search([self.train_set[0]["question"]], config.k)

    def load_policy(self) -> None:
        config = self.config
        self.model, self.tokenizer = read_model(config.model, config.date)
        self.weights_checksum = checksum(self.model)
        with refusing(f"cannot use {config.model}"):
            check_sampling(self.model, self.tokenizer)
        with refusing(f"{config.model} cannot be trained like this"):
            if config.gradient_checkpointing:
                self.model.activation_checkpointing_enable()
            lora_rank = max(config.lora_rank, config.grpo_lora_rank)
            if lora_rank > 0:
                add_adapters(self.model, lora_rank)
            check_training(self.model)
            merge_adapters(self.model)
        self.model = place_model(self.model, self.device, config.arithmetic)
        # Kept in the tokenizer's files: the trained model brings its prompt and limits.
        if config.prompt:
            prompt = whole_characters(config.prompt)
            self.tokenizer.init_kwargs["search_prompt"] = prompt
        limits = {name: getattr(config, name) for name in LIMITS}
        self.tokenizer.init_kwargs["search_limits"] = limits
        self.ref_model = None  # pi_ref, which only a penalty needs
        if config.kl_coef > 0:
            self.ref_model = frozen_copy(self.model)

    # ------------------------------------------------------------- sampling and testing

    def next_questions(self, count: int) -> list[dict]:
        """Training questions. Each pass over all of them has an order of its own."""
        size = len(self.train_set)
        while len(self.waiting) < count:
            self.waiting += self.rng.sample(range(size), size)
        numbers = self.waiting[:count]
        self.waiting = self.waiting[count:]
        return [self.train_set[number] for number in numbers]

    def sample(
        self,
        questions: list[dict],
        *,
        group_size: int = 1,
        temperature: float = 1.0,
        prompts: list[list[int]] | None = None,
        progress: str = "",
    ) -> list[Trajectory]:
        """rollout() by the settings. Each device samples its share, and gets all."""
        config = self.config
        size = math.ceil(len(questions) / rank_count())
        share = slice(rank() * size, (rank() + 1) * size)
        if prompts is not None:
            prompts = prompts[share]
        trajectories = rollout(
            self.model,
            self.tokenizer,
            self.retriever,
            [question["question"] for question in questions[share]],
            group_size=group_size,
            temperature=temperature,
            max_searches=config.max_searches,
            k=config.k,
            seed=self.rng.randrange(2**32) + rank(),
            max_tokens=config.max_tokens,
            max_turn_tokens=config.max_turn_tokens,
            max_observation_tokens=config.max_observation_tokens,
            batch_size=config.rollout_batch,
            prompts=prompts,
            progress=progress,
        )
        everyones = []
        for part in gather(trajectories):
            everyones += part
        self.tokens_sampled += sum(sum(t.loss_mask) for t in everyones)
        return everyones

    def tested(self, stage: str) -> bool:
        return any(evaluation["stage"] == stage for evaluation in self.evaluations)

    def test(self, stage: str, edges: dict | None = None) -> None:
        """Test the policy greedily, and end a stage. edges: the teacher's, for the log.

        The checkpoint comes last. So a run that is killed earlier repeats the test.
        """
        trajectories = self.sample(
            self.test_set, temperature=0.0, progress=f"test {stage}"
        )
        metrics = score(self.test_set, trajectories)
        if edges is not None:
            metrics.update(edges)
        evaluation = self.log("eval", stage, **metrics)
        self.evaluations.append(evaluation)
        for question, trajectory in zip(self.test_set, trajectories, strict=True):
            self.append(
                "trajectories.jsonl",
                "eval",
                stage,
                id=question["id"],
                golden_answers=question["golden_answers"],
                **self.as_json(question, trajectory),
            )
        if rank() == 0:
            save_model(self.model, self.tokenizer, self.folder / "model")
            if self.config.keep_stages:
                stages = self.folder / "stages"
                stages.mkdir(exist_ok=True)
                save_model(self.model, self.tokenizer, stages / stage)
        self.mined = None
        self.stage_objects = {}
        self.checkpoint("", 0)
        em = evaluation["em"]
        searches = evaluation["searches"]
        seconds = evaluation["time_s"]
        print(f"{stage}: EM {em:.3f}, {searches:.2f} searches, {seconds:.0f} s")

    def report(self) -> None:
        """The table of all tests, and one question before and after."""
        if rank() == 0:
            report(self.folder, self.evaluations)

    # ----------------------------------------------------------------------------- logs

    def log(self, kind: str, stage: str, **metrics) -> dict:
        """Add a line to metrics.jsonl, and return it. tokens_sampled: by the policy,
        since the line before."""
        metrics["tokens_sampled"] = self.tokens_sampled
        self.tokens_sampled = 0
        time_s = time.time() - self.began
        return self.append("metrics.jsonl", kind, stage, **metrics, time_s=time_s)

    def append(self, name: str, kind: str, stage: str, **values) -> dict:
        """Add a line to a log, and return it. JSON knows no NaN: it becomes null."""
        line = {"kind": kind, "stage": stage, **values}
        if rank() == 0:
            write_jsonl(self.folder / name, [without_nan(line)], mode="a")
        return line

    def as_json(self, question: dict, trajectory: Trajectory) -> dict:
        """A trajectory for a log. text: [[who, text], ...], where who is 1 for the
        policy and 0 for the environment. em: exact match, whatever the reward is."""
        text = []
        for sampled, ids in spans(trajectory):
            text.append([int(sampled), decode(self.tokenizer, ids)])
        return {
            "question": trajectory.question,
            "answer": trajectory.answer,
            "em": exact_match(trajectory.answer, question["golden_answers"]),
            "queries": trajectory.queries,
            "finish_reason": trajectory.finish_reason,
            "text": text,
        }

    def log_group(
        self, stage: str, step: int, questions: list[dict], trajectories: list, rewards
    ) -> None:
        """A group of a stage's first step, to look at, after the update on it.

        rewards: (Q, G).
        """
        if step > 1:
            return
        number = first_varied(rewards.tolist())
        question = questions[number]
        size = rewards.shape[1]
        attempts = []
        for trajectory in trajectories[number * size : (number + 1) * size]:
            attempt = self.as_json(question, trajectory)
            attempt["tokens"] = token_moves(self.model, self.tokenizer, trajectory)
            attempts.append(attempt)
        self.append(
            "trajectories.jsonl",
            "group",
            stage,
            golden_answers=question["golden_answers"],
            rewards=rewards[number].tolist(),
            trajectories=attempts,
        )

    def log_pairs(self, stage: str, pairs: list[Pair]) -> None:
        """Mined pairs, to look at. The first of them token by token, and the very first
        also with the control's divergences: has another reference the same effect?"""
        for number, pair in enumerate(pairs):
            divergence = []
            objections = []
            if number < SHOWN_PAIRS:
                values, objections = reading_of(self.model, self.tokenizer, pair)
                for token, value in zip(pair.student.response_ids, values, strict=True):
                    divergence.append([decode(self.tokenizer, [token]), value])
            reference = self.as_json(pair.question, pair.reference)
            reference["reward"] = pair.reference_reward
            student = self.as_json(pair.question, pair.student)
            student["reward"] = pair.student_reward
            self.append(
                "trajectories.jsonl",
                "pair",
                stage,
                id=pair.question["id"],
                reference=reference,
                student=student,
                rewards=pair.rewards,
                divergence=divergence,
                objections=objections,
                control=self.control(pairs) if number == 0 else None,
            )

    def control(self, pairs: list[Pair]) -> dict | None:
        """The first pair's divergences from a teacher that reads the last pair's
        reference. None if that is of the same question, or is too long."""
        pair = pairs[0]
        other = pairs[-1].reference
        question = pair.question["question"]
        # What is as long as its own prompt fits.
        room = len(pair.prompt)
        prompt = privileged_prompt(self.tokenizer, question, other, room)
        if other.question == question or prompt is None:
            return None
        values = token_divergences(self.model, pair._replace(prompt=prompt))
        return {"question": other.question, "divergence": values}

    # ------------------------------------------------------- checkpoints, and going on

    def begin_stage(self, stage: str, **objects) -> int:
        """Show the tests so far, and note the objects of a stage: what has a state to
        save, as optimizers have.

        Where the run was stopped in this stage, they and the policy get back what was
        saved. Returns how many steps of the stage are done.
        """
        if len(self.evaluations) > 1:
            print()
            print_stages(self.evaluations)
        self.stage_objects = objects
        saved = self.saved
        self.saved = {}
        if saved.get("stage") != stage or saved["step"] == 0:
            return 0
        self.model.load_state_dict(saved["model"])
        for name, value in objects.items():
            value.load_state_dict(saved[name])
        return saved["step"]

    def end_step(self, stage: str, step: int, stats: dict) -> None:
        """Log a step, and save it where that is due."""
        no_update = not math.isfinite(stats["grad_norm"])
        self.log("step", stage, step=step, **stats, no_update=no_update)
        if step % self.config.save_every == 0:
            self.checkpoint(stage, step)

    def checkpoint(self, stage: str, step: int) -> None:
        """Save, as a whole or not at all, that `step` steps of a stage are done.

        ("", 0) stands between two stages.
        """
        if rank() > 0:
            return
        sizes = {}
        for name in self.logs:
            path = self.folder / name
            if path.exists():
                sync(path)  # a log on disk is never shorter than the checkpoint says
                sizes[name] = path.stat().st_size
        state = {
            "stage": stage,
            "step": step,
            "model": self.model.state_dict(),
            "rng": self.rng.getstate(),
            "waiting": self.waiting,
            "mined": self.mined,
            "inputs": self.inputs,
            "evaluations": self.evaluations,
            "sizes": sizes,
            "time_s": time.time() - self.began,
        }
        for name, value in self.stage_objects.items():
            state[name] = value.state_dict()
        new = self.folder / "checkpoints/new.pt"
        new.parent.mkdir(exist_ok=True)
        with new.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch hides what the file said
                raise OSError(str(error.__context__ or error)) from error
            file.flush()
            os.fsync(file.fileno())  # here a full disk is noticed at the latest
        new.replace(new.with_name("last.pt"))

    def fingerprints(self) -> dict:
        """What must be the same when the run is resumed, by the name to say it with."""
        questions = repr((self.train_set, self.all_test_questions))
        return {
            "the settings": asdict(replace(self.config, out="")),
            "the questions": sha256(questions.encode()).hexdigest(),
            "the corpus": getattr(self.retriever, "source", self.config.retriever_url),
            "the model": self.weights_checksum,
            "the prompt": chat_ids(
                self.tokenizer, standard_prompt(self.tokenizer, "?")
            ),
            "the number of devices": rank_count(),
        }

    def restore(self) -> None:
        """Go back to the last checkpoint: the policy, the random state, the logs.

        A run that was stopped before its first one begins at the beginning.
        """
        path = self.folder / "checkpoints/last.pt"
        sizes = {}
        if path.exists():
            saved = read_checkpoint(path)
            for name, value in self.inputs.items():
                if saved.get("inputs", {}).get(name) != value:
                    raise BadInput(
                        f"{self.folder}: {name} changed since this run began"
                    )
            sizes = saved["sizes"]
            self.evaluations = saved["evaluations"]
            self.waiting = saved["waiting"]
            self.mined = saved["mined"]
            self.began -= saved["time_s"]
            self.rng.setstate(saved["rng"])
            self.saved = saved
            # Inside a stage begin_stage does it, once the adapters are there.
            if saved["step"] == 0:
                self.model.load_state_dict(saved["model"])
        if rank() == 0:
            self.shorten_logs(sizes)

    def shorten_logs(self, sizes: dict[str, int]) -> None:
        """Cut from the logs what came after the checkpoint."""
        for name, size in sizes.items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size < size:
                raise BadInput(
                    f"{path} is shorter than the last checkpoint says: it is damaged,"
                    " and the run cannot go on"
                )
        for name in self.logs:
            path = self.folder / name
            if path.exists():
                with path.open("r+b") as file:
                    file.truncate(sizes.get(name, 0))

    def lock(self) -> None:
        """Refuse a run that another process is still running. The lock ends with it."""
        if rank() > 0 or fcntl is None:
            return
        self.lock_file = (self.folder / "lock").open("w")
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # somebody holds it
            message = f"{self.folder} is still being run by another process"
            raise BadInput(message) from error

    @contextlib.contextmanager
    def saying_how_to_go_on(self):
        """A context: what stops the run (no server, no room, Ctrl-C) says it."""
        try:
            yield
        except (BadInput, OSError, KeyboardInterrupt) as error:
            error.add_note(
                f"{self.command_to_go_on()} goes on from the last checkpoint"
            )
            raise

    def command_to_go_on(self) -> str:
        return f"train.py --resume {self.folder}"


def read_checkpoint(path: Path) -> dict:
    """What checkpoint() saved. Only numbers and text are read from the file. No code
    in it is run, even if it is somebody else's. Raises BadInput for what is no whole
    checkpoint."""
    try:
        with torch.serialization.safe_globals([Pair, Trajectory, Passage]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise BadInput(f"{path} is no whole checkpoint: {error}") from error


def checksum(model) -> int:
    """A number that changes with any weight of the model."""
    value = 0
    for name, tensor in model.state_dict().items():
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return value


def without_nan(value):
    """The value with None for each NaN and infinity, also within lists and dicts.

    >>> without_nan({"loss": math.nan, "divergence": [["a", math.inf], ["b", 0.5]]})
    {'loss': None, 'divergence': [['a', None], ['b', 0.5]]}
    """
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sync(path: Path) -> None:
    """Wait until the file is on the disk. Windows does so only for a writer."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def step_heading(columns: list[str]) -> str:
    """The names over the lines of step_line."""
    names = " ".join(f"{name:>8}" for name in columns)
    return f" step {names}  seconds"


def step_line(step: int, stats: dict, columns: list[str], seconds: float) -> str:
    """A step's numbers, under step_heading."""
    numbers = []
    for name in columns:
        width = max(8, len(name))
        numbers.append(f"{stats[name]:{width}.3g}")
    return f"{step:5d} {' '.join(numbers)} {seconds:8.1f}"
