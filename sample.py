"""sample.py: let a trained model continue a text.

    python sample.py --prompt "ROMEO:"                 the newest run under out/; --prompt may be left out
    python sample.py --out_dir=out/pydoc --interactive
    python sample.py --prompt=FILE:start.txt --max_tokens=60000 --output=long.txt

It needs a checkpoint of gpt.py and nothing else; the tokenizer is in it.
"""
import codecs
import contextlib
import math
import re
import sys
import time
from pathlib import Path

import torch

from gpt import context_length, load_checkpoint, native_bfloat16, pick_device

prompt = "\n"  # text to continue, or FILE:path to read it from
max_tokens = 100  # length of a sample, in tokens
num_samples = 1  # samples to draw, one after the other
temperature = 0.8  # below 1 safer, above 1 wilder; 0: always the likeliest token
top_k = 200  # draw among the k likeliest tokens only; 0: all
top_p = 0.9  # draw among the fewest tokens that reach this probability together; 1: all
min_p = 0.0  # drop tokens less probable than this share of the likeliest's probability; 0: none
repetition_penalty = 1.0  # above 1: tokens already used become less likely
stop = "<|endoftext|>"  # end a sample before this text; several are separated by ||; empty: none
seed = 1337  # of the draws
interactive = False  # read prompts from the keyboard until quit, exit, q or Ctrl-D
checkpoint = ""  # checkpoint file; empty: that of out_dir
out_dir = ""  # a run's folder; empty: the newest under out/ beside this script
output = ""  # write the samples to this file; empty: to the screen, as they come
device = "auto"  # auto: cuda, else mps, else cpu | or any torch device
dtype = "auto"  # auto: bfloat16 on GPUs that have it, else float32 | float32 | bfloat16
compile = False  # compile the step from token to token: some seconds to begin, then faster

HERE = Path(__file__).resolve().parent
TUNABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")  # while it runs


def find_checkpoint():
    """Return the path of the checkpoint to use. Raises FileNotFoundError if there is none."""
    if checkpoint:
        return Path(checkpoint)
    folders = [Path(out_dir)] if out_dir else (HERE / "out").glob("*/")
    found = [path for folder in folders for path in folder.glob("*.pt") if path.stem in ("best", "ckpt")]
    if not found:
        raise FileNotFoundError(f"{out_dir or HERE / 'out'} holds no checkpoint: train a model first, as by "
                                "python gpt.py config/train_shakespeare.py")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    best = newest.with_name("best.pt")
    return best if best in found else newest


def read_prompt():
    if not prompt.startswith("FILE:"):
        return prompt or "\n"
    path = Path(prompt.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"the prompt file {path} is not UTF-8 text (byte {e.start})") from e
    except OSError as e:
        raise FileNotFoundError(f"the prompt file {path} cannot be read: {e.strerror}") from e


def sampling():
    """Return the sampling settings as keywords of generate_text. Raises ValueError for one out of range."""
    for name, fits, meaning in (
        ("temperature", 0 <= temperature < math.inf, "at least 0; 0 is greedy"),
        ("top_k", top_k >= 0, "at least 0; 0 keeps all tokens"),
        ("top_p", 0 < top_p <= 1, "above 0 and at most 1; 1 keeps all tokens"),
        ("min_p", 0 <= min_p <= 1, "from 0 to 1; 0 keeps all tokens"),
        ("repetition_penalty", 0 < repetition_penalty < math.inf, "above 0; 1 is none"),
        ("max_tokens", max_tokens >= 0, "at least 0"),
        ("num_samples", num_samples >= 1, "at least 1"),
        ("seed", 0 <= seed < 2**63, "at least 0 and below 2**63"),
    ):
        if not fits:
            raise ValueError(f"{name} is {globals()[name]}: it must be {meaning}")
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "max_tokens": max_tokens,
            "stop": [s for s in stop.split("||") if s]}


def warn_about_length(n, block_size):
    """Say so when not all of the prompt, or not all of the text to come, fits the model's context."""
    if n > block_size:
        seen = context_length(n, block_size)
        print(f"note: the prompt has {n} tokens, of which the model sees the last {seen}", file=sys.stderr)
    elif n + max_tokens > block_size:
        print(f"note: the model sees {block_size} tokens at most and forgets the oldest", file=sys.stderr)


def encode_prompt(tokenizer, text):
    """Return text's ids, as a list; names of the tokenizer's special tokens, as <|user|>, mean these."""
    names = "|".join(map(re.escape, tokenizer.special))
    parts = re.split(f"({names})", text) if names else [text]
    special = {name: [i] for name, i in tokenizer.special.items()}
    return [i for part in parts for i in special.get(part) or tokenizer.encode(part)]


def generate_text(model, tokenizer, prompt, max_tokens, stop=(), **sampling):
    """Yield the text that continues prompt, piece by piece, up to max_tokens or one of the strings `stop`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # waits for the rest of a split character
    text = ""
    for last in model.generate([encode_prompt(tokenizer, prompt)], max_tokens, **sampling):
        text += decoder.decode(tokenizer.decode_bytes(last.tolist()))
        if ends := [text.find(s) for s in stop if s in text]:
            yield text[: min(ends)]
            return
        held = max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)
        yield text[: len(text) - held]  # the rest may prove to begin a stop string
        text = text[len(text) - held :]
    yield text + decoder.decode(b"", final=True)


def compiled(model):
    """Return model.forward compiled, or where that fails, which is tried, as it is."""
    forward = torch.compile(model.forward, dynamic=False)
    try:
        list(model.generate([[0]], 2, forward=forward))
    except Exception as e:  # noqa: BLE001  # compilers' errors have no common type
        print(f"torch.compile failed ({type(e).__name__}): going on without it", file=sys.stderr)
        return model.forward
    return forward


def write_sample(model, tokenizer, text, generator, forward, file):
    """Write text and its continuation to file, piece by piece. Raises ValueError for an unknown character."""
    options = sampling()
    warn_about_length(len(encode_prompt(tokenizer, text)), model.config.block_size)
    file.write(text)
    for piece in generate_text(model, tokenizer, text, generator=generator, forward=forward, **options):
        file.write(piece)
        file.flush()
    file.write("\n")


def change_setting(words):
    """Set one of TUNABLE by words such as ["top_k", "50"]; for others raise ValueError and change nothing."""
    if len(words) != 2 or words[0] not in TUNABLE:
        raise ValueError("; ".join(f"/{name} {globals()[name]}" for name in TUNABLE) + " can be changed")
    name, before = words[0], globals()[words[0]]
    try:
        globals()[name] = type(before)(words[1])
        sampling()
    except ValueError as e:
        globals()[name] = before
        raise ValueError(f"{name} stays {before}: {e}") from e


def interact(model, tokenizer, generator, forward):
    """Answer prompts from the keyboard until quit, exit, q or the end of input."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # input() now edits lines and recalls them with the arrow keys
    print("Type how a text begins. /temperature 0.5 changes a setting, / lists them; quit, exit, q or Ctrl-D "
          "leaves.")
    while True:
        try:
            line = input("> ")
            if line.strip() in ("quit", "exit", "q"):
                return
            if line.startswith("/"):
                change_setting(line[1:].replace("=", " ").split())
            elif line:
                write_sample(model, tokenizer, line, generator, forward, sys.stdout)
        except ValueError as e:
            print(e)
        except KeyboardInterrupt:  # ends this text, not the program
            print()
        except EOFError:
            print()
            return


def main():
    sampling()
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}: it must be auto, float32 or bfloat16")
    chosen, path = pick_device(device), find_checkpoint()
    model, tokenizer, state = load_checkpoint(path, chosen)
    if dtype == "bfloat16" or (dtype == "auto" and chosen.type == "cuda" and native_bfloat16(chosen)):
        model.bfloat16()
    print(f"{path}: step {state['step']:,}, {model.n_params() / 1e6:.2f}M parameters, val loss "
          f"{state['best_val_loss']:.4f}; {chosen.type}, {str(model.wte.weight.dtype)[6:]}", file=sys.stderr)
    generator = torch.Generator(chosen).manual_seed(seed)
    forward = compiled(model) if compile else model.forward
    if interactive:
        return interact(model, tokenizer, generator, forward)
    text, began = read_prompt(), time.time()
    encode_prompt(tokenizer, text)  # before anything is written
    with open(output, "w", encoding="utf-8") if output else contextlib.nullcontext(sys.stdout) as file:
        for i in range(num_samples):
            if i:
                file.write("-" * 80 + "\n")
            write_sample(model, tokenizer, text, generator, forward, file)
    if output:
        print(f"wrote {output} in {time.time() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, word_setting="prompt")
