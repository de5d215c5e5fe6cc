"""micro/model on 60 test questions: the table, and where it went wrong.

    python -m lessons.evaluation

The code is in eval.py.
"""

from eval import exact_match, score
from lessons.common import MICRO, load_world, relation_words
from machinery.questions import load_questions
from machinery.tables import print_results
from machinery.terminal import Parser, printable, run_script
from rollout import Trajectory, rollout

QUESTIONS = 60
SHOWN = 5


def main() -> None:
    parser = Parser(description="micro/model on the first 60 test questions.")
    parser.parse_args()
    world = load_world()
    questions = load_questions(str(MICRO / "test.jsonl"))[:QUESTIONS]
    texts = [question["question"] for question in questions]
    trajectories = rollout(
        world.model, world.tokenizer, world.index, texts, temperature=0.0
    )

    results = score(questions, trajectories)
    print_results({"micro": results})
    parts = [f"{kind} {em:.3f}" for kind, em in results["em_by"].items()]
    print(f"EM {', '.join(parts)}; ", end="")
    print(f"right and supported by a passage: {results['em_supported']:.3f}")

    mistakes = []
    for question, trajectory in zip(questions, trajectories, strict=True):
        if not exact_match(trajectory.answer, question["golden_answers"]):
            mistakes.append((question, trajectory))
    show_mistakes(mistakes)
    print("\nYour own: python eval.py --help")


def show_mistakes(mistakes: list[tuple[dict, Trajectory]]) -> None:
    """Say how many wrong answers came from a wrong word, and print the worst."""
    word_of = relation_words()
    with_wrong_word = 0
    for _, trajectory in mistakes:
        if wrote_wrong_word(trajectory, word_of):
            with_wrong_word += 1
    print(f"\n{len(mistakes)} answers are wrong. In {with_wrong_word} of them ", end="")
    print("the policy wrote another relation's word.")

    print("The worst, by searches spent:\n")
    mistakes = sorted(mistakes, key=lambda mistake: -len(mistake[1].queries))
    for question, trajectory in mistakes[:SHOWN]:
        print(printable(question["question"]))
        print(printable(f"    searched: {'; '.join(trajectory.queries)}"))
        print(printable(f"    said: {trajectory.answer}"))
        print(f"    right: {question['golden_answers'][0]}, ", end="")
        print(f"found with: {', then '.join(question['words'])}")


def wrote_wrong_word(trajectory: Trajectory, word_of: dict[str, str]) -> bool:
    """Does a query, "NAME RELATION WORD", have a word that is not the relation's?"""
    for query in trajectory.queries:
        parts = query.split()
        if len(parts) > 2 and word_of.get(parts[-2]) != parts[-1]:
            return True
    return False


if __name__ == "__main__":
    run_script(main)
