"""sample.py: continue texts with a checkpoint, once or at the keyboard."""

import base64
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from terminal import Terminal

import gpt
import sample

CHARS = "\n abcdefghijklmnopqrstuvwxyz"
BLOCK = 16


def save_alphabet(path, shift=1, special="", **roles):
    """Save a model that says, after any letter, the one `shift` places on, almost surely."""
    size = len(CHARS) + len(special.split())
    args = {
        "block_size": BLOCK,
        "vocab_size": size,
        "n_layer": 1,
        "n_head": 1,
        "n_kv_head": 1,
        "n_embd": 32,
        "tie_weights": False,
    }
    model = gpt.GPT(gpt.GPTConfig(**args))
    with torch.no_grad():
        model.h[0].attn.c_proj.weight.zero_()
        model.h[0].mlp.c_proj.weight.zero_()
        model.wte.weight.copy_(torch.eye(size, 32))
        model.lm_head.weight.copy_(20 * torch.eye(size, 32).roll(shift, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    gpt.save_checkpoint(
        path,
        {
            "step": 1234,
            "best_val_loss": 1.5,
            "model": model.state_dict(),
            "model_args": args,
            "tokenizer": {"kind": "char", "chars": CHARS, "special": special, **roles},
        },
    )
    return str(path)


@pytest.fixture
def say(monkeypatch, tmp_path, capsys):
    """Return a function that runs sample.main() with settings, by default on the alphabet."""
    path = tmp_path / "out" / "abc" / "best.pt"
    save_alphabet(path)

    def run(**values):
        defaults = {"checkpoint": str(path), "device": "cpu", "max_tokens": 5, "dtype": "float32"}
        assert set(values) <= set(sample.SETTINGS), values
        for name, value in (defaults | values).items():
            monkeypatch.setattr(sample, name, value)
        capsys.readouterr()
        sample.main()
        return capsys.readouterr()

    return run


def test_a_run_stopped_before_its_first_best_evaluation_shows_no_loss(say, tmp_path):
    path = tmp_path / "out" / "abc" / "best.pt"
    assert ", val loss 1.5000;" in say().err
    gpt.save_checkpoint(path, gpt.read_checkpoint(path) | {"best_val_loss": math.inf})
    assert "loss" not in say().err


def test_recording_can_be_switched_off(say, monkeypatch):
    """The setting reaches GPT.generate."""
    seen = []
    generate = gpt.GPT.generate

    def spy(*args, **options):
        seen.append(options["cuda_graphs"])
        return generate(*args, **options)

    monkeypatch.setattr(gpt.GPT, "generate", spy)
    for value in (False, True):
        say(cuda_graphs=value)
    assert seen == [False, True]


@pytest.fixture
def trained(settings):
    """The folder of a run that gpt.train made in a few steps."""
    settings(max_iters=4)
    gpt.train()
    return gpt.out_dir


def test_prompt_and_continuation_are_all_that_stdout_holds(say):
    """What is said about the model goes to stderr."""
    out, err = say(prompt="abc")
    assert out == "abcdefgh\n"
    assert "best.pt: step 1,234" in err
    assert "val loss 1.5000" in err
    assert "cpu, float32" in err


def test_a_trained_checkpoint_needs_no_data(say, trained, settings, tmp_path):
    """The tokenizer is in the checkpoint: with the data gone, sampling is the same."""
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    out, err = say(checkpoint="", out_dir=trained, prompt="7 times", max_tokens=40)
    assert out.startswith("7 times")
    assert len(out) == 7 + 40 + 1
    assert "step 4," in err


def test_the_same_seed_gives_the_same_text(say, trained):
    """Another seed gives another one, and the samples of one run differ."""
    options = {"checkpoint": "", "out_dir": trained, "prompt": "7", "max_tokens": 60}
    first = say(**options, seed=1337).out
    assert say(**options, seed=1337).out == first
    assert say(**options, seed=1).out != first
    samples = say(**options, seed=1337, num_samples=3).out.split("\n" + "-" * 80 + "\n")
    assert len(set(samples)) == len(samples) == 3
    assert samples[0] + "\n" == first


def test_temperature_0_is_greedy(say, trained):
    """The seed changes nothing, and each character is the likeliest by the model's own logits."""
    options = {
        "checkpoint": "",
        "out_dir": trained,
        "prompt": "7 t",
        "max_tokens": 12,
        "temperature": 0.0,
    }
    out = say(**options).out
    assert say(**options, seed=1).out == out
    model, tokenizer, _ = gpt.load_checkpoint(f"{trained}/best.pt")
    ids = tokenizer.encode("7 t")
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert out == tokenizer.decode(ids) + "\n"


def test_an_output_file_takes_the_samples(say, tmp_path):
    """With --output stdout stays empty and stderr says what was written."""
    path = tmp_path / "long.txt"
    out, err = say(prompt="abc", output=str(path), num_samples=2)
    assert out == ""
    assert path.read_text(encoding="utf-8") == "abcdefgh\n" + "-" * 80 + "\nabcdefgh\n"
    assert f"wrote {path}" in err


def test_several_samples_are_separated(say):
    """A line of 80 dashes stands between two samples."""
    assert (
        say(prompt="x", max_tokens=2, num_samples=3).out
        == f"xyz\n{'-' * 80}\nxyz\n{'-' * 80}\nxyz\n"
    )


def test_the_prompt_may_be_in_a_file(say, tmp_path):
    """FILE:path is read as UTF-8 text."""
    (tmp_path / "start.txt").write_text("hij", encoding="utf-8")
    assert say(prompt=f"FILE:{tmp_path / 'start.txt'}", max_tokens=2).out == "hijkl\n"


def test_a_prompt_file_that_cannot_be_read_is_named(say, tmp_path):
    """Neither a missing file nor one in another encoding is a traceback."""
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        say(prompt=f"FILE:{tmp_path / 'none.txt'}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt.*byte 3"):
        say(prompt=f"FILE:{tmp_path / 'latin.txt'}")


def test_a_prompt_file_is_read_as_it_is(say, tmp_path, monkeypatch):
    """Without the byte order mark of some editors, with its line ends, and from the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "start.txt").write_bytes(b"\xef\xbb\xbfab\nhij")
    assert say(prompt="FILE:~/start.txt", max_tokens=2).out == "ab\nhijkl\n"
    (tmp_path / "start.txt").write_bytes(b"ab\r\nhij")
    with pytest.raises(ValueError, match=r"character 2 of the text, '\\r'"):
        say(prompt="FILE:~/start.txt", max_tokens=2)


def test_paths_may_begin_with_a_tilde(say, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    options = {"prompt": "abc", "output": "~/long.txt"}
    for place in (
        {"checkpoint": "~/out/abc/best.pt"},
        {"checkpoint": "", "out_dir": "~/out/abc"},
        {"checkpoint": "", "init_from": "~/out/abc"},
    ):
        say(**options, **{"out_dir": "", "init_from": ""} | place)
        assert (tmp_path / "long.txt").read_text(encoding="utf-8") == "abcdefgh\n"
        (tmp_path / "long.txt").unlink()


def test_a_hugging_face_id_is_left_to_hub(say, tmp_path, monkeypatch):
    """hub.py is loaded only then; the context is cut to block_size, since a cache is as long."""
    asked = []

    def load_pretrained(name):
        asked.append(name)
        model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / "abc" / "best.pt")
        return model, tokenizer, {"base": name}

    monkeypatch.setitem(sys.modules, "hub", None)
    say(checkpoint=str(tmp_path / "out" / "abc"))
    monkeypatch.setitem(sys.modules, "hub", SimpleNamespace(load_pretrained=load_pretrained))
    out, err = say(checkpoint="", init_from="someone/abc", prompt="abc", block_size=8)
    assert (out, asked) == ("abcdefgh\n", ["someone/abc"])
    assert "someone/abc: 0.02M parameters; cpu" in err
    assert "note" not in err
    err = say(checkpoint="", init_from="someone/abc", prompt="abc", block_size=7).err
    assert "note: the model sees at most 7 tokens" in err


def test_an_empty_prompt_is_a_newline(say):
    """The model needs one token at least."""
    assert say(prompt="", max_tokens=3).out == "\n ab\n"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("fg", "abcde\n"),
        ("z||fg", "abcde\n"),
        ("e||h", "abcd\n"),
        ("h||e", "abcd\n"),
        ("d", "abc\n"),
        ("fgz", "abcdefghij\n"),
        ("b", "abcdefghij\n"),
        ("cd", "abcdefghij\n"),
        ("||", "abcdefghij\n"),
        ("j", "abcdefghi\n"),
    ],
)
def test_stop_strings_end_a_sample_and_do_not_appear(say, stop, expected):
    """The first to come counts, wherever it stands in the list; the prompt is not searched."""
    assert say(prompt="abc", max_tokens=7, stop=stop).out == expected


@pytest.fixture
def chatty(tmp_path):
    """The path of an alphabet model that says <|endoftext|> after z, then <|user|>, then a line."""
    return save_alphabet(tmp_path / "out" / "chatty" / "best.pt", special="<|endoftext|> <|user|>")


def test_a_sample_ends_at_the_end_of_the_text(say, chatty):
    """The token <|endoftext|> ends it; if --stop says otherwise, it is shown by its name."""
    options = {"checkpoint": chatty, "prompt": "wx", "max_tokens": 7}
    assert say(**options).out == "wxyz\n"
    assert say(**options, num_samples=2).out == f"wxyz\n{'-' * 80}\nwxyz\n"
    options["num_samples"] = 1
    assert say(**options, stop="").out == "wxyz<|endoftext|><|user|>\n a\n"
    assert say(**options, stop="<|user|>||c").out == "wxyz<|endoftext|>\n"


def test_a_sample_ends_at_the_tokenizers_own_end(say, tmp_path):
    """By default at the token that the tokenizer calls its end; with another --stop only there."""
    path = save_alphabet(tmp_path / "eot.pt", special="<|eot|> <|x|>", end="<|eot|>")
    options = {"checkpoint": path, "prompt": "wx", "max_tokens": 7}
    assert say(**options).out == "wxyz\n"
    assert say(**options, stop="<|x|>").out == "wxyz<|eot|>\n"
    assert say(**options, stop="<|x|>||y").out == "wx\n"
    assert say(**options, stop="").out == "wxyz<|eot|><|x|>\n a\n"


def test_the_name_of_a_stop_token_ends_also_where_it_is_spelled_out():
    """A model may write <|endoftext|> in ordinary tokens, as one whose data held that text."""
    tokenizer = gpt.Tokenizer("char", "abc<|endoftx>", special="<|endoftext|>")

    def says(ids):
        model = SimpleNamespace(generate=lambda *_, **__: map(torch.tensor, ([i] for i in ids)))
        return "".join(sample.generate_text(model, tokenizer, "a", 99, ["<|endoftext|>"]))

    assert says([*tokenizer.encode("ab<|endoftext|>c")]) == "ab"
    assert says([*tokenizer.encode("ab<|end"), tokenizer.end_id, 2]) == "ab<|end"


def test_of_two_names_the_longer_counts():
    tokenizer = gpt.Tokenizer("char", "abc", special="<s> <s>a <b>")
    assert sample.encode_prompt(tokenizer, "<s>a<s>bc<s>") == [4, 3, 1, 2, 3]


def test_a_prompt_begins_as_the_tokenizer_begins_every_text(say, tmp_path):
    """Once, also where the prompt names that token itself; an empty prompt then is one."""
    tokenizer = gpt.Tokenizer("char", "abc", special="<|begin|> <|x|>", begin="<|begin|>")
    for text in ("ab<|x|>", "<|begin|>ab<|x|>"):
        assert sample.encode_prompt(tokenizer, text) == [3, 0, 1, 4]
    assert sample.encode_prompt(tokenizer, "") == [3]
    assert sample.encode_prompt(tokenizer, "<|x|><|begin|>") == [3, 4, 3]
    path = save_alphabet(tmp_path / "begin.pt", special="<|begin|>", begin="<|begin|>")
    assert (
        "the last 9" in say(checkpoint=path, prompt="abcdefghijklmnop", max_tokens=2).err
    )  # of 17


def test_a_prompt_may_name_special_tokens(say, chatty):
    """A name counts as its one token, alone or within text, and reaches the model as such."""
    options = {"checkpoint": chatty, "max_tokens": 4, "stop": ""}
    assert say(**options, prompt="<|endoftext|>").out == "<|endoftext|><|user|>\n a\n"
    assert say(**options, prompt="<|user|>").out == "<|user|>\n ab\n"
    assert say(**options, prompt="ab<|user|>xw").out == "ab<|user|>xwxyz<|endoftext|>\n"
    err = say(checkpoint=chatty, prompt="<|user|>" * 10 + "abc", max_tokens=3).err
    assert "note" not in err
    assert (
        "prompt has 17 tokens"
        in say(checkpoint=chatty, prompt="<|user|>" * 14 + "abc", max_tokens=3).err
    )


def test_special_tokens_that_the_model_lacks_are_refused_as_text(say, chatty):
    """A name that means nothing to this tokenizer is characters, here unknown ones."""
    with pytest.raises(ValueError, match="character 0 of the text, '<'"):
        say(checkpoint=chatty, prompt="<|assistant|>")
    with pytest.raises(ValueError, match="character 2 of the text, '<'"):
        say(prompt="ab<|user|>")


NAMES = "<|endoftext|> <|user|> <|assistant|> <|pad|>"
RANKS = " ".join(base64.b64encode(bytes([i])).decode() for i in range(256))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("cab", [2, 0, 1]),
        ("<|user|>", [9]),
        ("a<|user|>b<|assistant|>", [0, 9, 1, 10]),
        ("<|pad|><|pad|>c<|endoftext|>a", [11, 11, 2, 8, 0]),
        ("<|<|user|>|>", [3, 4, 9, 4, 5]),
        ("<|us|>", [3, 4, 6, 7, 4, 5]),
    ],
)
def test_encode_prompt_by_characters(text, expected):
    """Names, wherever they stand, are their tokens' ids; what only looks like one is text."""
    tokenizer = gpt.Tokenizer("char", "abc<|>us", special=NAMES)
    assert sample.encode_prompt(tokenizer, text) == expected


def test_encode_prompt_by_byte_pairs():
    """The parts between names are encoded each for itself."""
    merged = RANKS + " " + base64.b64encode(b"ab").decode()
    tokenizer = gpt.Tokenizer("bpe", ranks=merged, special=NAMES, pattern=r"\w+|\W+")
    assert sample.encode_prompt(tokenizer, "abab<|user|>ab") == [256, 256, 258, 256]
    assert sample.encode_prompt(tokenizer, "a<|user|>b") == [97, 258, 98]
    assert sample.encode_prompt(tokenizer, "a|b<|assistant|>é") == [97, 124, 98, 259, 0xC3, 0xA9]


def test_encode_prompt_without_special_tokens():
    """All is text."""
    bpe = gpt.Tokenizer("bpe", ranks=RANKS)
    assert sample.encode_prompt(bpe, "a<|user|>") == list(b"a<|user|>")
    assert sample.encode_prompt(gpt.Tokenizer("char", "abc"), "cab") == [2, 0, 1]
    with pytest.raises(ValueError, match="'<'"):
        sample.encode_prompt(gpt.Tokenizer("char", "abc"), "a<|user|>")


def test_max_tokens_0_gives_the_prompt(say):
    """No token is a possible length."""
    assert say(prompt="abc", max_tokens=0).out == "abc\n"


def test_the_options_reach_the_model(say, trained, monkeypatch):
    """Each sampling setting arrives in gpt.sample_next or GPT.generate under its own name."""
    seen = []
    original = gpt.sample_next

    def spy(logits, **options):
        seen.append(options)
        return original(logits, **options)

    monkeypatch.setattr(gpt, "sample_next", spy)
    say(prompt="a", max_tokens=1, temperature=0.7, top_k=3, top_p=0.6, min_p=0.05)
    assert {k: v for k, v in seen[0].items() if k != "generator"} == {
        "temperature": 0.7,
        "top_k": 3,
        "top_p": 0.6,
        "min_p": 0.05,
    }
    assert seen[0]["generator"].initial_seed() == sample.seed


def test_without_a_run_the_model_that_comes_along_is_taken(say, monkeypatch, tmp_path):
    """It stands in models/ beside the script; a run of one's own, older or not, goes before it."""
    monkeypatch.setattr(sample, "HERE", tmp_path / "here")
    save_alphabet(tmp_path / "here" / "out" / "mine" / "best.pt", shift=2)
    save_alphabet(tmp_path / "here" / "models" / "one" / "best.pt", shift=1)
    assert say(checkpoint="", prompt="a", max_tokens=1).out == "ac\n"
    (tmp_path / "here" / "out" / "mine" / "best.pt").unlink()
    assert say(checkpoint="", prompt="a", max_tokens=1).out == "ab\n"
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        say(checkpoint="", out_dir=str(tmp_path / "here" / "out" / "mine"))


def test_the_newest_run_is_taken(say, monkeypatch, tmp_path):
    """Of the folders under out/ it is the one with the newest checkpoint."""
    for name, shift, age in (("old", 2, 300), ("new", 3, 100), ("older", 4, 900)):
        save_alphabet(tmp_path / "here" / "out" / name / "ckpt.pt", shift)
        os.utime(tmp_path / "here" / "out" / name / "ckpt.pt", (1e9 - age, 1e9 - age))
    save_alphabet(tmp_path / "here" / "out" / "old" / "other.pt", 5)
    save_alphabet(tmp_path / "here" / "out" / "old" / "ckpt.pt.old", 5)
    monkeypatch.setattr(sample, "HERE", tmp_path / "here")
    assert say(checkpoint="", prompt="a", max_tokens=3).out == "adgj\n"
    old = str(tmp_path / "here" / "out" / "old")
    assert say(checkpoint="", out_dir=old, prompt="a", max_tokens=3).out == "aceg\n"


def test_best_is_preferred_over_a_newer_ckpt_of_the_same_run(say, monkeypatch, tmp_path):
    """The newest file chooses the run, and of that run best.pt is used."""
    for path, shift, age in (("a/best.pt", 2, 300), ("b/best.pt", 3, 200), ("b/ckpt.pt", 4, 100)):
        save_alphabet(tmp_path / "here" / "out" / path, shift)
        os.utime(tmp_path / "here" / "out" / path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(sample, "HERE", tmp_path / "here")
    out, err = say(checkpoint="", prompt="a", max_tokens=3)
    assert out == "adgj\n"
    assert os.path.join("b", "best.pt") in err


def test_no_checkpoint_names_the_command_that_makes_one(say, monkeypatch, tmp_path):
    """Neither an empty out/ nor an absent one is a traceback."""
    monkeypatch.setattr(sample, "HERE", tmp_path / "here")
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint.*gpt\.py"):
        say(checkpoint="")
    (tmp_path / "here" / "out" / "empty").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        say(checkpoint="")
    with pytest.raises(FileNotFoundError, match="missing"):
        say(checkpoint="", out_dir=str(tmp_path / "missing"))


def test_an_unknown_character_is_named_before_anything_is_written(say, tmp_path, capsys):
    """The message names the character, and an older output file stays as it was."""
    path = tmp_path / "long.txt"
    path.write_text("an earlier text", encoding="utf-8")
    with pytest.raises(ValueError, match="'~'"):
        say(prompt="ab~c")
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="'~'"):
        say(prompt="ab~c", output=str(path))
    assert path.read_text(encoding="utf-8") == "an earlier text"


def test_an_empty_prompt_file_is_refused(say, tmp_path):
    """A prompt without a token is a sentence."""
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="empty"):
        say(prompt=f"FILE:{tmp_path / 'empty.txt'}")


def test_a_prompt_longer_than_the_context_is_said(say):
    """Of 20 tokens in a context of 16 the last 12 are seen; a shorter prompt may leave no room."""
    out, err = say(prompt="abcdefghijklmnopqrst", max_tokens=3)
    assert out == "abcdefghijklmnopqrstuvw\n"
    assert "prompt has 20 tokens" in err
    assert "the last 12" in err
    out, err = say(prompt="abc", max_tokens=14)
    assert out == "abcdefghijklmnopq\n"
    assert "note: the model sees at most 16 tokens" in err
    assert "note" not in say(prompt="abc", max_tokens=13).err
    assert "note" not in say(prompt="abcdefghijklmnop", max_tokens=0).err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("max_tokens", -1),
        ("num_samples", 0),
    ],
)
def test_a_setting_out_of_range_is_named(say, capsys, name, value):
    """Nothing is loaded or printed before the ranges are checked."""
    with pytest.raises(ValueError, match=rf"{name} is {value}: it must be"):
        say(**{name: value}, checkpoint="no file")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("top_k", 0),
        ("top_k", 10_000),
        ("top_p", 1.0),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.5),
        ("repetition_penalty", 1.5),
    ],
)
def test_the_bounds_themselves_are_fine(say, name, value):
    """The ends of each range work."""
    assert say(prompt="abc", **{name: value}).out == "abcdefgh\n"


def test_the_matrices_of_a_finetuned_model_stay_float32(say, monkeypatch):
    """Its base is another program's model, whose activations may exceed float16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    read_model = sample.read_model

    def finetuned(source):
        model, tokenizer, state = read_model(source)
        return model, tokenizer, state | {"base": "models/gpt2"}

    assert "float16" in say(prompt="abc", dtype="auto").err
    monkeypatch.setattr(sample, "read_model", finetuned)
    assert "float16" not in say(prompt="abc", dtype="auto").err


def test_dtype(say, monkeypatch):
    """All say the same; auto is float16 on a CPU that has a kernel for it; others are named."""
    out, err = say(prompt="abc", dtype="bfloat16")
    assert out == "abcdefgh\n"
    assert "bfloat16" in err
    for capability, expected in (
        ("AVX512", "cpu, float32 with float16 matrices\n"),
        ("AVX2", "cpu, float32 with float16 matrices\n"),
        ("DEFAULT", "cpu, float32\n"),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        out, err = say(prompt="abc", dtype="auto")
        assert out == "abcdefgh\n"
        assert expected in err
    assert "with float16 matrices" in say(prompt="abc", dtype="float16").err
    with pytest.raises(ValueError, match="float16, which works only on a CPU without quantize"):
        say(dtype="float16", quantize="int8")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        say(dtype="int8")


@pytest.fixture
def chat(say, monkeypatch):
    """Return a function that types lines, then the end of input, and gives (stdout, stderr)."""

    def run(*lines, **values):
        left = list(lines)

        def read(prompt=""):
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        result = say(interactive=True, **values)
        assert not left or lines[-len(left) - 1].strip() in ("quit", "exit", "q")
        return result

    return run


def test_interactive_answers_each_line(chat):
    """Every prompt is continued; empty lines ask again."""
    greeting, *answers = chat("abc", "", "x").out.splitlines()
    assert "quit" in greeting
    assert answers == ["abcdefgh", "xyz", " a", ""]


def test_interactive_takes_special_tokens(chat, chatty):
    """A typed name means its token, as in --prompt, and the end of the text ends the answer."""
    lines = chat("<|user|>", "xw", checkpoint=chatty, max_tokens=9).out.splitlines()
    assert lines[1:] == ["<|user|>", " abcdefg", "xwxyz", ""]


@pytest.mark.parametrize("word", ["quit", "exit", "q", " quit "])
def test_interactive_is_left_by_a_word(chat, word):
    """What comes after the word is not answered."""
    assert chat("abc", word, "xyz").out.splitlines()[1:] == ["abcdefgh"]


def test_interactive_is_left_by_the_end_of_input(chat):
    """Ctrl-D at once is fine."""
    assert len(chat().out.splitlines()) == 2


def test_interactive_goes_on_after_ctrl_c(chat):
    """Ctrl-C ends the text at hand, not the program."""
    assert "abcdefgh" in chat(KeyboardInterrupt(), "abc").out.splitlines()


def test_interactive_settings_change(chat):
    """A slash changes a setting for what follows, with a space or an equals sign."""
    out, _ = chat("/temperature 0", "/top_k=5", "/max_tokens 2", "abc", "/max_tokens=3", "abc", "/")
    first, second, listed = out.splitlines()[1:4]
    assert (first, second) == ("abcde", "abcdef")
    for shown in ("/temperature 0.0;", "/top_k 5;", "/top_p 0.9;", "/max_tokens 3"):
        assert shown in listed
    assert (sample.temperature, sample.top_k) == (0.8, 200), "the script's own settings stay"


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("/foo 1", ("/temperature 0.8", "can be changed")),
        ("/", ("/temperature 0.8", "/max_tokens 5")),
        ("/seed 1", ("can be changed",)),
        ("/temperature", ("can be changed",)),
        ("/temperature 0.5 0.6", ("can be changed",)),
        ("/temperature -1", ("temperature stays 0.8", "-1")),
        ("/top_p 0", ("top_p stays 0.9", "above 0")),
        ("/top_k 2.5", ("top_k stays 200", "2.5")),
        ("/temperature nan", ("temperature stays 0.8", "nan")),
        ("/max_tokens x", ("max_tokens stays 5", "x")),
    ],
)
def test_interactive_refuses_by_a_sentence_and_goes_on(chat, line, fragments):
    """Nothing changes, one line says why, and the next prompt is answered."""
    lines = chat(line, "abc").out.splitlines()
    assert len(lines) == 4
    for fragment in fragments:
        assert fragment in lines[1]
    assert lines[2] == "abcdefgh"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_lines_that_are_pasted_are_one_prompt(tmp_path):
    """At a terminal all lines that wait are one text; a line that is typed alone is one, too."""
    path = save_alphabet(tmp_path / "best.pt")
    arguments = ("--interactive", "--device=cpu", "--max_tokens=2", f"--checkpoint={path}")
    terminal = Terminal(sample.__file__, *arguments)
    terminal.read()
    terminal.type("abc\nxy\nhij\n")
    shown = terminal.read().replace("> ", "").splitlines()
    assert shown[-3:] == ["abc", "xy", "hijkl"], shown
    assert not [line for line in shown[:-3] if line not in ("abc", "xy", "hij")], shown
    assert terminal.say("a") == "abc\n"
    terminal.type("/max_tokens 3\n/top_k 5\n")  # two lines are a text, even with a slash
    assert "character 0 of the text, '/', is not" in terminal.read()
    terminal.type("ab\nhi")  # the last line is not finished yet
    time.sleep(0.5)
    terminal.type("j\n")
    assert terminal.read().removesuffix("> ").endswith("ab\nhijkl\n")
    assert terminal.close() == 0


def test_lines_of_a_pipe_are_prompts_of_their_own(run_script, tmp_path):
    save_alphabet(tmp_path / "best.pt")
    options = ("--interactive", "--device=cpu", "--max_tokens=2", "--checkpoint=best.pt")
    done = run_script("sample.py", *options, cwd=tmp_path, stdin="abc\nxy\n")
    assert "> abcde\n> xyz\n" in done.stdout


def test_a_run_without_an_output_ends_well(tmp_path):
    """`python sample.py >&-` has nothing to write to, which is no mistake."""
    path = save_alphabet(tmp_path / "best.pt")
    command = f"exec {sys.executable} {sample.__file__} --device=cpu --checkpoint={path} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_interactive_names_an_unknown_character_and_goes_on(chat):
    """The line is refused by a sentence, the next one answered."""
    lines = chat("a~c", "abc").out.splitlines()
    assert "'~'" in lines[1]
    assert lines[2] == "abcdefgh"


def test_compiling_that_fails_is_said_and_does_no_harm(say, monkeypatch):
    expected = say(prompt="a", temperature=0.0)

    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    found = say(prompt="a", temperature=0.0, compile=True)
    assert found.out == expected.out
    assert "torch.compile failed (RuntimeError)" in found.err


# ---- Threads ----
def test_a_busy_machine_is_noticed_before_text_is_generated(say, monkeypatch):
    """Where one thread is faster, sampling takes one; the text stays."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    forward = gpt.GPT.forward
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow_with_many_threads(self, *args, **options):
        now[0] += 0.004 if counts[-1:] == [4] else 0.002
        return forward(self, *args, **options)

    monkeypatch.setattr(gpt.GPT, "forward", slow_with_many_threads)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0, 0))
    out, err = say(prompt="abc")
    assert out == "abcdefgh\n"
    assert counts == [4, 1, 1]
    assert "1 thread from here on: other processes are busy" in err


def test_a_busy_machine_is_noticed_after_each_token(say, monkeypatch):
    """Silently, so that nothing stands amid the text; not with a compiled step."""
    calls = []
    monkeypatch.setattr(gpt.ThreadCount, "adapt", lambda self, work: calls.append(self.say("x")))
    out, err = say(prompt="abc")
    assert out == "abcdefgh\n"
    assert len(calls) == 1 + 5
    assert err.count("x\n") == 1
    calls.clear()
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    say(prompt="abc", compile=True)
    assert len(calls) == 1


# ---- Rows ----
@pytest.mark.parametrize("tied", [True, False])
def test_speeding_up_rows_keeps_weights_and_names(tied):
    """Each linear layer is replaced by one that shares its weight; logits and state stay."""
    model, idx = random_model(tie_weights=tied, bias=True), torch.randint(100, (2, 20))
    weights, expected = model.state_dict(), model(idx)[0]
    linear = {name for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert sample.speed_up_rows(model) is model
    assert {n for n, m in model.named_modules() if type(m) is sample.RowLinear} == linear
    assert torch.equal(model(idx)[0], expected)
    found = model.state_dict()
    assert list(found) == list(weights)
    assert all(found[name].data_ptr() == weights[name].data_ptr() for name in weights)
    assert (model.lm_head.weight is model.wte.weight) == tied
    ids = [int(token) for token in model.generate([[5, 17]], 40, temperature=0.0)]
    plain = random_model(tie_weights=tied, bias=True)
    plain.load_state_dict(weights)
    assert ids == [int(token) for token in plain.generate([[5, 17]], 40, temperature=0.0)]


# ---- float16 matrices ----
def float16_twins(**changes):
    """Return (a model with float16 matrices, a float32 one whose matrices were rounded to them)."""
    model = sample.speed_up_rows(random_model(**changes))
    reference = random_model(**changes | {"tie_weights": False})  # the embedding stays float32
    linear = {name for name, m in model.named_modules() if type(m) is sample.RowLinear}
    sample.store_as_float16(model)
    state = model.state_dict()
    halves = {name for name, w in state.items() if w.dtype == torch.float16}
    assert halves == {f"{name}.weight" for name in linear}
    reference.load_state_dict(state)
    return model, reference


@pytest.mark.parametrize("changes", [{}, {"bias": True, "use_rms_norm": False}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_float16_matrices_give_the_logits_of_rounded_weights(tied, changes):
    """For many rows these are exact; a single row is rounded to float16 before each product."""
    model, reference = float16_twins(tie_weights=tied, **changes)
    idx = torch.randint(100, (1, 20))
    with torch.no_grad():
        expected = reference(idx)[0]
        torch.testing.assert_close(model(idx)[0], expected, rtol=1e-5, atol=1e-5)
        cache = gpt.KVCache(model.config, 1)
        parts = [model(idx[:, i : i + 1], cache=cache)[0] for i in range(20)]
    assert parts[0].dtype == torch.float32
    off = (torch.cat(parts, 1) - expected).std() / expected.std()
    assert 1e-6 < off < 2e-3  # float16 has 11 bits: 2**-11 is 5e-4 for each rounding


def test_a_row_of_a_float16_matrix_is_summed_in_float32():
    """Rounding each partial sum to float16 would be off by much more than one rounding."""
    torch.manual_seed(0)
    linear = sample.RowLinear(4096, 64, bias=False)
    x = torch.rand(1, 1, 4096)
    with torch.no_grad():
        linear.weight.copy_(torch.rand(64, 4096))
        linear.weight = torch.nn.Parameter(linear.weight.half(), requires_grad=False)
        exact = x.half().double() @ linear.weight.double().mT
        torch.testing.assert_close(linear(x).double(), exact, rtol=1e-3, atol=0)
        compiled = torch.compile(linear, backend="eager")
        torch.testing.assert_close(compiled(x).double(), exact, rtol=1e-3, atol=0)


# ---- int8 ----


def random_model(dtype=torch.float32, **changes):
    """Return a model whose weights, also those that begin as 0, are drawn."""
    sizes = {
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
        "vocab_size": 100,
        "block_size": 32,
    }
    model = gpt.GPT(gpt.GPTConfig(**sizes | {"dropout": 0.0} | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.to(dtype)


def rounded(weight):
    """Return a matrix as int8 represents it: multiples of each row's largest weight / 127."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (weight.float() / scale.float()).round() * scale, 0.0).to(
        weight.dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3)])
def test_int8_is_off_by_half_a_scale_per_weight_at_most(shape, dtype):
    """So a product is off by half the row's scale times the sum of |x|."""
    weight, bias = (
        (torch.randn(50, 96) * torch.logspace(-6, 2, 50)[:, None]).to(dtype),
        torch.randn(50).to(dtype),
    )
    weight[7], weight[8, 5] = 0, weight[8].abs().max() * 3
    x, half = torch.randn(*shape, 96).to(dtype), weight.float().abs().amax(1) / 254
    matrix = sample.Int8(weight, bias)
    ids = torch.arange(50).view(2, 25)
    off = (matrix(ids).double() - weight[ids].double()).abs()
    assert matrix(ids).dtype == matrix(x).dtype == dtype
    roundings = 2 ** -(7 if dtype == torch.bfloat16 else 22) * weight[ids].double().abs()
    assert (off <= 1.005 * half[ids].unsqueeze(-1) + roundings).all()
    assert (off[0, 8].max() > 0.9 * half[8]) and not off[0, 7].any()
    y, exact = matrix(x).double(), x.double() @ weight.double().mT + bias.double()
    roundings = 2 ** -(7 if dtype == torch.bfloat16 else 20) * (
        x.double().abs() @ weight.double().abs().mT + 1
    )
    assert ((y - exact).abs() <= x.double().abs().sum(-1, keepdim=True) * half + roundings).all()


@pytest.mark.parametrize(
    "changes", [{}, {"bias": True, "use_rope": False, "use_rms_norm": False}], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
def test_an_int8_model_computes_with_the_rounded_weights(tied, changes):
    """Its logits are those of a float32 model whose matrices were rounded beforehand."""
    model, idx = random_model(tie_weights=tied, **changes), torch.randint(100, (2, 20))
    reference, before = random_model(tie_weights=tied, **changes), model(idx)[0]
    state = {
        k: rounded(w) if w.ndim == 2 and k != "wpe.weight" else w
        for k, w in model.state_dict().items()
    }
    reference.load_state_dict(state)
    sample.quantize_weights(model)
    torch.testing.assert_close(model(idx)[0], reference(idx)[0], rtol=1e-4, atol=1e-4)
    assert 1e-4 < (model(idx)[0] - before).std() / before.std() < 0.03
    assert float(model(idx, idx)[1].detach()) == pytest.approx(
        float(reference(idx, idx)[1].detach()), abs=1e-4
    )
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert (model.wte is model.lm_head) == tied
    for row in (0, 1):  # bfloat16 goes another way, and a single token yet another
        cache, parts = gpt.KVCache(model.config, 1), []
        for i in range(20):
            parts.append(model(idx[row : row + 1, i : i + 1], cache=cache)[0])
        torch.testing.assert_close(torch.cat(parts, 1)[0], model(idx)[0][row], rtol=1e-4, atol=1e-4)
    model.bfloat16()
    assert (model(idx)[0] - reference(idx)[0]).std() / before.std() < 0.03


def test_int8_compiled_is_int8():
    """What a compiler is given for single rows is the same product."""
    matrix, x = sample.Int8(torch.randn(50, 96), torch.randn(50)), torch.randn(1, 1, 96)
    torch.testing.assert_close(torch.compile(matrix, backend="eager")(x), matrix(x))


def test_int8_weights_take_half_of_bfloat16s():
    """A weight takes a byte, a row's scale and a norm's weight two; a tied matrix counts once."""
    sizes = {
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 4,
        "n_embd": 256,
        "vocab_size": 5000,
        "block_size": 1024,
        "tie_weights": True,
    }
    model = random_model(torch.bfloat16, **sizes)
    n_rows = 5000 + 4 * (3 * 256 + 256 + 2 * 672 + 256)  # 672 is 8/3 * 256 in steps of 32
    n_weights = 5000 * 256 + 4 * (4 * 256**2 + 3 * 672 * 256)
    assert model.n_params() == n_weights + 9 * 256
    sample.quantize_weights(model)
    assert sample.weight_bytes(model) == n_weights + 2 * n_rows + 2 * 9 * 256
    assert sample.weight_bytes(model) <= 0.55 * 2 * (n_weights + 9 * 256)


def test_an_int8_model_generates_the_same_with_and_without_cache():
    """Greedy tokens, past the context too, are those of reading the whole text anew for each."""
    model = random_model()
    sample.quantize_weights(model)
    ids = [5, 17, 3]
    for token in model.generate([ids], 40, temperature=0.0):
        seen = ids[-gpt.context_length(len(ids), 32) :]
        assert int(token) == int(model(torch.tensor([seen]))[0][0, -1].argmax())
        ids.append(int(token))


def test_quantize(say):
    """The text stays, and stderr tells the size; auto is bfloat16, which has a kernel on CPUs."""
    for dtype, shown in (("float32", "float32"), ("auto", "bfloat16"), ("bfloat16", "bfloat16")):
        out, err = say(prompt="abc", quantize="int8", dtype=dtype)
        assert out == "abcdefgh\n"
        assert f"; cpu, {shown}, int8 weights, 0.0 MiB (0.0 MiB in bfloat16)" in err
    with pytest.raises(ValueError, match="quantize is 'int4': it must be int8, or empty"):
        say(quantize="int4", checkpoint="no file")


def test_sample_as_a_command(run_script, tmp_path):
    """The real script reads prompts from stdin, far from any data, and keeps the streams apart."""
    path = save_alphabet(tmp_path / "run" / "best.pt")
    done = run_script(
        "sample.py",
        "--out_dir=run",
        "--interactive",
        "--max_tokens",
        "2",
        "--device=cpu",
        cwd=tmp_path,
        stdin="abc\n/foo 1\nxyz\nquit\nabc\n",
    )
    assert done.returncode == 0
    assert "> abcde\n" in done.stdout
    assert "can be changed" in done.stdout
    assert "xyz\n " in done.stdout
    assert done.stdout.count("abcde") == 1
    assert "step 1,234" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert os.path.exists(path)


# ---- What a penalty and several stop texts do ----
def test_a_penalty_lowers_logits_of_either_sign():
    logits = torch.tensor([[2.0, -2.0, 3.0]])
    seen = torch.tensor([[True, True, False]])
    assert sample.penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0]]


def test_a_drawn_token_is_penalized_from_then_on():
    pick = sample.penalizing([0], 4.0)
    logits = torch.tensor([[3.9, 3.0, 2.0]])
    assert [int(pick(logits, temperature=0.0)) for _ in range(3)] == [1, 2, 0]


def test_a_text_ends_before_the_first_of_its_stop_texts(monkeypatch):
    """Even if one piece of text holds several."""
    monkeypatch.setattr(sample, "text_of_tokens", lambda *_: iter(["one two three"]))
    tokenizer = gpt.Tokenizer("char", "abc")
    model = SimpleNamespace(generate=None)
    pieces = sample.generate_text(model, tokenizer, [0], 5, stop=["three", "two"])
    assert "".join(pieces) == "one "
