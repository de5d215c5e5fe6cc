"""A quarter of an hour on a GPU: everything that a CPU cannot tell, in one go.

    python -m bench.gpu --model smollm2/model --questions my/train.jsonl \\
        --eval-questions my/test.jsonl --corpus my/passages.jsonl --out gpu
    python -m bench.gpu --small --out gpu         # on a CPU, on micro/, in two minutes

Each part is a command of its own with a time limit, and its output goes to OUT/PART.txt
as it comes. A part that fails, or is stopped at its limit, does not stop the others:

    sampling  rollout() against transformers' generate
    losses    the losses in chunks against the plain formulas
    step      one decoding step under the profiler
    card      peak memory of 3B with adapters
    cache     sampling against a plain forward pass, in float32 and bfloat16
    start     a warm start of the model
    train     GRPO, OFSD, GRPO, each with a test, as far as the limit goes
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.settings import read_settings
from machinery.terminal import Parser, run_script
from train import Config

GRACE = 20  # seconds that a stopped part has to end by itself
SETTINGS = "configs/smollm2-135m.json"


class Part(NamedTuple):
    """A command of Python, and how many seconds it may take."""

    name: str
    limit: int
    command: list[str]


def measuring_parts(args) -> list[Part]:
    """What needs no training."""
    data = ["--model", args.model, "--questions", args.questions]
    data += ["--corpus", args.corpus, "--scripted", "--ways", "abc", "--repeats", "1"]
    sampling = ["-m", "bench.sampling", *data]
    losses = ["-m", "bench.losses"]
    step = ["-m", "bench.decode_ops"]
    card = ["-m", "bench.card", "--shapes", "3B", "--adapters", "16"]
    cache = ["-m", "pytest", "-q", "-rs", "tests/test_rollout.py"]
    cache += ["-k", "on_a_gpu"]
    if args.small:
        sampling += ["--num-questions", "2", "--group-size", "2"]
        losses += ["--positions", "20", "--hidden", "16", "--repeats", "1"]
        step += ["--layers", "2", "--vocabulary", "500"]
    return [
        Part("sampling", 100, sampling),
        Part("losses", 90, losses),
        Part("step", 60, step),
        Part("card", 90, card),
        Part("cache", 60, cache),
    ]


def training_parts(args) -> list[Part]:
    """The warm start, and the run that begins from it."""
    out = Path(args.out)
    started = str(out / "start")
    settings = read_settings(SETTINGS, Config)
    files = ["--questions", args.questions, "--corpus", args.corpus]
    start = ["-m", "tools.start", "--model", args.model, *files, "--out", started]
    train = ["train.py", "--model", started, *files, "--out", str(out / "run")]
    train += ["--eval-questions", args.eval_questions, "--rounds", "2"]
    if args.small:
        start += ["--count", "8", "--privileged", "4"]
        train += ["--grpo-steps", "1", "--questions-per-step", "2"]
        train += ["--ofsd-questions", "4", "--eval-limit", "2"]
    else:
        start += ["--count", "400", "--privileged", "200", "--batch", "8"]
        start += ["--prompt", settings.prompt, "--k", str(settings.k)]
        start += ["--max-searches", str(settings.max_searches)]
        start += ["--max-observation-tokens", str(settings.max_observation_tokens)]
        train += ["--config", SETTINGS, "--grpo-steps", "6"]
        train += ["--ofsd-questions", "96", "--eval-limit", "200"]
    return [Part("start", 90, start), Part("train", 380, train)]


def run_part(part: Part, out: Path) -> None:
    """Run a part, and print how it ended and its last line."""
    began = time.perf_counter()
    path = out / f"{part.name}.txt"
    with open(path, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", *part.command], stdout=file, stderr=file
        )
        try:
            status = process.wait(part.limit)
            ending = "ended" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            ending = "stopped at its limit"
            process.terminate()  # train.py ends as after Ctrl-C
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    seconds = time.perf_counter() - began
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    last = lines[-1] if lines else ""
    print(f"{part.name:10}{seconds:6.0f} s  {ending}: {last}", flush=True)


def print_tests(out: Path) -> None:
    """The tests of the run so far."""
    log = out / "run/metrics.jsonl"
    if not log.exists():
        return
    for row in read_jsonl(log):
        if row["kind"] == "eval":
            print(f"    {row['stage']:10} exact match {row['em']:.3f}")


def main() -> None:
    parser = Parser(description="A quarter of an hour on a GPU.")
    parser.add_argument("--model", default="micro/model")
    parser.add_argument("--questions", default="micro/train.jsonl")
    parser.add_argument("--eval-questions", default="micro/test.jsonl")
    parser.add_argument("--corpus", default="micro/corpus.jsonl")
    parser.add_argument("--out", required=True, help="the folder to write, a new one")
    parser.add_argument("--small", action="store_true", help="to try it on a CPU")
    parser.add_argument("--parts", nargs="+", help="only these")
    args = parser.parse_args()
    out = Path(args.out)
    if out.exists():
        raise BadInput(f"{out} is already there: name a new folder")
    out.mkdir(parents=True)
    for part in measuring_parts(args) + training_parts(args):
        if args.parts is None or part.name in args.parts:
            run_part(part, out)
    print_tests(out)


if __name__ == "__main__":
    run_script(main)
