"""evaluate.py: figures of a text or a validation split against windows by plain arithmetic."""

import base64
import itertools
import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEXT
from torch.nn import functional as F

import evaluate
import gpt

CHARS = "".join(sorted(set(TEXT)))
N_CHARS = len(CHARS)
SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
SHAPE |= {"qk_norm": False, "tie_weights": True}


def random_model(vocab_size=N_CHARS, **changes):
    """Return a model whose weights, also those that begin as 0, are random."""
    torch.manual_seed(0)
    values = SHAPE | {"vocab_size": vocab_size, "dropout": 0.1} | changes
    model = gpt.GPT(gpt.GPTConfig(**values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def save(path, model, tokenizer, **more):
    """Save a model as a run's best.pt, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "model_args": vars(model.config), "step": 7}
    gpt.save_checkpoint(path, state | {"tokenizer": tokenizer.state} | more)
    return path


def hand_loss(model, ids, stride, block_size=16):
    """Return the mean loss of ids[1:] in windows `stride` apart, each target counted once."""
    nats = 0.0
    counted = 0
    start = 0
    while counted < len(ids) - 1:
        window = ids[start : start + block_size + 1]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0][0]
        losses = F.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
        new = start + len(window) - 1 - counted
        nats += float(losses[-new:].double().sum())
        counted += new
        start += stride
    return nats / counted


# ---- Texts ----
@pytest.mark.parametrize("n_chars", [2, 16, 17, 18, 33, 300])
def test_a_text_is_read_in_windows(n_chars):
    """Loss, perplexity, bits per byte and tokens are right for any length, stride and batch."""
    model, tokenizer = random_model(), gpt.Tokenizer("char", CHARS)
    text = TEXT[700 : 700 + n_chars]
    for stride, batch_size, block_size in itertools.product((0, 16, 20, 5, 1), (1, 7), (None, 11)):
        figures = evaluate.evaluate_text(model, tokenizer, text, block_size, stride, batch_size)
        longest = block_size or 16
        step = min(stride or longest, longest)
        expected = hand_loss(model, tokenizer.encode(text), step, longest)
        assert figures == pytest.approx(
            {
                "loss": expected,
                "perplexity": math.exp(expected),
                "bits_per_byte": expected / math.log(2),
                "tokens": n_chars,
            },
            rel=1e-4,
        )


def test_a_text_begins_as_all_texts_do():
    """A tokenizer's begin token is seen first, so that the first character, too, is a target."""
    tokenizer = gpt.Tokenizer("char", CHARS[:-1], special="<s>", begin="<s>")
    text = "".join(c for c in TEXT[700:760] if c != CHARS[-1])
    model, ids = random_model(), [tokenizer.begin_id, *tokenizer.encode(text)]
    figures = evaluate.evaluate_text(model, tokenizer, text)
    assert (ids[0], figures["tokens"]) == (len(CHARS) - 1, len(text))
    assert figures["loss"] == pytest.approx(hand_loss(model, ids, 16), abs=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2), abs=1e-6)
    assert evaluate.evaluate_text(model, tokenizer, text[0])["tokens"] == 1


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """Models that give each character a chance in 40, by characters or pairs, use the same bits."""
    text = "".join("abcdefgh"[i * i % 8] for i in range(200))
    pairs = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    ranks = " ".join(base64.b64encode(pair.encode()).decode() for pair in pairs)
    for tokenizer, choices in (
        (gpt.Tokenizer("char", "abcdefgh"), 40),
        (gpt.Tokenizer("bpe", ranks=ranks, pattern="(?s:..)"), 1600),
    ):

        def says_anything(x, y, weights, loss_only, choices=choices):
            return None, torch.tensor(math.log(choices))

        model = SimpleNamespace(
            config=SimpleNamespace(block_size=4),
            ln_f=SimpleNamespace(weight=torch.zeros(1)),
            eval=lambda: None,
        )
        found = evaluate.mean_loss(Callable(model, says_anything), batches(tokenizer, text))
        n_tokens = len(tokenizer.encode(text))
        figures = gpt.loss_figures(found, n_tokens, len(text.encode()))
        assert figures["bits_per_byte"] == pytest.approx(math.log2(40))
        assert figures["perplexity"] == pytest.approx(choices)


class Callable:
    """An object with a model's attributes that is called like a function."""

    def __init__(self, model, function):
        self.__dict__ |= vars(model)
        self.function = function

    def __call__(self, *args, **options):
        return self.function(*args, **options)


def batches(tokenizer, text):
    return evaluate.window_batches(np.array(tokenizer.encode(text)), 4, 0, 3)


def test_bytes_not_characters_divide_the_bits():
    """An accented letter is two bytes of UTF-8."""
    tokenizer = gpt.Tokenizer("char", "aé")
    figures = evaluate.evaluate_text(random_model(2), tokenizer, "aéaéaéaé")
    bits = figures["loss"] / math.log(2) * 8
    assert figures["bits_per_byte"] == pytest.approx(bits / 12)


@pytest.mark.parametrize("text", ["", "1"])
def test_a_text_without_a_target_is_refused(text):
    """A mean over nothing is no figure."""
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        evaluate.evaluate_text(random_model(), gpt.Tokenizer("char", CHARS), text)


def test_dropout_is_off_and_bfloat16_is_near():
    model, tokenizer = random_model().train(), gpt.Tokenizer("char", CHARS)
    text = TEXT[:500]
    exact = evaluate.evaluate_text(model, tokenizer, text)["loss"]
    assert evaluate.evaluate_text(model, tokenizer, text)["loss"] == exact
    rounded = evaluate.evaluate_text(model, tokenizer, text, dtype=torch.bfloat16)["loss"]
    assert 0 < abs(rounded - exact) < 0.02 * exact


def test_perplexity_is_transformers():
    """The same windows through transformers, with its own loss, give the same perplexity."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=len(CHARS), n_positions=16, n_embd=32, n_layer=2, n_head=4
    )
    config.bos_token_id = config.eos_token_id = 0
    gpt2 = {"bias": True, "n_kv_head": 4, "use_rope": False, "use_rms_norm": False}
    model = random_model(**gpt2, use_swiglu=False, tie_weights=True)
    other = transformers.GPT2LMHeadModel(config).eval()
    weights = {}
    for name, weight in model.state_dict().items():
        linear = ".c_" in name and name.endswith("weight")  # which GPT-2 stores transposed
        weights["transformer." + name] = weight.T if linear else weight
    weights["lm_head.weight"] = weights.pop("transformer.lm_head.weight")
    other.load_state_dict(weights, strict=False)

    tokenizer, text, stride = gpt.Tokenizer("char", CHARS), TEXT[5000:5400], 8
    ids = torch.tensor([tokenizer.encode(text)])
    nats, n, end = 0.0, 0, 1
    for begin in range(0, ids.size(1), stride):
        last = min(begin + 17, ids.size(1))
        inputs, targets = ids[:, begin : last - 1], ids[0, begin + 1 : last]
        with torch.no_grad():
            losses = F.cross_entropy(other(inputs).logits[0], targets, reduction="none")
        nats += float(losses[max(end - begin - 1, 0) :].sum())
        n, end = n + last - max(end, begin + 1), last
        if last == ids.size(1):
            break
    assert n == ids.size(1) - 1
    figures = evaluate.evaluate_text(model, tokenizer, text, stride=stride)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-4)


# ---- Data sets ----
@pytest.mark.parametrize("stride", [0, 4])
def test_a_validation_split_is_read_as_a_text_is(tmp_path, stride):
    model, tokenizer = random_model(), gpt.Tokenizer("char", CHARS)
    gpt.write_dataset(tmp_path / "toy", TEXT, tokenizer, "tests")
    figures = evaluate.evaluate_dataset(model, tokenizer, tmp_path / "toy", 16, stride)
    held_back = TEXT[int(0.9 * len(TEXT)) :]
    expected = hand_loss(model, tokenizer.encode(held_back), stride or 16)
    assert figures["loss"] == pytest.approx(expected, abs=1e-5)
    assert figures == pytest.approx(evaluate.evaluate_text(model, tokenizer, held_back, 16, stride))


def test_examples_are_weighed_and_do_not_overlap(tmp_path, write_examples):
    """Each example's targets count by their weights; there are no bits per byte of half a text."""
    examples = [(("7+8=", 0), ("15", 255)), (("2+2=", 0), ("4", 51)), (("1+1=", 0), ("2", 0))]
    folder = write_examples(tmp_path / "sums", "0123456789+=", train=examples, val=examples)
    tokenizer = gpt.Data(folder, 16).tokenizer
    model = random_model(tokenizer.vocab_size)
    nats, total = 0.0, 0.0
    for example in examples:
        ids = [i for text, _ in example for i in tokenizer.encode(text)] + [tokenizer.end_id]
        (prompt, _), (_, weight) = example
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0][0]
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        answer = losses[len(prompt) - 1 :]
        nats += weight / 255 * float(answer.sum())
        total += weight / 255 * len(answer)
    figures = evaluate.evaluate_dataset(model, tokenizer, folder, batch_size=2)
    assert figures["loss"] == pytest.approx(nats / total, abs=1e-5)
    assert "bits_per_byte" not in figures
    with pytest.raises(ValueError, match="stride is 4: .* holds examples, which need stride 0"):
        evaluate.evaluate_dataset(model, tokenizer, folder, stride=4)


def test_a_data_set_of_another_tokenizer_is_refused(tmp_path):
    gpt.write_dataset(tmp_path / "toy", "ab" * 300, gpt.Tokenizer("char", "ab"), "tests")
    with pytest.raises(ValueError, match="a different tokenizer"):
        evaluate.evaluate_dataset(random_model(2), gpt.Tokenizer("char", "ba"), tmp_path / "toy")


# ---- The script ----
@pytest.fixture
def measure(monkeypatch, tmp_path, capsys):
    """Return a function that runs evaluate.main() with some settings, and gives what it prints."""
    tokenizer = gpt.Tokenizer("char", CHARS)
    save(tmp_path / "run" / "best.pt", random_model(), tokenizer)
    (tmp_path / "text.txt").write_bytes(TEXT[:400].encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    def run(**values):
        for name, value in ({"device": "cpu", "dtype": "float32"} | values).items():
            assert name in evaluate.SETTINGS, name
            monkeypatch.setattr(evaluate, name, value)
        evaluate.main()
        return capsys.readouterr().out

    return run


def test_the_line_that_is_printed(measure, tmp_path):
    model, tokenizer = random_model(), gpt.Tokenizer("char", CHARS)
    loss = hand_loss(model, tokenizer.encode(TEXT[:400]), 16)
    path = tmp_path / "run" / "best.pt"
    assert measure(text="~/text.txt", out_dir="~/run") == (
        f"{path}, ~/text.txt, 400 tokens: loss {loss:.4f}, perplexity {math.exp(loss):.4f}, "
        f"bits per byte {loss / math.log(2):.4f}\n"
    )


def test_models_and_texts_by_other_names(measure, tmp_path, monkeypatch):
    """A checkpoint by its file or folder, a data set, a Hugging Face id, which hub.py reads."""
    line = measure(text="~/text.txt", out_dir="~/run").split("tokens: ")[1]
    assert measure(out_dir="", checkpoint="~/run/best.pt").endswith(line)
    assert measure(checkpoint="", init_from="~/run").endswith(line)
    asked = []

    def load_pretrained(name):
        asked.append(name)
        return gpt.load_checkpoint(tmp_path / "run")

    monkeypatch.setitem(sys.modules, "hub", SimpleNamespace(load_pretrained=load_pretrained))
    assert measure(init_from="someone/model").endswith(line)
    assert asked == ["someone/model"]

    tokenizer = gpt.Tokenizer("char", CHARS)
    gpt.write_dataset(tmp_path / "data" / "toy", TEXT[:400], tokenizer, "tests", val_fraction=1)
    options = {"text": "", "dataset": "toy", "data_dir": "~/data"}
    assert measure(init_from="~/run", **options).endswith(line)
    monkeypatch.setattr(evaluate, "HERE", tmp_path)
    save(tmp_path / "out" / "toy" / "best.pt", random_model(), tokenizer)
    assert measure(init_from="", **options).endswith(line)


def test_a_byte_order_mark_is_no_part_of_the_text_and_line_ends_are(measure, tmp_path):
    text = TEXT[:400].replace("\n", "\r\n")
    tokenizer = gpt.Tokenizer("char", CHARS + "\r")
    save(tmp_path / "crlf" / "best.pt", random_model(N_CHARS + 1), tokenizer)
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert f" {len(text)} tokens: " in measure(text="~/text.txt", out_dir="~/crlf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt"),
        (b"\xff\xfe", "text.txt"),
        (b"1", "2 tokens"),
        (b"7 ~ 8", "'~', is not in the vocabulary"),
    ],
)
def test_texts_that_cannot_be_evaluated(measure, tmp_path, content, message):
    """No file, no UTF-8, no two tokens, an unknown character."""
    (tmp_path / "text.txt").unlink()
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measure(text=str(tmp_path / "text.txt"), out_dir="~/run")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one of --text=FILE, --dataset=NAME or --choices=FILE"),
        ({"text": "a", "dataset": "b"}, "one of --text=FILE, --dataset=NAME or --choices=FILE"),
        ({"text": "a"}, "name a model, with --out_dir=RUN"),
        ({"dataset": "b", "stride": -1}, "stride is -1: it must be at least 0"),
        (
            {"choices": "q", "out_dir": "run", "stride": 5},
            "stride is 5, but --choices has no windows",
        ),
        ({"dataset": "b", "block_size": 0}, "block_size is 0: it must be at least 1"),
        ({"dataset": "b", "batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"dataset": "b", "dtype": "float16"}, "dtype is 'float16': it must be auto, float32"),
        ({"dataset": "b", "out_dir": "nowhere"}, "best.pt does not exist"),
    ],
    ids=str,
)
def test_settings_without_a_meaning(measure, values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measure(**values)


def test_evaluate_as_a_command(run_script, tmp_path):
    save(tmp_path / "run" / "best.pt", random_model(), gpt.Tokenizer("char", CHARS))
    (tmp_path / "text.txt").write_bytes(TEXT[:400].encode())
    options = ("--out_dir=run", "--device=cpu", "--dtype=float32")
    done = run_script("evaluate.py", "--text=text.txt", "--stride", "4", *options, cwd=tmp_path)
    model, tokenizer = random_model(), gpt.Tokenizer("char", CHARS)
    loss = hand_loss(model, tokenizer.encode(TEXT[:400]), 4)
    assert done.returncode == 0, done.stderr
    assert f"text.txt, 400 tokens: loss {loss:.4f}, perplexity" in done.stdout
    done = run_script("evaluate.py", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: name what to evaluate on, with one of --text=FILE, --dataset=NAME or --choices=FILE\n"
    )


# ---- Multiple choice ----
def write_questions(path, n=40):
    draw = random.Random(1)
    sentences = TEXT.split("\n")
    rows = []
    for _ in range(n):
        *endings, whole = draw.choices(sentences, k=4)
        cut = whole.index(" is ")
        endings.append(whole[cut + 1 :])
        row = {"ctx": whole[:cut], "endings": endings, "label": draw.choice([3, "3", 0])}
        rows.append(row)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return rows


@pytest.mark.parametrize("batch_size", [1, 7])
def test_choices_are_scored_as_by_hand(tmp_path, batch_size):
    """The log-probability of each ending after its context, one by one, in windows of 16 tokens."""
    model, tokenizer = random_model(), gpt.Tokenizer("char", CHARS)
    rows = write_questions(tmp_path / "q.jsonl")
    right, normed = 0, 0
    for row in rows:
        scores = []
        for ending in row["endings"]:
            ids = tokenizer.encode(f"{row['ctx']} {ending}")
            n = min(len(ending) + 1, 16)
            window = torch.tensor([ids[-17:]])
            with torch.no_grad():
                log_probs = model(window[:, :-1])[0][0].log_softmax(-1)
            scores.append(sum(float(log_probs[-k, ids[-k]]) for k in range(1, n + 1)))
        lengths = [len(ending) for ending in row["endings"]]
        right += scores.index(max(scores)) == int(row["label"])
        per_character = [score / n for score, n in zip(scores, lengths, strict=True)]
        normed += per_character.index(max(per_character)) == int(row["label"])
    figures = evaluate.evaluate_choices(model, tokenizer, tmp_path / "q.jsonl", batch_size)
    assert figures == {"acc": right / 40, "acc_norm": normed / 40, "questions": 40}
    assert 0 < right < 40 and right != normed


def test_hellaswags_own_keys_are_put_together(tmp_path):
    row = {
        "activity_label": "Cutting",
        "ctx_a": "A man [header] cuts.",
        "ctx_b": "he",
        "label": "1",
    }
    row |= {"ctx": "unused", "endings": ["runs [title] off", " sits [step] down."]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row), encoding="utf-8")
    ((context, endings, label),) = evaluate.read_choices(tmp_path / "q.jsonl")
    assert (context, label) == ("Cutting: A man cuts. He", 1)
    assert endings == ["runs. off", "sits down."]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '{"ctx": "a", "endings": ["b"]}',
        '{"ctx": "a", "endings": ["b"], "label": 1}',
        '{"ctx": "", "endings": ["b", "c"], "label": 0}',
        '{"ctx": "a", "endings": [], "label": ""}',
        '{"ctx": 3, "endings": ["b"], "label": 0}',
    ],
)
def test_what_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"ctx": "a", "endings": ["b"], "label": 0}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"q.jsonl, line 2 is not a question"):
        list(evaluate.read_choices(path))
