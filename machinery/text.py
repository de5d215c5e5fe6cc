"""Text to token ids and back.

Foreign text, such as a question or a passage, is made harmless before a model reads it.
"""

import re
from functools import lru_cache

TAGS = (
    "<think>",
    "</think>",
    "<search>",
    "</search>",
    "<information>",
    "</information>",
    "<answer>",
    "</answer>",
)


def encode(tokenizer, text: str) -> list[int]:
    """The token ids of a piece of text, without special tokens around them."""
    return tokenizer(whole_characters(text), add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids: list[int]) -> str:
    """The text of token ids. Special tokens and white space are kept as they are."""
    return tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def cut(tokenizer, ids: list[int], longest: int) -> list[int]:
    """The first `longest` token ids, or fewer: no character is cut in two."""
    if len(ids) <= longest:
        return ids
    kept = ids[:longest]
    # A token may contain only a part of a character. That decodes to U+FFFD.
    while kept and decode(tokenizer, kept).endswith("\ufffd"):
        kept.pop()
    return kept


def chat_ids(tokenizer, content: str) -> list[int]:
    """Token ids of one user message, up to where the assistant's answer begins.

    If the tokenizer has no chat template, these are the message and a newline. The
    beginning-of-text token precedes them if the tokenizer adds it to texts.
    """
    if tokenizer.chat_template is None:
        ids = encode(tokenizer, content + "\n")
        if tokenizer.bos_token_id in tokenizer("")["input_ids"]:
            ids.insert(0, tokenizer.bos_token_id)
        return ids
    message = {"role": "user", "content": content}
    text = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=False
    )
    return encode(tokenizer, text)


def stop_tokens(model, tokenizer) -> set[int]:
    """The tokens that end a response: the tokenizer's and the model's own."""
    settings = getattr(model, "generation_config", None)
    listed = getattr(settings, "eos_token_id", None)
    if not isinstance(listed, list):
        listed = [listed]
    return {tokenizer.eos_token_id, *listed}


def closing_tokens(tokenizer) -> set[int]:
    """The tokens that can complete a closing tag: those that contain a ">"."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return {token for token, piece in enumerate(pieces) if piece and ">" in piece}


# ---------------------------------------------------------------- foreign text


def neutralise(text: str, tokenizer, tags: tuple[str, ...] = TAGS) -> str:
    """Foreign text in which tags and the tokenizer's own markup have become (tag).

    So a passage cannot end the observation, answer the question or open a turn, and you
    can see that it tried. The tokenizer decides what a tag is: many tokenizers also
    read </search> in full-width characters as the tag (NFKC). If the text contains such
    a tag, it is returned as the tokenizer reads it.
    """
    text = whole_characters(text)
    pattern = markup(tokenizer, tuple(tags))
    text = pattern.sub(put_in_round_brackets, text)
    as_read = normalized(text, tokenizer)
    if pattern.search(as_read):
        return pattern.sub(put_in_round_brackets, as_read)
    return text


def put_in_round_brackets(match: re.Match) -> str:
    """(tag) for <tag>, [tag], {tag} or |tag|."""
    return f"({match[0][1:-1]})"


@lru_cache
def markup(tokenizer, tags: tuple[str, ...]) -> re.Pattern:
    """A pattern that matches these tags, and all other bracketed markup for the model.

    The other markup is the text of tokens that were added to the vocabulary, such as
    <|im_end|> and <tool_call>, and what the chat template writes, such as [INST].
    Search-E1's own tags may be such tokens, too, but only those in `tags` are matched.
    """
    template = decode(tokenizer, chat_ids(tokenizer, "?"))
    marks = set(re.findall(r"<[^<>\s]+>|\[[^\[\]\s]+\]", template))
    for token in tokenizer.added_tokens_decoder.values():
        # An added token may be ordinary text, or even "!". That does no harm.
        if re.fullmatch(r"[<\[{|].+[>\]}|]", token.content):
            marks.add(token.content)
    marks.difference_update(TAGS)
    marks.update(tags)
    if not marks:
        return re.compile("(?!)")  # matches nothing
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


def normalized(text: str, tokenizer) -> str:
    """The text as the tokenizer rewrites it before it looks for tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    if normalizer is None:
        return text
    return normalizer.normalize_str(text)


def whole_characters(text: str) -> str:
    """The text with U+FFFD in place of each unpaired surrogate.

    JSON can contain unpaired surrogates, and tokenizers reject them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
