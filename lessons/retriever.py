"""How BM25 scores a query, word by word: first in the question's words, then in the
corpus's.

    python -m lessons.retriever

The code is in retriever.py.
"""

import numpy as np

from lessons.common import MICRO, counted, relation_words
from machinery.passages import Passage, load_corpus
from machinery.terminal import Parser, run_script
from retriever import BM25, bm25_score, open_index, words

IN_THE_QUESTIONS_WORDS = "Who is mayor of Bevor Bridge?"
IN_THE_CORPUSS_WORDS = "Bevor Bridge mayor warded"
ROWS = 6  # passages that a table shows


def main() -> None:
    parser = Parser(description="How BM25 scores a query, word by word.")
    parser.parse_args()
    corpus = load_corpus(MICRO / "corpus.jsonl")
    index = open_index(MICRO / "corpus.jsonl")
    print(f"{index.size} passages. A word counts more if few of them hold it (idf).")

    show_query(index, IN_THE_QUESTIONS_WORDS)
    best = show_query(index, IN_THE_CORPUSS_WORDS)

    plain = plain_score(IN_THE_CORPUSS_WORDS, best, corpus)
    print(f"\nFor {best.id} the index says {best.score:.3f} in the last query,")
    print(f"and the plain formula, bm25_score, says {plain:.3f}.")
    print(f"Where a question says mayor, this corpus says {relation_words()['mayor']}.")
    print("Such words are what there is to learn.")
    print("Your own: python retriever.py --corpus FILE WORDS")


def show_query(index: BM25, query: str) -> Passage:
    """Print what each word adds to the best passages' scores. Returns the best."""
    print(f"\nQuery: {query}\n")
    query_words = words(query)
    print_cells("", [f"{word:>7}" for word in query_words] + ["     sum"])

    # How many passages hold each word, and so what it is worth at most.
    counts = []
    absent = []
    for word in query_words:
        count = np.count_nonzero(index.scores(word))
        counts.append(count)
        if count == 0:
            absent.append(word)
    df = np.array(counts)  # (W,) for W words
    idf = np.log(1 + (index.size - df + 0.5) / (df + 0.5))  # (W,)
    print_cells("passages", [f"{count:7}" for count in counts])
    print_cells("idf", [f"{value:7.2f}" for value in idf])

    # The best passages, one a line: what each word adds, and the sum.
    passages = index.search([query], ROWS)[0]
    for passage in passages:
        number = int(passage.id.removeprefix("p"))
        cells = [f"{index.scores(word)[number]:7.3f}" for word in query_words]
        cells.append(f"{passage.score:8.3f}  {passage.text}")
        print_cells(passage.id, cells)

    show_ties(index.scores(query))
    if absent:
        print(f"No passage holds {', '.join(absent)}.")
    return passages[0]


def print_cells(title: str, cells: list[str]) -> None:
    print(f"{title:9}{''.join(cells)}")


def show_ties(scores: np.ndarray) -> None:
    """Say how many passages share the best of the scores (N,)."""
    best = scores.max()
    ties = int(np.isclose(scores, best).sum())
    if ties > 1:
        print(f"{counted(ties, 'passage')} share the best score. A policy is shown 3.")
    else:
        print("One passage is better than all others. A policy is shown 3.")


def plain_score(query: str, passage: Passage, corpus: list[Passage]) -> float:
    """The plain formula's score of a passage, with its title, for a query."""
    texts = [f"{other.title} {other.text}" for other in corpus]
    return bm25_score(query, f"{passage.title} {passage.text}", texts)


if __name__ == "__main__":
    run_script(main)
