r"""Evaluation: is the answer right?

The policy answers each question once, greedily, with up to max_searches searches. What
it writes between its answer tags is compared with the golden answers. The same
comparison is GRPO's reward (rewards_of).

Equations. All but the last are SQuAD's. a is the answer that a trajectory y gives,
and G the golden answers of its question. norm(a) is a in lower case, without ASCII
punctuation and articles, with single spaces. Spaces separate its words.

    em(a, G) = 1 if norm(a) = norm(g) for one of the g in G, else 0
    f1(a, G) = max over g in G of 2 p r / (p + r)
               p = c / (words of norm(a)),  r = c / (words of norm(g))
               c: size of the multiset intersection of their words
    supported(y) = 1 if norm(a) occurs, as whole words, in a passage that y retrieved

If there is no answer, or norm(a) is empty, all three are 0. The same on one page, exact
match alone: lessons/plain.py.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. The paper reports EM alone. Here F1 is reported too. The logs also have the EM
       of supported answers: a right answer without support may be a guess, or memory.
    2. The answer is read from the response only. Search-R1's scorer also reads the
       prompt, which contains an example answer.

    python eval.py --model micro/model --questions micro/test.jsonl \
                   --corpus micro/corpus.jsonl
    python -m lessons.evaluation     # the lesson: a table, and the worst answers
"""

import json
import re
import string
from collections import Counter, defaultdict
from statistics import fmean as mean

from machinery.benchmarks import (
    check_out,
    parse_flags,
    question_sets,
    save_results,
    trained_limits,
)
from machinery.models import load_model
from machinery.questions import load_questions
from machinery.remote import RemoteRetriever
from machinery.tables import by_number, interval, print_results
from machinery.terminal import run_script
from retriever import open_index
from rollout import Trajectory, rollout, standard_prompt

# load_questions is re-exported: callers of evaluate need the questions it returns.
__all__ = [
    "evaluate",
    "exact_match",
    "f1_score",
    "load_questions",
    "normalize_answer",
    "rewards_of",
    "score",
    "supported",
]

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


# ------------------------------------------------------------------ one answer


def normalize_answer(text: str) -> str:
    """norm(a) above. Accents and other Unicode stay as they are.

    >>> normalize_answer("  The U.S.A.,  a country")
    'usa country'
    """
    text = text.lower().translate(NO_PUNCTUATION)
    text = ARTICLES.sub(" ", text)
    return " ".join(text.split())


def exact_match(prediction: str | None, golden_answers: list[str]) -> float:
    """1.0 if the prediction equals one of the golden answers, all normalized, else 0.0.

    None is wrong. So is a prediction that normalizes to the empty string: "The" scores
    0. (SQuAD's script would give it 1 if a golden answer is an article, too.)

    >>> exact_match("the Beatles!", ["Rolling Stones", "Beatles"])
    1.0
    """
    answer = normalize_answer(prediction or "")
    if not answer:
        return 0.0
    for golden_answer in golden_answers:
        if normalize_answer(golden_answer) == answer:
            return 1.0
    return 0.0


def f1_score(prediction: str | None, golden_answers: list[str]) -> float:
    """How far the words agree, between 0 and 1, with the best of the golden answers.

    "yes" and "no" are ordinary words. (HotpotQA's script gives them 1 or 0.)

    >>> f1_score("John F. Kennedy", ["Kennedy"])  # p = 1/3, r = 1
    0.5
    """
    answer_words = Counter(normalize_answer(prediction or "").split())
    best = 0.0
    for golden_answer in golden_answers:
        golden_words = Counter(normalize_answer(golden_answer).split())
        # & is the multiset intersection: it counts a word that both have twice as two.
        shared = (answer_words & golden_words).total()
        if shared > 0:
            precision = shared / answer_words.total()
            recall = shared / golden_words.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def supported(trajectory: Trajectory) -> bool:
    """Does the answer occur in a passage that this very trajectory retrieved?"""
    answer = normalize_answer(trajectory.answer or "")
    if not answer:
        return False
    for passages in trajectory.passages:  # the passages of one search
        for passage in passages:
            text = normalize_answer(f"{passage.title} {passage.text}")
            # With a space at each end, "rome" is not found in "the romeo".
            if f" {answer} " in f" {text} ":
                return True
    return False


# ---------------------------------------------------------------- many answers


def rewards_of(questions: list[dict], trajectories: list[Trajectory]) -> list[float]:
    """GRPO's reward of each trajectory. Change the reward here.

    It is in this file because it is the metric itself: exact match, without shaping.
    But a reward may be any number: add a bonus for the format, or subtract a little for
    each search. OFSD ignores it: its pairs are mined by exact match, whatever the
    reward is.

    questions: Q dicts with "golden_answers". trajectories: Q groups of G, one group
    after another, as rollout() returns them. Raises ValueError if there are no
    questions, or if the trajectories do not divide into equal groups.
    """
    if not questions or len(trajectories) % len(questions) != 0:
        counts = f"{len(trajectories)} trajectories of {len(questions)} questions"
        raise ValueError(f"{counts} do not divide into equal groups")
    group_size = len(trajectories) // len(questions)
    rewards = []
    for number, trajectory in enumerate(trajectories):
        question = questions[number // group_size]
        reward = exact_match(trajectory.answer, question["golden_answers"])
        rewards.append(reward)
    return rewards


def score(questions: list[dict], trajectories: list[Trajectory]) -> dict:
    """The metrics of a test, with one trajectory per question.

    em, f1        means over the questions
    em_supported  share of the questions whose answer is right and supported
    searches      mean number of searches
    answered      share of the questions that have an answer, right or wrong
    n             number of questions
    em_by         mean EM per kind of question: its "hops", or without these its "type"

    Raises ValueError unless there are as many trajectories as questions.
    """
    ems = []
    f1s = []
    right_and_supported = []
    ems_by_kind = defaultdict(list)
    for question, trajectory in zip(questions, trajectories, strict=True):
        golden_answers = question["golden_answers"]
        em = exact_match(trajectory.answer, golden_answers)
        ems.append(em)
        f1s.append(f1_score(trajectory.answer, golden_answers))
        right_and_supported.append(em == 1.0 and supported(trajectory))
        if "hops" in question:
            ems_by_kind[f"{question['hops']}-hop"].append(em)
        elif "type" in question:
            ems_by_kind[str(question["type"])].append(em)
    em_by = {}
    for kind in sorted(ems_by_kind, key=by_number):  # 10-hop comes after 2-hop
        em_by[kind] = mean(ems_by_kind[kind])
    return {
        "em": mean(ems),
        "f1": mean(f1s),
        "em_supported": mean(right_and_supported),
        "searches": mean(len(trajectory.queries) for trajectory in trajectories),
        "answered": mean(trajectory.answer is not None for trajectory in trajectories),
        "n": len(ems),
        "em_by": em_by,
    }


def evaluate(
    model,
    tokenizer,
    retriever,
    questions: list[dict],
    *,
    k: int = 3,
    max_searches: int = 4,
    temperature: float = 0.0,
    seed: int | None = None,
    prompts: list[list[int]] | None = None,
    max_tokens: int = 2048,
    max_turn_tokens: int = 256,
    max_observation_tokens: int = 512,
    batch_size: int = 256,
    progress: str = "",
) -> dict:
    """Let the policy answer each question once, and return score().

    Temperature 0 is greedy. All other keywords and their defaults are rollout()'s.
    """
    trajectories = rollout(
        model,
        tokenizer,
        retriever,
        [question["question"] for question in questions],
        k=k,
        max_searches=max_searches,
        temperature=temperature,
        seed=seed,
        prompts=prompts,
        max_tokens=max_tokens,
        max_turn_tokens=max_turn_tokens,
        max_observation_tokens=max_observation_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return score(questions, trajectories)


# ----------------------------------------------------------------- the command


def main() -> None:
    """Evaluate a model on a set of questions, or on some of the seven benchmarks."""
    # 1. Loading a model is slow. Validate everything else first.
    flags = parse_flags()
    sets = question_sets(flags)
    shared_retriever = None  # None: each benchmark has a corpus of its own
    if flags.retriever_url:
        shared_retriever = RemoteRetriever(flags.retriever_url)
    elif flags.corpus:
        shared_retriever = open_index(flags.corpus)
    if flags.out:
        check_out(flags.out)
    model, tokenizer = load_model(
        flags.model, device=flags.device, arithmetic=flags.arithmetic
    )

    # 2. Evaluate each set, within the limits that the model was trained with. Save the
    #    settings with the results.
    limits = trained_limits(flags, tokenizer)
    results = {}
    record = {**vars(flags), **limits}
    record["prompt"] = standard_prompt(tokenizer, "{question}")
    record["results"] = results
    try:
        for question_set in sets:
            retriever = shared_retriever
            if retriever is None:
                retriever = open_index(question_set.corpus)
            result = evaluate(
                model,
                tokenizer,
                retriever,
                question_set.questions,
                progress=question_set.name,
                **limits,
            )
            result["em_interval"] = interval(result["em"], result["n"])
            results[question_set.name] = result
            if flags.out:  # after each set, so that a crash loses only the current one
                save_results(flags.out, record)

    # 3. Print whatever finished, even after an error.
    finally:
        if flags.questions and results:  # one set, which has the flag's value as name
            print(json.dumps(results[flags.questions], indent=2))
        elif results:
            print_results(results)


if __name__ == "__main__":
    run_script(main)
