"""References that an agent has written, and how far a policy moves from its start.

Everywhere else in the evidence a reference is a sibling: a right trajectory of the
policy itself. Here an agent writes it. The agent is always right, and knows the
corpus's words. There are two: the expert writes in the policy's own form, and the
foreigner in another.

    expert     <think> I need to read about Bevor Bridge.</think>
               <search> Bevor Bridge mayor warded</search>
    foreigner  <think> Who or what is the mayor of Bevor Bridge?</think>
               <search> warded mayor of Bevor Bridge</search>

Both answer every question, and rightly. They differ in form alone. So the expert shows
what better references do, and the foreigner, compared with the expert, what a foreign
form does.

OFSD shows the agent's demonstration to the teacher, and corrects the policy's own
trajectory. Fine-tuning learns the demonstration itself, and needs no pool. arms.py says
what is asked and how it is judged.
"""

from dataclasses import replace
from typing import NamedTuple

from eval import exact_match
from machinery.records import sampled_logprobs
from machinery.text import chat_ids, decode
from micro.make import TRAINED, statement, value_of
from ofsd import Pair
from rollout import Trajectory, spans, standard_prompt
from tools.imitation import as_trajectory

SHOWN = 180  # test questions whose samples say what form a policy has
SAMPLES = 5  # of each
OWN_THOUGHTS = ("I need", "It is", "Let me", "The answer")  # how the policy's begin

# ------------------------------------------------------------------- the other agent


def demonstrate(
    tokenizer, index, question: dict, k: int, *, foreign: bool
) -> Trajectory:
    """The agent's trajectory for a question of the micro world. It is always right."""
    steps = []
    queries = []
    learned = ""
    entity = question["path"][0]
    for relation, word in zip(question["chain"], question["words"], strict=True):
        if foreign:
            thought = f"Who or what is the {relation} of {entity}?"
            query = f"{word} {relation} of {entity}"
        else:
            thought = f"{learned}I need to read about {entity}."
            query = f"{entity} {relation} {word}"
        passages = index.search([query], k)[0]
        steps.append(f"<think> {thought}</think>\n<search> {query}</search>")
        steps.append(passages)
        queries.append(query)
        entity = value_of(passages[0])
        learned = f"It is {entity}. "
    last = "Now I know." if foreign else f"{learned}The answer is {entity}."
    steps.append(f"<think> {last}</think>\n<answer> {entity}</answer>")

    text = question["question"]
    prompt_ids = chat_ids(tokenizer, standard_prompt(tokenizer, text))
    trajectory = as_trajectory(tokenizer, steps, text, prompt_ids)
    return replace(trajectory, answer=entity, queries=queries)


def with_demonstrations(
    groups: list[list[Trajectory]], demonstrations: list[Trajectory]
) -> list[Trajectory]:
    """A pool whose groups begin with a demonstration each, so that mine_pairs takes it
    for the reference wherever no sibling is right with fewer searches."""
    pool = []
    for demonstration, group in zip(demonstrations, groups, strict=True):
        pool += [demonstration, *group]
    return pool


def from_demonstrations(
    pairs: list[Pair], demonstrations: list[Trajectory]
) -> list[Pair]:
    """The pairs whose reference is a demonstration."""
    theirs = {id(demonstration) for demonstration in demonstrations}
    return [pair for pair in pairs if id(pair.reference) in theirs]


# -------------------------------------------------------------- how right a student is


def right_tokens(question: dict, student: Trajectory) -> tuple[int, int]:
    """How many tokens of the policy stand after a right prefix, and how many there are.

    A prefix is called right as long as each search of it has shown a fact that the
    question's path needs: the next one, or one that was shown before. With the wrong
    word a search shows it now and then, too, so this is at most too kind.
    """
    found = 0
    right_so_far = True
    right = 0
    written = 0
    observations = iter(student.passages)
    for sampled, ids in spans(student):
        if sampled:
            written += len(ids)
            if right_so_far:
                right += len(ids)
            continue
        shown = {passage.text for passage in next(observations)}
        needed = facts_of(question)
        if found < len(needed) and needed[found] in shown:
            found += 1
        elif not shown.intersection(needed[:found]):
            right_so_far = False
    return right, written


def facts_of(question: dict) -> list[str]:
    """The passages that the question's path needs, in order."""
    facts = []
    path = question["path"]
    for number, word in enumerate(question["words"]):
        facts.append(statement(path[number], word, path[number + 1]))
    return facts


def right_share(pairs: list[Pair]) -> float:
    """The share of the students' tokens that stand after a right prefix."""
    right = 0
    written = 0
    for pair in pairs:
        pair_right, pair_written = right_tokens(pair.question, pair.student)
        right += pair_right
        written += pair_written
    return right / written


# ------------------------------------------------------------- what form a policy has


class Form(NamedTuple):
    """What samples at temperature 1 say about a policy."""

    em_sampled: float  # the mean EM
    em_best: float  # the share of the questions with a right one of SAMPLES
    answered: float  # the share of the samples with an answer
    own_thoughts: float  # the share of the turns that begin with a thought of its own
    foreign_queries: float  # the share of the queries that are the foreigner's: "of"
    kl_to_start: float  # KL(policy || start), the mean over sampled tokens, in nats


def form_of(
    policy, start, tokenizer, questions: list[dict], trajectories: list[Trajectory]
) -> Form:
    """trajectories: SAMPLES for each question, one question after another."""
    ems = []
    for number, trajectory in enumerate(trajectories):
        answers = questions[number // SAMPLES]["golden_answers"]
        ems.append(exact_match(trajectory.answer, answers))
    firsts = range(0, len(ems), SAMPLES)
    one_each = trajectories[::SAMPLES]  # a divergence takes two passes a trajectory
    best = [max(ems[first : first + SAMPLES]) for first in firsts]
    answered = [trajectory.answer is not None for trajectory in trajectories]
    return Form(
        em_sampled=sum(ems) / len(ems),
        em_best=sum(best) / len(best),
        answered=sum(answered) / len(answered),
        own_thoughts=share_of_own_thoughts(tokenizer, trajectories),
        foreign_queries=share_of_foreign_queries(trajectories),
        kl_to_start=divergence(policy, start, one_each),
    )


def share_of_own_thoughts(tokenizer, trajectories: list[Trajectory]) -> float:
    turns = 0
    own = 0
    for trajectory in trajectories:
        for sampled, ids in spans(trajectory):
            if sampled:
                thought = decode(tokenizer, ids).strip().removeprefix("<think>").strip()
                turns += 1
                if thought.startswith(OWN_THOUGHTS):
                    own += 1
    return own / turns


def share_of_foreign_queries(trajectories: list[Trajectory]) -> float:
    """The start's queries, and the expert's, never have an "of"."""
    queries = [query for trajectory in trajectories for query in trajectory.queries]
    if not queries:
        return 0.0
    return sum(" of " in query for query in queries) / len(queries)


def divergence(policy, start, trajectories: list[Trajectory]) -> float:
    """KL(policy || start) a token, estimated on the policy's own samples: the mean of
    log pi(y) - log pi_start(y)."""
    total = 0.0
    count = 0
    for trajectory in trajectories:
        now = sampled_logprobs(policy, trajectory)  # (M,)
        then = sampled_logprobs(start, trajectory)  # (M,)
        total += (now - then).sum().item()
        count += len(now)
    return total / count


# ----------------------------------------------------------------------- two halves


def em_by_half(questions: list[dict], trajectories: list[Trajectory]) -> dict:
    """EM on the questions of trained relations, and on those of the others."""
    ems = {"trained": [], "others": []}
    for question, trajectory in zip(questions, trajectories, strict=True):
        half = "trained" if set(question["chain"]) <= set(TRAINED) else "others"
        em = exact_match(trajectory.answer, question["golden_answers"])
        ems[half].append(em)
    return {half: sum(values) / len(values) for half, values in ems.items()}
