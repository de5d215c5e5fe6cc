"""What a user of train.py is told while there is time to do something about it."""

from machinery.text import decode, encode

HOPELESS_STEPS = 3

NOTHING_EARNED = (
    "No trajectory has earned a reward, so nothing can be learned. Does the model"
    " search and answer? python -m tools.start teaches it to (docs/faq.md)."
)


def nothing_earned(history: list[dict]) -> bool:
    """Were the first steps of a stage without any reward? True at one step only."""
    if len(history) != HOPELESS_STEPS:
        return False
    return all(step["reward"] == 0 and step["zero_var"] == 1 for step in history)


def bytes_per_token(tokenizer, questions: list[dict]) -> float:
    """Bytes of text per token, in the first 100 questions. An unknown token has none.

    A tokenizer that knows a language needs a token for some four bytes, and for three
    where it is written without spaces. The micro model reads English at about 1.5.
    """
    tokens = 0
    known_bytes = 0
    for question in questions[:100]:
        ids = encode(tokenizer, question["question"])
        tokens += len(ids)
        known = [token for token in ids if token != tokenizer.unk_token_id]
        known_bytes += len(decode(tokenizer, known).encode())
    return known_bytes / max(tokens, 1)


def foreign_words(model_name: str, tokenizer, questions: list[dict]) -> str:
    """A warning where the questions' words are not the model's, else ""."""
    if bytes_per_token(tokenizer, questions) >= 2:
        return ""
    return (
        f"The words of these questions are strange to {model_name}: it reads them"
        " nearly letter by letter, and may learn nothing. Try another --model."
    )
