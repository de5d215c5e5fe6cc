"""Passages, and the files that hold them."""

import re
from dataclasses import dataclass

from machinery.json_lines import read_jsonl


@dataclass(frozen=True)
class Passage:
    """One passage of a corpus. The score is the retriever's, for the query asked."""

    id: str
    title: str
    text: str
    score: float = 0.0


def load_corpus(path) -> list[Passage]:
    """The passages of a file of JSON lines, plain or .gz. See to_passage."""
    return list(read_jsonl(path, to_passage))


def to_passage(row: dict, score: float = 0.0) -> Passage:
    """A passage from {"id", "title", "text"} or from {"id", "contents"}.

    Search-R1 and FlashRAG write the second: the first line of contents is the title,
    often in quotation marks. If there is also a "title", and it is not the first line
    of contents, then all of contents is text. ValueError is raised for anything else.
    """
    title = row.get("title", "")
    text = row.get("text")
    contents = row.get("contents")
    if isinstance(contents, str):
        first_line, _, rest = contents.partition("\n")
        first_line = without_quotation_marks(first_line)
        if not title or without_quotation_marks(str(title)) == first_line:
            title = first_line
            text = rest
        else:
            text = contents
    if "id" not in row or not isinstance(title, str) or not isinstance(text, str):
        raise ValueError(
            'a passage needs "id", and "text" (with a "title") or "contents"'
        )
    return Passage(str(row["id"]), title, text, score)


def without_quotation_marks(title: str) -> str:
    """The title without blanks and quotation marks around it.

    >>> without_quotation_marks(' "Ada Lovelace" ')
    'Ada Lovelace'
    """
    return re.sub(r'^"(.*)"$', r"\1", title.strip())
