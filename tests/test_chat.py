"""sample.py --chat: conversations by the template of the training, from the data to a terminal."""

import base64
import json
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from terminal import Terminal
from test_hf_tokenizer import TOPICS, own_bpe, sentencepiece

import gpt
import prepare
import sample
from extras.bpe import count_words, train_bpe
from extras.chat import encode_example
from extras.documents import SPECIALS, row_document
from extras.hf_tokenizer import GPT2_PATTERN, library_state

ROOT = Path(sample.__file__).resolve().parent
CHATML = (
    "<|im_start|>system\n%s<|im_end|>\n||"
    "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n||"
    "%s<|im_end|>\n"
)
LETTERS = "\n abcdefghijklmnopqrstuvwxyz?<|>_"


# ---- A finetuned model, at a terminal ----


def conversations():
    """Return {name: (code, age)}: a name is answered by its code, and "and?" by its age."""
    rng = random.Random(0)
    begins, ends = (
        ("bo", "ka", "lu", "mi", "ne"),
        ("ra", "so", "ti", "vu", "xe", "ya", "zo", "dim", "fog", "hus"),
    )
    names = [a + b for a in begins for b in ends]
    return {name: tuple("".join(rng.choices("0123456789", k=n)) for n in (3, 2)) for name in names}


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The folder of a run on 50 conversations of two turns each, prepared by prepare.py."""
    folder, lines = tmp_path_factory.mktemp("chat"), []
    for name, (code, age) in conversations().items():
        said = zip(("user", "assistant") * 2, (name, code, "and?", age), strict=True)
        lines.append(
            json.dumps({"messages": [{"role": role, "content": text} for role, text in said]})
        )
    source = folder / "codes.jsonl"
    source.write_text(
        "\n".join([lines[0], *lines]), encoding="utf-8"
    )  # the first is for validation
    torch.set_num_threads(1)
    prepare.prepare(
        input=source, name="codes", data_dir=folder, val_fraction=0.005, tokenizer="char"
    )
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "block_size": 25}
    gpt.train(
        dataset="codes",
        data_dir=folder,
        out_dir=folder / "out",
        batch_size=50,
        max_iters=120,
        eval_interval=120,
        eval_iters=1,
        sample_tokens=0,
        device="cpu",
        dtype="float32",
        **shape,
    )
    return folder / "out"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_dozen_conversations_at_a_terminal(finetuned):
    """What was learned is answered exactly, second questions by the conversation they belong to."""
    talk = Terminal(
        ROOT / "sample.py", "--chat", "--temperature=0", "--max_tokens=8", f"--out_dir={finetuned}"
    )
    greeting = talk.read()
    assert "best.pt: step 120" in greeting and "/reset" in greeting and "/system TEXT" in greeting
    answers = conversations()
    for name in list(answers)[::4]:
        assert (talk.say(name), talk.say("and?")) == tuple(
            f"{answer}\n" for answer in answers[name]
        )
        assert talk.say("/reset") == ""
    assert "can be changed" in talk.say("/")
    time.sleep(0.3)  # Python misses a Ctrl-C between showing the prompt and waiting for input
    os.write(talk.fd, b"\x03")  # it asks again
    assert talk.read().endswith("\n> ")
    assert talk.say(name) == answers[name][0] + "\n"
    assert talk.close() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_lines_that_are_pasted_are_one_message(finetuned):
    """The vocabulary lacks the line end between them, so that one sentence refuses both lines."""
    talk = Terminal(
        ROOT / "sample.py", "--chat", "--temperature=0", "--max_tokens=8", f"--out_dir={finetuned}"
    )
    talk.read()
    names = list(conversations())
    talk.type(f"{names[0]}\n{names[1]}\n")
    shown = talk.read()
    assert shown.count("character 4 of the text, '\\n'") == 1, shown
    assert talk.say(names[2]) == conversations()[names[2]][0] + "\n"
    assert talk.close() == 0


def test_all_conversations_are_answered_exactly(finetuned, capsys):
    model, tokenizer, _ = gpt.load_checkpoint(finetuned / "best.pt")
    talk = sample.Chat(model, tokenizer, sample.Sampling(temperature=0.0, max_tokens=8))
    expected = []
    for name, answers in conversations().items():
        talk.command("/reset")
        talk.answer(name)
        talk.answer("and?")
        assert talk.turns[::2] == [name, "and?"]
        expected += answers
    assert capsys.readouterr().out.splitlines() == expected


# ---- What the model reads, against tiktoken ----


def bpe(chat=CHATML, **roles):
    """Return a byte-level BPE tokenizer in which a newline may merge with what follows."""
    tokens = [bytes([i]) for i in range(256)] + [b"\nh", b"he", b"ll", b"\nhe", b"hell"]
    ranks = " ".join(base64.b64encode(token).decode() for token in tokens)
    special = "<|endoftext|> <|im_start|> <|im_end|> <|begin|>"
    return gpt.Tokenizer(
        "bpe", ranks=ranks, pattern=r"\s?\w+|\W", special=special, chat=chat, **roles
    )


def chat_of(tokenizer, block_size=1000, answers=(), system="", **sampling):
    """Return a Chat whose model gives the answers, lists of ids, in turn.

    model.asked holds what it was asked: (ids, max_tokens).
    """
    model = SimpleNamespace(
        config=SimpleNamespace(block_size=block_size), asked=[], left=list(answers)
    )

    def generate(idx, max_tokens, **_):
        model.asked.append((idx[0], max_tokens))
        for token in model.left.pop(0)[:max_tokens]:
            if isinstance(token, BaseException):
                raise token
            yield torch.tensor([token])

    model.generate = generate
    return sample.Chat(model, tokenizer, sample.Sampling(**sampling), system)


@pytest.mark.parametrize("system", ["", "be brief, hello"])
def test_the_ids_are_those_of_the_rendered_conversation(system):
    """Plain text is encoded in one stretch between special tokens, as if all were one text."""
    tokenizer = bpe()
    talk = chat_of(tokenizer, system=system)
    rendered = "<|im_start|>system\nbe brief, hello<|im_end|>\n" * bool(system)
    rendered += "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhe<|im_end|>\n"
    rendered += "<|im_start|>user\nhell?<|im_end|>\n<|im_start|>assistant\n"
    expected = tokenizer.encoding.encode(rendered, allowed_special="all")
    assert (
        tokenizer.encoding.encode_single_token(b"\nhe") in expected
    )  # apart, "\n" and "he" would not merge
    assert talk.encode(["hello", "he", "hell?"]) == expected


def test_names_of_special_tokens_that_are_typed_are_text():
    """They become ordinary tokens, together with the plain text around them."""
    tokenizer = bpe()
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    plain = tokenizer.encoding.encode_ordinary
    ids = chat_of(tokenizer).encode(["hello<|im_end|>\nhe", "<|im_start|>", "<|endoftext|>"])
    assert ids == [
        *(start, *plain("user\nhello<|im_end|>\nhe"), end, *plain("\n")),
        *(start, *plain("assistant\n<|im_start|>"), end, *plain("\n")),
        *(start, *plain("user\n<|endoftext|>"), end, *plain("\n")),
        *(start, *plain("assistant\n")),
    ]


def vocabularies():
    """Return {name: Tokenizer}: of characters, and those that merge, with and without the marks."""
    words = count_words([TOPICS[:100_000]], GPT2_PATTERN)
    tokens = train_bpe(words, 900)
    chatml = {"special": "<|im_start|> <|im_end|>", "end": "<|im_end|>", "chat": CHATML}
    library = library_state(sentencepiece(metaspace=False)) | {"end": "</s>", "begin": "<s>"}
    chars = "".join(sorted(set("".join(SAID) + LETTERS)))
    return {
        "characters": gpt.Tokenizer("char", chars, special=SPECIALS),
        "own byte pairs": own_bpe(tokens, special=SPECIALS),
        "GPT-2's marks": own_bpe(tokens, special="<|endoftext|>"),
        "ChatML": own_bpe(tokens, **chatml),
        "SentencePiece": gpt.Tokenizer(**library),
    }


SAID = ["hello", " the", "What is", "?", "\n", "\n\n", "  ", "don't", "42", "naïve", "日本", "<"]
SAID += ["|>", "user", "<|user|>", "<|im_end|>", "print(x)", "**", "I'm", "."]


@pytest.mark.parametrize(
    "name", ["characters", "own byte pairs", "GPT-2's marks", "ChatML", "SentencePiece"]
)
def test_a_conversation_is_asked_as_it_was_trained(name):
    """Token for token, for random conversations; only the last answer has weight."""
    tokenizer = vocabularies()[name]
    encoder = prepare.Encoder(tokenizer.state, "uint32")
    draw = random.Random(3)
    for _ in range(int(os.environ.get("FUZZ", "1")) * 60):
        texts = ["".join(draw.choices(SAID, k=draw.randint(0, 6))) for _ in range(6)]
        system, *said = texts
        n = draw.choice([2, 4])
        messages = [{"role": "system", "content": system}] if draw.random() < 0.5 else []
        system = system if messages else ""
        for i, text in enumerate(said[:n]):
            messages.append({"role": ("user", "assistant")[i % 2], "content": text})
        document = row_document("here", {"messages": messages})
        assert len(document) == n // 2
        talk = chat_of(tokenizer, system=system)
        for i, segment in enumerate(document):
            ids, weights, _ = encoder.encode_batch([("train", *segment)])["train"]
            ids = ids.tolist()
            asked = talk.encode(said[: 2 * i + 1])
            assert ids[: len(asked)] == asked
            answer = ids[len(asked) :]
            assert answer.pop() == tokenizer.end_id
            space = " " if name == "SentencePiece" and answer else ""  # it stands before a text
            assert tokenizer.decode(answer) == space + said[2 * i + 1]
            assert weights.tolist() == [0] * len(asked) + [255] * (len(ids) - len(asked))


def test_marks_that_the_tokenizer_lacks_are_spelled_in_one_text_with_what_people_say():
    """As a prompt is that holds the marks; tiktoken encodes it as a whole."""
    tokenizer = vocabularies()["GPT-2's marks"]
    turns = [("user", "What is the capital of France?"), ("assistant", "Paris")]
    prompt, answer = encode_example(tokenizer, turns)
    text = "<|user|>What is the capital of France?<|assistant|>"
    assert prompt == tokenizer.encode(text) == sample.encode_prompt(tokenizer, text)
    assert answer == [*tokenizer.encode("Paris"), tokenizer.end_id]


def test_a_token_that_begins_every_text_begins_the_conversation_once():
    begin = bpe().special_tokens["<|begin|>"]
    for chat in (CHATML, "<|begin|>%s||<|begin|>%s<|im_start|>||%s"):
        ids = chat_of(bpe(chat, begin="<|begin|>")).encode(["he"])
        assert ids[0] == begin and ids.count(begin) == 1


# ---- Turns ----


def letters(**roles):
    return gpt.Tokenizer(
        "char", LETTERS, special="<|endoftext|> <|user|> <|assistant|> <|eot|>", **roles
    )


def readable(tokenizer, ids):
    return "".join(map(tokenizer.decode, ([i] for i in ids)))


@pytest.mark.parametrize(
    ("end", "chat", "stop", "said", "remembered"),
    [
        ("<|endoftext|>", gpt.CHAT, "<|endoftext|>", "abc<|endoftext|>d", "abc"),
        ("<|eot|>", gpt.CHAT, "<|endoftext|>", "abc<|eot|>d", "abc"),
        ("<|eot|>", gpt.CHAT, "", "abc<|eot|>d", "abc"),
        ("<|eot|>", gpt.CHAT, "bc||x", "abc<|eot|>d", "a"),
        ("", gpt.CHAT, "", "abc<|eot|>d", "abc<|eot|>d"),
        ("", gpt.CHAT + "<|eot|>\n", "", "abc<|eot|>d", "abc"),
        ("", gpt.CHAT + "\n", "", "abc\nd", "abc"),
        ("", gpt.CHAT + "\n", "", "abc", "abc"),
    ],
)
def test_what_ends_an_answer(end, chat, stop, said, remembered, capsys):
    """The tokenizer's end, what follows an answer in the template, and the stop strings."""
    tokenizer = letters(end=end, chat=chat)
    answers = [sample.encode_prompt(tokenizer, said), []]
    talk = chat_of(tokenizer, answers=answers, stop=stop)
    talk.answer("who")
    assert capsys.readouterr().out == remembered + "\n"
    talk.answer("and?")
    assert talk.turns == ["who", remembered, "and?", ""]
    after = chat.split("%s")[-1]  # in the history the whole of the template's part stands
    asked = f"<|user|>who<|assistant|>{remembered}{after}<|user|>and?<|assistant|>"
    assert readable(tokenizer, talk.model.asked[1][0]) == asked


def test_the_oldest_turns_are_dropped_whole(capsys):
    """As many are as the answer needs, but not the system text; one note tells the user."""
    tokenizer = letters()
    answers = [tokenizer.encode("xxxx")] * 9
    talk = chat_of(tokenizer, 26, answers, system="sys", max_tokens=4)
    asked = []
    for question in ("aaa", "bbb", "c", "d", "hhhhhhhhhhhhhh"):
        talk.answer(question)
        asked.append(readable(tokenizer, talk.model.asked[-1][0]))
        assert len(talk.model.asked[-1][0]) + 4 <= 26 and talk.model.asked[-1][1] == 4
        assert capsys.readouterr().err.count("note") == (question == "c")
    one = "<|user|>{}<|assistant|>"
    a, b, c = (one.format(text) + "xxxx" for text in ("aaa", "bbb", "c"))
    assert asked[0] == "sys" + one.format("aaa")  # 8 tokens
    assert asked[1] == "sys" + a + one.format("bbb")  # 17
    assert asked[2] == "sys" + b + one.format("c")  # 15, with a 24 and 4 to come
    assert asked[3] == "sys" + b + c + one.format("d")  # 22, which 4 more just fit
    assert asked[4] == "sys" + one.format("hhhhhhhhhhhhhh")  # 19
    assert talk.turns == ["hhhhhhhhhhhhhh", "xxxx"]
    talk.command("/reset")
    talk.answer("hhhhhhhhhhhhhh")
    talk.answer("a")
    assert capsys.readouterr().err.count("note") == 1


def test_a_message_too_long_is_refused_and_forgotten(capsys):
    """One that leaves some room is answered within it, after a note; else the turns stay."""
    tokenizer = letters()
    talk = chat_of(tokenizer, 16, [tokenizer.encode("xy")] * 3, max_tokens=9)
    talk.answer("a")
    with pytest.raises(ValueError, match=r"have 16 tokens, but the model sees only 16: shorten"):
        talk.answer("a" * 14)
    assert talk.turns == ["a", "xy"] and len(talk.model.asked) == 1
    assert not capsys.readouterr().err
    talk.answer("a" * 13)
    assert "the context has room for 1 more token" in capsys.readouterr().err
    assert talk.model.asked[1][1] == 1
    talk.answer("a" * 6)
    assert talk.model.asked[2][1] == 8 and not capsys.readouterr().err


def test_an_answer_is_cut_at_the_end_of_the_context(capsys):
    """More max_tokens than half the block are granted as far as the block reaches."""
    tokenizer = letters()
    talk = chat_of(tokenizer, 16, [tokenizer.encode("x" * 30)])
    talk.answer("a")
    assert talk.model.asked[0][1] == 13
    assert talk.turns == ["a", "x" * 13]


# ---- Commands ----


@pytest.fixture
def type_lines(monkeypatch, capsys):
    """Return a function that types lines into a Chat and gives (stdout's lines, stderr)."""

    def run(talk, *lines):
        left = list(lines)
        monkeypatch.setattr(
            "builtins.input", lambda _: left.pop(0) if left else (_ for _ in ()).throw(EOFError)
        )
        capsys.readouterr()
        sample.interact("Hello.", talk.answer, talk.command)
        out, err = capsys.readouterr()
        return out.splitlines()[1:-1], err

    return run


def test_reset_and_system_begin_a_new_conversation(type_lines):
    tokenizer = letters()
    talk = chat_of(tokenizer, answers=[tokenizer.encode("yes")] * 6, system="old")
    lines = ("a", "b", "/reset", "c", "/system be kind", "d", "e", "/system", "f")
    assert type_lines(talk, *lines) == (["yes"] * 6, "")
    one = "<|user|>{}<|assistant|>"
    assert [readable(tokenizer, ids) for ids, _ in talk.model.asked] == [
        "old" + one.format("a"),
        "old" + one.format("a") + "yes" + one.format("b"),
        "old" + one.format("c"),
        "be kind" + one.format("d"),
        "be kind" + one.format("d") + "yes" + one.format("e"),
        one.format("f"),
    ]


def test_other_commands_are_settings(type_lines):
    """They leave the conversation as it is; a mistake, also in the system text, changes nothing."""
    tokenizer = letters()
    talk = chat_of(tokenizer, answers=[tokenizer.encode("yes")] * 2)
    out, _ = type_lines(talk, "a", "/max_tokens=2", "/foo", "/resett", "/system A", "B", "b")
    assert (out[0], out[5:]) == ("yes", ["ye"])
    assert "can be changed" in out[1] and "can be changed" in out[2]
    assert "text, 'A', is not" in out[3] and "text, 'B', is not" in out[4]
    assert talk.turns == ["a", "yes", "b", "ye"]
    assert (talk.system, talk.sampling.max_tokens) == ("", 2)
    assert (sample.system, sample.max_tokens) == ("", 100), "the script's own settings stay"


def test_ctrl_c_ends_the_answer_only(type_lines):
    """What was said so far is remembered."""
    tokenizer = letters()
    talk = chat_of(
        tokenizer, answers=[[*tokenizer.encode("ye"), KeyboardInterrupt()], tokenizer.encode("no")]
    )
    assert type_lines(talk, "a", "b")[0] == ["ye", "no"]
    assert talk.turns == ["a", "ye", "b", "no"]


def test_a_tokenizer_without_the_templates_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"lacks <\|assistant\|> and <\|user\|>: --chat needs a model .*messages"
    ):
        chat_of(gpt.Tokenizer("char", LETTERS))
    chat_of(gpt.Tokenizer("char", LETTERS, chat="%s\n||you? %s\nme? ||%s\n"))  # needs none


# ---- Templates whose end token ends each turn ----


@pytest.mark.parametrize("default", ["", "||<|im_start|>system\nbe kind<|im_end|>\n"])
def test_a_row_holds_the_whole_conversation_before_an_answer(tmp_path, default):
    """ChatML ends a question as it ends an answer. Rows must not begin after the question.

    Answers that are rated 1 teach nothing, and must not become a part of other examples.
    """
    tokens = train_bpe(count_words([TOPICS[:20_000]], GPT2_PATTERN), 300)
    special = "<|im_start|> <|im_end|>"
    tokenizer = own_bpe(tokens, special=special, end="<|im_end|>", chat=CHATML + default)
    (tmp_path / "data" / "own").mkdir(parents=True)
    gpt.write_dataset(tmp_path / "data" / "own", "a text " * 30, tokenizer, "tests")
    rows, expected = [], []
    for i in range(40):
        said = [("system", f"rule {i}")] * (i % 3 == 0) + [("user", f"question {i}?")]
        said.append(("assistant", f"answer {i}"))
        if i % 4 == 1:
            said += [("user", "and then?"), ("assistant", f"then {i}")]
        messages = [{"role": role, "content": text} for role, text in said]
        rating = 1 if i % 5 == 2 else 5
        rows.append(json.dumps({"messages": messages, "rating": rating}))
        for n in range(2, len(said) + 1):
            if i % 10 and rating == 5 and said[n - 1][0] == "assistant":  # 0, 10, ... are for val
                prompt, answer = encode_example(tokenizer, said[:n])
                expected.append((tuple(prompt + answer), len(answer)))
    (tmp_path / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    settings = {"data_dir": str(tmp_path / "data"), "name": "chats"}
    tokenizer_path = str(tmp_path / "data" / "own")
    prepare.prepare(input=str(tmp_path / "chats.jsonl"), tokenizer=tokenizer_path, **settings)

    longest = max(len(ids) for ids, _ in expected)
    data = gpt.Data(tmp_path / "data" / "chats", block_size=longest)
    n_rows = data.n_rows("train")
    x, y, w = data.get_batch("train", 0, n_rows)
    found = []
    for inputs, targets, weights in zip(x.tolist(), y.tolist(), w.tolist()):
        learned = [i for i, weight in enumerate(weights) if weight]
        assert set(weights) == {0.0, 1.0}
        last = learned[-1]
        found.append((tuple(inputs[: last + 1] + targets[last : last + 1]), len(learned)))
    assert sorted(found) == sorted(expected)
    assert data.n_empty == 0
    assert prepare.document_lengths(data).max() >= longest - 1
