"""Turn a conversation into ids, in the same way for training data, sampling and exports.

A tokenizer's chat_parts are the templates of a system prompt, a question and an answer and, in
some tokenizers, what precedes a conversation without a system prompt. In a template, the name of a
special token stands for that token; in what people write, it is plain text.
"""

import re

ROLES = ("system", "user", "assistant")  # in the order of the templates


def split_at_special_tokens(tokenizer, text):
    """Return [(piece, whether it is a special token's name), ...] of a text."""
    # Of two names that begin alike, such as <s> and <s>a, the longer one is tried first.
    names = sorted(tokenizer.special_tokens, reverse=True)
    if not names:
        return [(text, False)]
    pattern = "|".join(re.escape(name) for name in names)
    pieces = re.split(f"({pattern})", text)  # names have the odd indices
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces)]


def encode_parts(tokenizer, parts):
    """Return the ids of texts that follow each other.

    Plain text between two special tokens is encoded in one piece, even if it comes from several
    parts, because a token may span two parts.

    parts: (text, named) pairs. If named is True, the name of a special token in the text, such as
        <|user|>, means that token.
    """
    pieces = []
    for text, named in parts:
        pieces += split_at_special_tokens(tokenizer, text) if named else [(text, False)]
    ids = []
    plain = ""
    for piece, is_special in pieces:
        if is_special:
            ids += [*tokenizer.encode(plain), tokenizer.special_tokens[piece]]
            plain = ""
        else:
            plain += piece
    return ids + tokenizer.encode(plain)


def with_begin(tokenizer, ids):
    """Return ids that begin with the tokenizer's begin_id, if it has one."""
    if tokenizer.begin_id is None or ids[:1] == [tokenizer.begin_id]:
        return ids
    return [tokenizer.begin_id, *ids]


def template_of(tokenizer, role):
    """Return what stands before and after a text of this role."""
    before, _, after = tokenizer.chat_parts[ROLES.index(role)].partition("%s")
    return before, after


def encode_conversation(tokenizer, turns):
    """Return the ids of a conversation, which the next answer continues.

    turns: (role, text) pairs, whose roles are those of ROLES.
    """
    parts = []
    if len(tokenizer.chat_parts) > len(ROLES) and turns[0][0] != "system":
        parts.append((tokenizer.chat_parts[-1], True))
    for role, text in turns:
        before, after = template_of(tokenizer, role)
        parts += [(before, True), (text, False), (after, True)]
    return with_begin(tokenizer, encode_parts(tokenizer, parts))


def encode_example(tokenizer, turns):
    """Return (ids of a prompt, ids of its answer) to train on; the answer ends with end_id.

    The prompt is encoded just as when the model is asked, whatever the answer is.

    turns: (role, text) pairs, of which the last one is the answer.
    """
    *asked, (_, answer) = turns
    before, after = template_of(tokenizer, "assistant")
    prompt = encode_conversation(tokenizer, asked)
    ids = encode_parts(tokenizer, [(before, True), (answer, False), (after, True)])
    if tokenizer.end_id in ids:  # the template has it; what follows belongs to the next question
        return prompt, ids[: ids.index(tokenizer.end_id) + 1]
    return prompt, [*ids, tokenizer.end_id]
