"""sample.py: let a trained model continue a text, or talk with it.

    python sample.py --prompt "ROMEO:"                 the newest run under out/; --prompt may be left out
    python sample.py --out_dir=out/pydoc --interactive
    python sample.py --out_dir=out/mine --chat         talk with a model trained on messages
    python sample.py --show --prompt "ROMEO:"          the likeliest next tokens; --show=attention draws a map
    python sample.py --prompt=FILE:start.txt --max_tokens=60000 --output=long.txt
    python sample.py --init_from=gpt2                  a Hugging Face folder or hub id; see pretrained.py
    python sample.py --export=FOLDER                   write the newest run as such a folder

It needs nothing but a checkpoint of gpt.py: the tokenizer is in it.
"""

import codecs
import contextlib
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gpt
from gpt import context_length, load_checkpoint, native_bfloat16, pick_device, sample_next

# ---- Settings: each comment is its help text (python sample.py --help) -------------------------------------
prompt = "\n"  # text to continue, or FILE:path to read it from
max_tokens = 100  # length of a sample, in tokens
num_samples = 1  # samples to draw, one after the other
temperature = 0.8  # below 1 safer, above 1 wilder; 0: always the likeliest token
top_k = 200  # draw among the k likeliest tokens only; 0: all
top_p = 0.9  # draw among the fewest tokens that reach this probability together; 1: all
min_p = 0.0  # drop tokens less probable than this share of the likeliest's probability; 0: none
repetition_penalty = 1.0  # above 1: tokens already used become less likely
stop = "<|endoftext|>"  # end before one of these texts or tokens, parted by ||; the default: at a text's end
seed = 1337  # of the draws
interactive = False  # read prompts from the keyboard until quit, exit, q or Ctrl-D
chat = False  # talk with a model that was trained on messages, by its own template
system = ""  # chat: system text, which precedes the conversation
checkpoint = ""  # checkpoint file; empty: that of out_dir
out_dir = ""  # a run's folder; empty: the newest in out/, or else that in models/
init_from = ""  # instead: a Hugging Face folder or hub id, as gpt2, or a checkpoint
block_size = 2048  # context length, at most, of a model from a Hugging Face folder or id, in tokens
show: str | None = (
    None  # --show: the likeliest next tokens instead of a sample; --show=attention: a picture
)
export = ""  # only write the model to this new folder, in Hugging Face's format, in float32 or as dtype says
output = ""  # write the samples, or attention.png, to this file; empty: to the screen, as they come
device = "auto"  # auto: cuda, else mps, else cpu | or any torch device
dtype = "auto"  # auto: bfloat16 on GPUs that have it, and for int8 on CPUs, else float32 | float32 | bfloat16
quantize = ""  # int8: weights as one byte each, which halves their memory; empty: as dtype says
compile = False  # compile the step from token to token: up to a minute to begin, then faster
cuda_graphs = True  # on a GPU record that step, and replay it: no kernel waits for Python

HERE = Path(__file__).resolve().parent
TUNABLE = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_tokens",
)  # while it runs


# ---- From text to text -------------------------------------------------------------------------------------
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
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "stop": [s for s in stop.split("||") if s],
    }


def warn_about_length(n, block_size):
    """Say so when not all of the prompt, or not all of the text to come, fits the model's context."""
    if n > block_size:
        seen = context_length(n, block_size)
        print(
            f"note: the prompt has {n} tokens, of which the model sees the last {seen}",
            file=sys.stderr,
        )
    elif n + max_tokens > block_size:
        print(
            f"note: the model sees {block_size} tokens at most and forgets the oldest",
            file=sys.stderr,
        )


def encode_parts(tokenizer, parts):
    """Return the ids of texts that follow each other, as a list, after tokenizer.begin, if any.
    parts: (text, names) pairs; where names is True, special tokens' names in text, as <|user|>, mean these.
    Plain text is encoded in one piece from one special token to the next, whatever parts it comes from."""
    known = "|".join(map(re.escape, sorted(tokenizer.special, reverse=True))) or "(?!)"
    ids, plain = [], ""
    for text, names in parts:
        for i, piece in enumerate(re.split(f"({known})", text) if names else [text]):
            if i % 2:
                ids += [*tokenizer.encode(plain), tokenizer.special[piece]]
                plain = ""
            else:
                plain += piece
    ids += tokenizer.encode(plain)
    return ids if tokenizer.begin in (None, *ids[:1]) else [tokenizer.begin, *ids]


def encode_prompt(tokenizer, text):
    return encode_parts(tokenizer, [(text, True)])


def penalize(logits, seen, penalty):
    """Divide the positive and multiply the negative logits of ids where `seen` is True (arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalizing(ids, penalty):
    """Return sample_next for one text that begins with ids, all of whose tokens so far it penalizes."""
    seen = torch.zeros(1, 0, dtype=torch.bool)

    def pick(logits, **sampling):
        nonlocal seen
        if not seen.numel():
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[:, ids] = True
        last = sample_next(penalize(logits, seen, penalty), **sampling)
        seen.scatter_(1, last[:, None], True)
        return last

    return pick


def generate_text(
    model, tokenizer, prompt, max_tokens, stop=(), repetition_penalty=1.0, **sampling
):
    """Yield the text that continues prompt, a text or ids, piece by piece, up to max_tokens or one of the
    strings `stop`, of which <|endoftext|> means tokenizer.end too, whatever its name."""
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    if repetition_penalty != 1:
        sampling["pick"] = penalizing(ids, repetition_penalty)
    end = tokenizer.end if "<|endoftext|>" in stop else None
    decoder = codecs.getincrementaldecoder("utf-8")(
        "replace"
    )  # waits for the rest of a split character
    text = ""
    for last in model.generate([ids], max_tokens, **sampling):
        if (token := int(last)) == end:
            break
        text += decoder.decode(tokenizer.decode_bytes([token]))
        if found := [text.find(s) for s in stop if s in text]:
            yield text[: min(found)]
            return
        held = max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)
        yield text[: len(text) - held]  # the rest may prove to begin a stop string
        text = text[len(text) - held :]
    yield text + decoder.decode(b"", final=True)


def write_sample(model, tokenizer, generator, forward, file, text):
    """Write text and its continuation to file, piece by piece. Raises ValueError for an unknown character."""
    options = sampling()
    warn_about_length(len(encode_prompt(tokenizer, text)), model.config.block_size)
    file.write(text)
    for piece in generate_text(
        model, tokenizer, text, generator=generator, forward=forward, **options
    ):
        file.write(piece)
        file.flush()
    file.write("\n")


# ---- The model ---------------------------------------------------------------------------------------------
def find_checkpoint():
    """Return the path of the checkpoint to use. Raises FileNotFoundError if there is none."""
    if checkpoint or init_from:
        return checkpoint or init_from
    folders = [Path(out_dir)] if out_dir else (HERE / "out").glob("*/")
    found = [
        path for folder in folders for path in folder.glob("*.pt") if path.stem in ("best", "ckpt")
    ]
    if not out_dir:
        found = found or [*(HERE / "models").glob("*/best.pt")]  # one comes with the files
    if not found:
        raise FileNotFoundError(
            f"{out_dir or HERE / 'out'} holds no checkpoint: train a model first, as by "
            "python gpt.py config/train_shakespeare.py"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime)
    best = newest.with_name("best.pt")
    return best if best in found else newest


class RowLinear(nn.Linear):
    """nn.Linear that reads the weights for a single row, as in generating, faster than BLAS does on a CPU."""

    def forward(self, x):
        alone = (
            x.numel() == x.size(-1) and x.dtype == self.weight.dtype and not torch.is_grad_enabled()
        )
        if alone and torch.compiler.is_compiling():  # the compiler makes one loop of it
            return (x.unsqueeze(-2) * self.weight).sum(-1) + (0 if self.bias is None else self.bias)
        if alone and x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def speed_up_rows(model):
    """Make every nn.Linear of a model a RowLinear, in place; return the model."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
    return model


class Int8(nn.Module):
    """A matrix as int8 rows with a scale each, multiplied as by nn.Linear or, given ids, looked up as by
    nn.Embedding. The scale is the row's largest weight / 127, so that none is off by more than half of it."""

    def __init__(self, weight, bias=None):
        super().__init__()
        scale = weight.detach().abs().amax(1).clamp(min=1e-12) / 127
        rows = weight.detach().float() / scale.float()[:, None]
        self.register_buffer("rows", rows.round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)  # (out,)
        self.bias = bias

    weight = property(lambda self: self.rows * self.scale[:, None])  # as the loss takes it

    def forward(self, x):
        if x.dtype == torch.long:
            return self.rows[x] * self.scale[x].unsqueeze(-1)
        if x.is_cpu and x.dtype == torch.bfloat16:  # torch's kernel for float32 is slow
            y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.rows, self.scale)
            y = y.unflatten(0, x.shape[:-1])
        elif (
            x.numel() == x.size(-1) and torch.compiler.is_compiling()
        ):  # the compiler makes one loop of it
            y = (x.unsqueeze(-2) * self.rows).sum(-1) * self.scale
        else:
            y = F.linear(x, self.rows.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize_weights(model):
    """Replace a model's linear layers and its token embedding by Int8, which share a matrix if tied."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8(child.weight, child.bias))
    model.wte = model.lm_head if model.config.tie_weights else Int8(model.wte.weight)


def weight_bytes(model):
    """Return how many bytes the parameters and buffers take, but for the table of rotary angles."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t is not model.rotary)


def load_model(device):
    """Return (model, tokenizer, checkpoint), weights as dtype and quantize say, which it tells on stderr."""
    path = find_checkpoint()
    model, tokenizer, state = load_checkpoint(path)  # on the CPU; moved once converted
    n, before = model.n_params(), f"step {state['step']:,}, " if "step" in state else ""
    best = state.get("best_val_loss", math.inf)  # inf: none yet, of a run that was stopped early
    loss = f", val loss {best:.4f}" if best < math.inf else ""
    fast = native_bfloat16(device) if device.type == "cuda" else device.type == "cpu" and quantize
    if dtype == "bfloat16" or (dtype == "auto" and fast and not export):
        model.bfloat16()
    if "step" not in state and model.config.use_rope and not export:  # the cache will be as long
        model.config.block_size = min(block_size, model.config.block_size)
    kind = str(model.ln_f.weight.dtype)[6:]
    if quantize:
        quantize_weights(model)
        kind += f", int8 weights, {weight_bytes(model) / 2**20:.1f} MiB ({n / 2**19:.1f} MiB in bfloat16)"
    print(
        f"{path}: {before}{n / 1e6:.2f}M parameters{loss}; {device.type}, {kind}", file=sys.stderr
    )
    return speed_up_rows(model.to(device)), tokenizer, state


# on a GPU kernels are tried in several shapes, and products of one row become the compiler's own loops
COMPILE = {"dynamic": False, "options": {"coordinate_descent_tuning": True}}


def compiled(model):
    """Return model.forward compiled, or where that fails, which is tried, as it is."""
    forward = torch.compile(model.forward, **COMPILE)
    try:
        list(model.generate([[0]], 2, forward=forward))
    except Exception as e:  # noqa: BLE001  # compilers' errors have no common type
        print(f"torch.compile failed ({type(e).__name__}): going on without it", file=sys.stderr)
        return model.forward
    return forward


# ---- At the keyboard ---------------------------------------------------------------------------------------
class Chat:
    """A conversation by the tokenizer's template; turns: a question, its answer, the next question, ..."""

    def __init__(self, model, tokenizer, generator, forward):
        self.model, self.tokenizer, self.turns, self.forgetful = model, tokenizer, [], False
        self.options = {"generator": generator, "forward": forward}
        lacking = {*re.findall(r"<\|\w+\|>", "".join(tokenizer.chat))} - tokenizer.special.keys()
        if lacking and tokenizer.state["chars"]:  # others spell them, as prepare.py does
            raise ValueError(
                f"the tokenizer lacks {' and '.join(sorted(lacking))}: --chat takes a model "
                "trained on messages, --interactive any"
            )

    def encode(self, turns):
        """Return the ids of system text and turns, in which names of special tokens are mere text."""
        said = [(0, system)] * bool(system) + [(1 + i % 2, text) for i, text in enumerate(turns)]
        parts = []
        for role, text in said:
            before, _, after = self.tokenizer.chat[role].partition("%s")
            parts += [(before, True), (text, False), (after, True)]
        return encode_parts(self.tokenizer, parts)

    def ask(self, question):
        """Add a question to turns, without the oldest ones where room lacks; return the ids to continue."""
        turns, block_size = [*self.turns, question], self.model.config.block_size
        room = min(max_tokens, block_size // 2)
        while len(ids := self.encode(turns)) + room > block_size:
            if len(turns) == 1:
                raise ValueError(
                    f"{len(ids)} tokens of message and system text and {room} for the answer "
                    f"exceed block_size {block_size}: shorten the message or lower max_tokens"
                )
            turns = turns[2:]
        if len(turns) < len(self.turns) and not self.forgetful:
            self.forgetful = True
            print(
                f"note: beyond {block_size} tokens the oldest turns are forgotten", file=sys.stderr
            )
        self.turns = turns
        return ids

    def answer(self, question):
        """Print the answer as it comes, and remember it, whole or not."""
        ids, options = self.ask(question), sampling() | self.options
        options["max_tokens"] = min(max_tokens, self.model.config.block_size - len(ids))
        mark = self.tokenizer.chat[2].partition("%s")[2]  # what stands after an answer
        options["stop"] += ["<|endoftext|>"] + [mark.strip() or mark] * bool(mark)
        self.turns.append("")
        for piece in generate_text(self.model, self.tokenizer, ids, **options):
            self.turns[-1] += piece
            print(piece, end="", flush=True)
        print()

    def command(self, line):
        """Begin a new conversation by /reset, or by /system with another system text; or change a setting."""
        global system
        name, _, text = line[1:].strip().partition(" ")
        if name not in ("reset", "system"):
            return change_setting(line)
        if name == "system":
            self.tokenizer.encode(text)  # raises ValueError for an unknown character
            system = text.strip()
        self.turns, self.forgetful = [], False


def change_setting(line):
    """Set one of TUNABLE by a line such as "/top_k 50"; for others raise ValueError and change nothing."""
    words = line[1:].replace("=", " ").split()
    if len(words) != 2 or words[0] not in TUNABLE:
        raise ValueError(
            "; ".join(f"/{name} {globals()[name]}" for name in TUNABLE) + " can be changed"
        )
    name, before = words[0], globals()[words[0]]
    try:
        globals()[name] = type(before)(words[1])
        sampling()
    except ValueError as e:
        globals()[name] = before
        raise ValueError(f"{name} stays {before}: {e}") from e


def interact(greeting, respond, command):
    """Pass lines from the keyboard to respond or, from a slash on, command, until one or their end leaves."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # input() now edits lines and recalls them with the arrow keys
    print(
        greeting,
        "/temperature 0.5 changes a setting, / lists them; quit, exit, q or Ctrl-D leaves.",
    )
    while True:
        try:
            line = input("> ")
            if line.strip() in ("quit", "exit", "q"):
                return
            if line:
                (command if line.startswith("/") else respond)(line)
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
    if quantize not in ("", "int8") or (quantize and export):
        raise ValueError(
            f"quantize is {quantize!r}: it must be int8, or empty for weights as they are; only "
            "these are exported"
        )
    gpt.cuda_graphs = cuda_graphs
    chosen = pick_device(device)
    model, tokenizer, state = load_model(chosen)
    if export:
        import pretrained

        pretrained.export(model, tokenizer, state, export)
        return print(f"wrote {export}, in Hugging Face's format", file=sys.stderr)
    forward = compiled(model) if compile else model.forward
    run = model, tokenizer, torch.Generator(chosen).manual_seed(seed), forward
    if chat:
        talk = Chat(*run)
        return interact(
            "Type a message. /reset begins a new conversation, /system TEXT one with that system "
            "text, /system one without.",
            talk.answer,
            talk.command,
        )
    if interactive:
        return interact(
            "Type how a text begins.", partial(write_sample, *run, sys.stdout), change_setting
        )
    text, began = read_prompt(), time.time()
    ids = encode_prompt(tokenizer, text)  # before anything is written
    if show is not None:
        import plots

        return plots.show(model, tokenizer, ids, show, output or "attention.png")
    with (
        open(output, "w", encoding="utf-8")
        if output
        else contextlib.nullcontext(sys.stdout) as file
    ):
        for i in range(num_samples):
            if i:
                file.write("-" * 80 + "\n")
            write_sample(*run, file, text)
    if output:
        print(f"wrote {output} in {time.time() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, word_setting="prompt")
