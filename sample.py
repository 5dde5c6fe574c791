"""sample.py: let a trained model continue a text, or chat with the model.

    python sample.py --prompt "ROMEO:"            the newest run under out/ continues the prompt
    python sample.py --out_dir=out/pydoc --interactive
    python sample.py --out_dir=out/mine --chat    talk with a model trained on messages
    python sample.py --show --prompt "ROMEO:"     the likeliest next tokens, or --show=attention
    python sample.py --prompt=FILE:start.txt --max_tokens=60000 --output=long.txt
    python sample.py --init_from=gpt2             a Hugging Face folder or id, read by hub.py

Only a checkpoint is needed, because it also holds the tokenizer.
"""

import codecs
import contextlib
import math
import os
import re
import select
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from extras.chat import encode_conversation, encode_parts, with_begin
from gpt import (
    ThreadCount,
    as_path,
    check_setting,
    context_length,
    load_checkpoint,
    native_bfloat16,
    pick_device,
    read_settings,
    read_text,
    sample_next,
)

# ---- Settings: each comment is the help text (python sample.py --help) ----
prompt = "\n"  # text to continue, or FILE:path to read it from
max_tokens = 100  # length of a sample in tokens
num_samples = 1  # samples to draw, one after the other
temperature = 0.8  # below 1 safer, above 1 wilder; 0: always the likeliest token
top_k = 200  # draw only from the k likeliest tokens; 0: all
top_p = 0.9  # draw only from the fewest tokens that together reach this probability; 1: all
min_p = 0.0  # drop tokens below this fraction of the highest probability; 0: none
repetition_penalty = 1.0  # above 1: tokens already used become less likely
stop = "<|endoftext|>"  # end before one of these texts or tokens, separated by ||
seed = 1337  # seed of the draws
interactive = False  # read prompts from the keyboard until quit, exit, q or Ctrl-D
chat = False  # talk with a model that was trained on messages, using its chat template
system = ""  # chat: system prompt, which precedes the conversation
checkpoint = ""  # checkpoint file; empty: the one in out_dir
out_dir = ""  # a run's folder; empty: the newest in out/, or else the one in models/
init_from = ""  # instead of a run: a Hugging Face folder or id, such as gpt2, or a checkpoint
block_size = 2048  # maximum context of a Hugging Face model, in tokens, and length of its cache
show: str | None = None  # --show: the likeliest next tokens, no sample; --show=attention: a picture
output = ""  # file for the samples or the picture; empty: the screen, or attention.png
device = "auto"  # auto: the GPU that torch finds, else cpu | any torch device
dtype = "auto"  # auto: by device and model | bfloat16 | float32 | float16, on a CPU only
quantize = ""  # int8: weights of one byte each, which halves their memory; empty: as dtype says
compile = False  # compile the step that draws a token: up to a minute at first, faster later
cuda_graphs = True  # on a GPU, record each token's step and replay it: no kernel waits for Python

SETTINGS = read_settings(Path(__file__).read_text(encoding="utf-8-sig"))
HERE = Path(__file__).resolve().parent

RANGES = {
    "temperature": (lambda value: 0 <= value < math.inf, "at least 0; 0 is greedy"),
    "top_k": (lambda value: value >= 0, "at least 0; 0 keeps all tokens"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1; 1 keeps all tokens"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1; 0 keeps all tokens"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "above 0; 1 changes nothing"),
    "max_tokens": (lambda value: value >= 0, "at least 0"),
    "num_samples": (lambda value: value >= 1, "at least 1"),
    "seed": (lambda value: 0 <= value < 2**63, "at least 0 and below 2**63"),
    "block_size": (lambda value: value >= 1, "at least 1"),
    "dtype": (
        lambda value: value in ("auto", "float32", "bfloat16", "float16"),
        "auto, float32, bfloat16 or float16",
    ),
    "quantize": (lambda value: value in ("", "int8"), "int8, or empty for weights as they are"),
}


def check_ranges(**settings):
    """Raise ValueError for the first setting whose value is not valid."""
    for name, value in settings.items():
        fits, meaning = RANGES[name]
        if not fits(value):
            raise ValueError(f"{name} is {value!r}: it must be {meaning}")


@dataclass
class Sampling:
    """How tokens are drawn and where a text ends. The numbers can be changed at the keyboard.

    The defaults are the settings above.
    stop: texts and names of tokens, separated by ||.
    """

    temperature: float = temperature
    top_k: int = top_k
    top_p: float = top_p
    min_p: float = min_p
    repetition_penalty: float = repetition_penalty
    max_tokens: int = max_tokens
    stop: str = stop

    def __post_init__(self):
        check_ranges(**self.numbers())

    def numbers(self):
        """Return {name: value} of all fields but stop. These are the ones that can be changed."""
        return {name: value for name, value in vars(self).items() if name != "stop"}

    def options(self):
        """Return the keyword arguments for generate_text."""
        return self.numbers() | {"stop": [text for text in self.stop.split("||") if text]}

    def change(self, line):
        """Change a number as a line such as "/top_k 50" says. Raises ValueError if that fails."""
        words = line.removeprefix("/").replace("=", " ").split()
        if len(words) != 2 or words[0] not in self.numbers():
            commands = "; ".join(f"/{name} {value}" for name, value in self.numbers().items())
            raise ValueError(f"these settings can be changed: {commands}")
        name, text = words
        before = getattr(self, name)
        try:
            value = type(before)(text)
            replace(self, **{name: value})  # checks its range
        except ValueError as e:
            raise ValueError(f"{name} stays {before}: {e}") from e
        setattr(self, name, value)


# ---- From text to ids ----
def read_prompt(prompt):
    """Return the text to continue. Raises ValueError and OSError for a file that cannot be read."""
    if not prompt.startswith("FILE:"):
        return prompt or "\n"
    path = as_path(prompt.removeprefix("FILE:"))
    try:
        return read_text(path)
    except OSError as e:
        raise FileNotFoundError(f"the prompt file {path} cannot be read: {e.strerror}") from e


def encode_prompt(tokenizer, text):
    """Return the ids of a text in which names of special tokens stand for those tokens.

    The ids begin with tokenizer.begin_id, if there is one.
    """
    return with_begin(tokenizer, encode_parts(tokenizer, [(text, True)]))


def warn_about_length(n, block_size, max_tokens):
    """Warn if the model cannot see all of a prompt of n tokens, or all of the text to come."""
    if n > block_size:
        seen = context_length(n, block_size)
        note = f"the prompt has {n} tokens, but the model sees only the last {seen}"
    elif n + max_tokens > block_size:
        note = f"the model sees at most {block_size} tokens and forgets the oldest ones"
    else:
        return
    print(f"note: {note}", file=sys.stderr)


# ---- From ids to text ----
def penalize(logits, seen, penalty):
    """Return logits that are lower for the ids where `seen` is True (arXiv:1909.05858)."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


def penalizing(ids, penalty):
    """Return a sample_next that penalizes used tokens, for a text that begins with ids."""
    seen = None  # (1, vocab_size) bool

    def pick(logits, **sampling):
        nonlocal seen
        if seen is None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[:, ids] = True
        drawn = sample_next(penalize(logits, seen, penalty), **sampling)
        seen.scatter_(1, drawn[:, None], True)
        return drawn

    return pick


def text_of_tokens(tokenizer, tokens, ends):
    """Yield the text of each token before one of `ends`, then the rest of an incomplete character.

    A character may span several tokens. Its text comes with the last of them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token in ends:
            break
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def n_held_back(text, stop):
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    beginnings = [s[:n] for s in stop for n in range(len(s))]
    return max((len(s) for s in beginnings if text.endswith(s)), default=0)


def generate_text(
    model,
    tokenizer,
    prompt,
    max_tokens,
    stop=(),
    repetition_penalty=1.0,
    after_token=None,
    **sampling,
):
    """Yield the text that continues a prompt, piece by piece.

    prompt: a text, or a list of ids.
    max_tokens: the largest number of tokens to draw.
    stop: strings before which the text ends. Among these, "<|endoftext|>" also means
        tokenizer.end_ids, whatever these tokens' names are.
    repetition_penalty: above 1, tokens already used become less likely.
    after_token: a function to call after each token.
    sampling: further keyword arguments of GPT.generate.
    """
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    if repetition_penalty != 1:
        sampling["pick"] = penalizing(ids, repetition_penalty)

    def drawn_tokens():
        for drawn in model.generate([ids], max_tokens, **sampling):
            yield int(drawn)
            if after_token is not None:
                after_token()

    ends = tokenizer.end_ids if "<|endoftext|>" in stop else ()
    text = ""  # what has not been yielded yet
    for piece in text_of_tokens(tokenizer, drawn_tokens(), ends):
        text += piece
        found = [text.find(s) for s in stop if s in text]
        if found:
            yield text[: min(found)]
            return
        n_shown = len(text) - n_held_back(text, stop)
        yield text[:n_shown]
        text = text[n_shown:]
    yield text


def write_sample(model, tokenizer, text, file, sampling, **generation):
    """Write a text and its continuation to a file, piece by piece.

    generation: further keyword arguments of GPT.generate.
    Raises ValueError for a character that the tokenizer does not know.
    """
    ids = encode_prompt(tokenizer, text)
    warn_about_length(len(ids), model.config.block_size, sampling.max_tokens)
    file.write(text)
    for piece in generate_text(model, tokenizer, ids, **sampling.options(), **generation):
        file.write(piece)
        file.flush()
    file.write("\n")


# ---- Faster and smaller matrices ----
class RowLinear(nn.Linear):
    """nn.Linear that reads its weight faster for a single row, which is what generation needs.

    The weight may be float16 where x is float32, which halves the bytes to read. A row is then
    rounded to float16 as well, the products are summed in float32, and the sum is rounded to
    float16. If the layer is compiled, neither is rounded.
    """

    def forward(self, x):
        is_row = x.numel() == x.size(-1) and not torch.is_grad_enabled()
        if is_row and torch.compiler.is_compiling():  # the compiler turns this into one loop
            y = (x.unsqueeze(-2) * self.weight).sum(-1)
            return y if self.bias is None else y + self.bias
        if self.weight.dtype == torch.float16 and x.dtype == torch.float32:
            return self.multiply_float16(x, is_row)
        if (
            is_row
            and x.is_cpu
            and x.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

    def multiply_float16(self, x, is_row):
        """Return x @ weight.mT + bias for a float16 weight; torch has a fast kernel for one row."""
        if is_row:
            y = F.linear(x.half(), self.weight).float()
        else:
            y = F.linear(x, self.weight.float())
        return y if self.bias is None else y + self.bias


def speed_up_rows(model):
    """Replace a model's nn.Linear layers by RowLinear with the same weights; return the model."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear:
            # On the meta device no memory is spent on weights that are replaced immediately.
            row_linear = RowLinear(linear.in_features, linear.out_features, device="meta")
            row_linear.weight = linear.weight
            row_linear.bias = linear.bias
            model.set_submodule(name, row_linear)
    return model


def store_as_float16(model):
    """Convert a model's RowLinear weights to float16, but not the embeddings and norms."""
    for module in model.modules():
        if isinstance(module, RowLinear):
            module.weight = nn.Parameter(module.weight.half(), requires_grad=False)


class Int8(nn.Module):
    """A matrix of int8 rows with one scale each, in place of an nn.Linear or an nn.Embedding.

    The scale is the row's largest weight / 127, so no weight is off by more than half the scale.
    Given ids, which are int64, the layer looks them up. Given anything else, it multiplies.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        scale = weight.detach().abs().amax(1).clamp(min=1e-12) / 127
        rows = weight.detach().float() / scale.float()[:, None]
        self.register_buffer("rows", rows.round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)  # (out,)
        self.bias = bias

    @property
    def weight(self):
        """The matrix itself, from which GPT.forward computes the loss."""
        return self.rows * self.scale[:, None]

    def forward(self, x):
        if x.dtype == torch.long:
            return self.rows[x] * self.scale[x].unsqueeze(-1)
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias

    def multiply(self, x):
        """Return x @ weight.mT, computed in the fastest way that there is for x."""
        if x.is_cpu and x.dtype == torch.bfloat16:  # torch has a kernel for float32, but a slow one
            y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.rows, self.scale)
            return y.unflatten(0, x.shape[:-1])
        if x.numel() == x.size(-1) and torch.compiler.is_compiling():
            return (x.unsqueeze(-2) * self.rows).sum(-1) * self.scale  # compiled to one loop
        return F.linear(x, self.rows.to(x.dtype)) * self.scale


def quantize_weights(model):
    """Replace a model's linear layers and its token embedding by Int8.

    If the embedding is tied to the output head, both become the same Int8.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Int8(module.weight, module.bias))
    embedding = model.lm_head if model.config.tie_weights else Int8(model.wte.weight)
    model.set_submodule("wte", embedding)


def weight_bytes(model):
    """Return how many bytes parameters and buffers take, without the table of rotary angles."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not model.rotary)


# ---- The model ----
def find_checkpoint(out_dir):
    """Return the path of the checkpoint in out_dir or, if that is empty, of the newest run.

    A run's best.pt is preferred to its ckpt.pt. Raises FileNotFoundError if there is none.
    """
    folders = [as_path(out_dir)] if out_dir else list((HERE / "out").glob("*/"))
    found = []
    for folder in folders:
        found += [path for name in ("best.pt", "ckpt.pt") for path in folder.glob(name)]
    if not found and not out_dir:
        found = list((HERE / "models").glob("*/best.pt"))  # one comes with this project
    if not found:
        raise FileNotFoundError(
            f"{out_dir or HERE / 'out'} holds no checkpoint: train a model first, for example with "
            "python gpt.py config/train_shakespeare.py"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime)
    best = newest.with_name("best.pt")
    return best if best in found else newest


def read_model(source):
    """Return (model, tokenizer, checkpoint) of a checkpoint or of a Hugging Face folder or id."""
    path = as_path(source)
    if path.is_file() or path.suffix == ".pt" or (path / "best.pt").is_file():
        return load_checkpoint(path)
    from hub import load_pretrained

    return load_pretrained(source)


def load_model(source, device, dtype="auto", quantize="", block_size=block_size):
    """Return (model, tokenizer) for generating on a device, and describe the model on stderr.

    source: a checkpoint, or a Hugging Face folder or id. The other arguments are the settings of
        the same names.
    Raises ValueError for a dtype that does not suit the device.
    """
    if dtype == "float16" and (device.type != "cpu" or quantize):
        raise ValueError(
            "dtype is float16, which works only on a CPU without quantize: use bfloat16 or float32"
        )
    model, tokenizer, state = read_model(source)  # it stays on the CPU until it is converted
    if "step" not in state and model.config.use_rope:  # not trained here: its context may be long
        model.crop_block_size(min(block_size, model.config.block_size))
    if dtype == "auto":
        trained_here = "step" in state and not state.get("base")  # finetuned models have a base
        dtype = best_dtype(device, quantize, trained_here)
    if dtype == "bfloat16":
        model.bfloat16()
    n_params = model.n_params()
    weights = dtype
    if quantize:
        quantize_weights(model)
        size = weight_bytes(model) / 2**20
        weights += f", int8 weights, {size:.1f} MiB ({n_params / 2**19:.1f} MiB in bfloat16)"
    speed_up_rows(model)
    if dtype == "float16":
        store_as_float16(model)
        weights = "float32 with float16 matrices"
    described = describe(state, n_params)
    print(f"{source}: {described}; {device.type}, {weights}", file=sys.stderr)
    return model.to(device), tokenizer


def best_dtype(device, quantize, trained_here):
    """Return the name of a fast dtype for the weights on this device.

    trained_here: whether gpt.py trained the model. The activations of other models may exceed
        float16's range.
    """
    if device.type == "cpu":
        if quantize:
            return "bfloat16"  # for which torch has an int8 kernel
        # For one row, torch has a float16 kernel on processors with these instructions.
        fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return "float16" if fast and trained_here else "float32"
    fast = device.type == "cuda" and native_bfloat16(device)
    return "bfloat16" if fast else "float32"


def describe(state, n_params):
    """Return the step, size and loss of a checkpoint in words, as far as they are known."""
    parts = [f"{n_params / 1e6:.2f}M parameters"]
    if "step" in state:
        parts.insert(0, f"step {state['step']:,}")
    loss = state.get("best_val_loss", math.inf)
    if loss < math.inf:  # a run that was stopped early has none yet
        parts.append(f"val loss {loss:.4f}")
    return ", ".join(parts)


def adapt_to_other_processes(model, threads):
    """Choose a CPU model's number of threads anew if the current one may no longer be fastest.

    threads: a ThreadCount.
    """
    with torch.inference_mode():
        threads.adapt(lambda: model(torch.zeros(1, 1, dtype=torch.long)))


# On a GPU the compiler tries its kernels in several shapes.
COMPILE = {"dynamic": False, "options": {"coordinate_descent_tuning": True}}


def compiled(model, cuda_graphs):
    """Return model.forward compiled, or unchanged if a trial shows that compiling fails."""
    forward = torch.compile(model.forward, **COMPILE)
    try:
        list(model.generate([[0]], 2, forward=forward, cuda_graphs=cuda_graphs))
    except Exception as e:  # compilers' errors have no common type
        print(f"torch.compile failed ({type(e).__name__}): continuing without it", file=sys.stderr)
        return model.forward
    return forward


# ---- At the keyboard ----
class Chat:
    """A conversation in the tokenizer's chat template.

    turns: a question, its answer, the next question, and so on.
    """

    def __init__(self, model, tokenizer, sampling, system="", **generation):
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.system = system
        self.generation = generation  # further keyword arguments of GPT.generate
        self.turns = []
        self.has_forgotten = False
        needed = set(re.findall(r"<\|\w+\|>", "".join(tokenizer.chat_parts)))
        lacking = sorted(needed - tokenizer.special_tokens.keys())
        if lacking and tokenizer.state["chars"]:  # other vocabularies can spell them
            raise ValueError(
                f"the tokenizer lacks {' and '.join(lacking)}: --chat needs a model trained on "
                "messages, but --interactive works with any model"
            )

    def encode(self, turns):
        """Return the ids of the system prompt and turns; special tokens' names are plain text."""
        said = [("system", self.system)] if self.system else []
        for i, text in enumerate(turns):
            said.append(("assistant" if i % 2 else "user", text))
        return encode_conversation(self.tokenizer, said)

    def ask(self, question):
        """Add a question to the turns, and return the ids that the answer continues.

        The oldest questions and answers are dropped if they leave no room for the answer. Raises
        ValueError if the question alone fills the context.
        """
        block_size = self.model.config.block_size
        room = min(self.sampling.max_tokens, block_size // 2)
        turns = [*self.turns, question]
        ids = self.encode(turns)
        while len(turns) > 1 and len(ids) + room > block_size:
            turns = turns[2:]
            ids = self.encode(turns)
        if len(ids) >= block_size:
            raise ValueError(
                f"the message and the system prompt have {len(ids)} tokens, but the model sees "
                f"only {block_size}: shorten them"
            )
        if len(ids) + room > block_size:
            left = block_size - len(ids)
            print(f"note: the context has room for {left} more token(s)", file=sys.stderr)
        if len(turns) < len(self.turns) and not self.has_forgotten:
            self.has_forgotten = True
            note = f"note: beyond {block_size} tokens the oldest turns are forgotten"
            print(note, file=sys.stderr)
        self.turns = turns
        return ids

    def answer(self, question):
        """Print the answer as it comes, and remember it even if it is interrupted."""
        ids = self.ask(question)
        options = self.sampling.options() | self.generation
        options["max_tokens"] = min(options["max_tokens"], self.model.config.block_size - len(ids))
        _, _, after_answer = self.tokenizer.chat_parts[2].partition("%s")
        options["stop"].append("<|endoftext|>")
        if after_answer:
            options["stop"].append(after_answer.strip() or after_answer)
        self.turns.append("")
        for piece in generate_text(self.model, self.tokenizer, ids, **options):
            self.turns[-1] += piece
            print(piece, end="", flush=True)
        print()
        if self.tokenizer.decode(self.tokenizer.encode("a")) == " a":
            # Such a tokenizer puts a space before each text, which is no part of the answer.
            self.turns[-1] = self.turns[-1].removeprefix(" ")

    def command(self, line):
        """Begin a new conversation for /reset or /system TEXT; otherwise, change a setting."""
        name, _, text = line.removeprefix("/").strip().partition(" ")
        if name not in ("reset", "system"):
            self.sampling.change(line)
            return
        if name == "system":
            self.tokenizer.encode(text)  # raises ValueError for an unknown character
            self.system = text.strip()
        self.turns = []
        self.has_forgotten = False


PASTE_GAP = 0.05  # seconds; a line that follows the previous one sooner was pasted, not typed


def read_typed_text():
    """Return what is typed at the keyboard: a line or, if several are pasted, all of them."""
    lines = [input("> ")]
    # Other input, such as a pipe or a file, has one prompt on each line.
    if os.name == "posix" and sys.stdin.isatty():
        while select.select([sys.stdin], [], [], PASTE_GAP)[0]:
            try:
                lines.append(input())
            except EOFError:
                break
    return "\n".join(lines)


def interact(greeting, respond, command):
    """Pass texts from the keyboard to `respond`, and lines that begin with a slash to `command`.

    A word such as quit ends the loop, and so does the end of the input. A ValueError is printed.
    """
    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401  # input() now edits lines and recalls them with arrow keys
    print(
        f"{greeting} /temperature 0.5 changes a setting, and / lists the settings; quit, exit, q "
        "or Ctrl-D ends the program."
    )
    while True:
        try:
            text = read_typed_text()
            if text.strip() in ("quit", "exit", "q"):
                return
            if text.startswith("/") and "\n" not in text:
                command(text)
            elif text:
                respond(text)
        except ValueError as e:
            print(e)
        except KeyboardInterrupt:  # it ends this text, not the program
            print()
        except EOFError:
            print()
            return


# ---- Main ----
def write_samples(text, output, num_samples, write):
    """Write samples, which continue a text, to the file `output` or, if that is empty, to stdout.

    write: write_sample with all arguments but text and file.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if output:
            path = as_path(output)
            file = stack.enter_context(open(path, "w", encoding="utf-8", newline=""))
        for i in range(num_samples):
            if i > 0:
                file.write("-" * 80 + "\n")
            write(text=text, file=file)
    if output:
        print(f"wrote {output} in {time.monotonic() - started:.1f} s", file=sys.stderr)


def show_model(model, tokenizer, text, kind, output):
    """Print the likeliest tokens after a text, or draw what the model's attention looks at."""
    from extras import plots

    ids = encode_prompt(tokenizer, text)
    seen = context_length(len(ids), model.config.block_size)
    plots.show(model, tokenizer, ids[-seen:], kind, as_path(output or "attention.png"))


def main():
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, stop)
    check_ranges(num_samples=num_samples, seed=seed, block_size=block_size)
    check_ranges(dtype=dtype, quantize=quantize)
    chosen = pick_device(device)
    source = checkpoint or init_from or find_checkpoint(out_dir)
    model, tokenizer = load_model(source, chosen, dtype, quantize, block_size)
    generation = {
        "generator": torch.Generator(chosen).manual_seed(seed),
        "cuda_graphs": cuda_graphs,
    }
    if chosen.type == "cpu":
        threads = ThreadCount(partial(print, file=sys.stderr), trial_s=0.02)
        adapt_to_other_processes(model, threads)
        threads.say = lambda text: None  # from here on, notes would stand amid the sample
        if not compile:  # what is compiled is compiled for one number of threads
            generation["after_token"] = partial(adapt_to_other_processes, model, threads)
    if compile:
        generation["forward"] = compiled(model, cuda_graphs)
    write = partial(write_sample, model, tokenizer, sampling=sampling, **generation)

    if chat:
        talk = Chat(model, tokenizer, sampling, system, **generation)
        greeting = (
            "Type a message. /reset begins a new conversation. /system TEXT begins one with that "
            "system prompt, and /system alone begins one without."
        )
        interact(greeting, talk.answer, talk.command)
    elif interactive:
        interact("Type the beginning of a text.", partial(write, file=sys.stdout), sampling.change)
    elif show is not None:
        show_model(model, tokenizer, read_prompt(prompt), show, output)
    else:
        text = read_prompt(prompt)
        encode_prompt(tokenizer, text)  # raises ValueError before a file is written
        write_samples(text, output, num_samples, write)


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, SETTINGS, check_setting, word_settings=("prompt",))
