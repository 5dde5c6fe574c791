"""prepare.py: turn text into data/<name>/{train.bin, val.bin, meta.json}.

    python prepare.py shakespeare                       download tiny Shakespeare; --input=FILE: a local copy
    python prepare.py pydoc                             Python's own documentation; needs no network
    python prepare.py --input=FILE|FOLDER --name=NAME   your text: a file, or a folder's .txt and .md files

Then: python gpt.py --dataset=NAME
"""
import hashlib
from pathlib import Path

from gpt import SHAKESPEARE_SHA256, Tokenizer, corpus, write_dataset

dataset = ""  # shakespeare or pydoc; the first word on the command line
input = ""  # a text file, or a folder whose .txt and .md files are taken in order of their paths
name = ""  # the new folder under data_dir; empty: the input's name
data_dir = ""  # folder of the data sets; empty: data/ beside this script
tokenizer = "char"  # char: one id per character | a tiktoken encoding: gpt2, cl100k_base, o200k_base
val_fraction = 0.1  # share of the text, at its end, kept for validation


def read_text(path):
    """Return the text of a UTF-8 file without its byte order mark. Raises ValueError for anything else."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start} is 0x{content[e.start]:02x}): convert it "
                         "first, as with iconv -f latin1 -t utf-8") from e
    if "\0" in text:
        raise ValueError(f"{path} is binary (byte {content.index(0)} is 0): give a text file")
    if text.startswith("\ufeff"):
        print(f"{path}: dropped the byte order mark")
    return text.removeprefix("\ufeff")


def read_input(path):
    """Return the text of a file, or of a folder's .txt and .md files joined by newlines."""
    if not path.exists():
        raise FileNotFoundError(f"input {path} does not exist")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no .txt or .md file")
    return "\n".join(read_text(file) for file in files)


def read_source():
    """Return (name, text, source) of what the settings ask for."""
    if dataset not in ("", "shakespeare", "pydoc"):
        raise ValueError(f"data set {dataset!r} is neither shakespeare nor pydoc: for your own text use "
                         f"--input=FILE --name={dataset}")
    if input and dataset == "pydoc":
        raise ValueError(f"pydoc takes no --input={input}: drop the word pydoc and give your text a --name")
    if input:
        text = read_input(Path(input))
        if dataset == "shakespeare" and hashlib.sha256(text.encode()).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError(f"{input} is not tiny Shakespeare (its sha256 differs): drop the word "
                             "shakespeare and give your text a --name")
        return name or dataset or Path(input).resolve().stem, text, input
    if not dataset:
        raise ValueError("nothing to prepare: name shakespeare or pydoc, or give --input=FILE --name=NAME")
    return name or dataset, *corpus(dataset)


def main():
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: it must be above 0 and below 1")
    chosen, text, source = read_source()
    if len(text) < 2:
        raise ValueError(f"{source} is empty: give a text of two characters at least")
    if Path(chosen).name != chosen:
        raise ValueError(f"name {chosen!r} is not the plain name of a folder: other places go by --data_dir")
    folder = Path(data_dir or Path(__file__).resolve().parent / "data") / chosen
    characters = "".join(sorted(set(text))) if tokenizer == "char" else ""
    meta = write_dataset(folder, text, Tokenizer(tokenizer, characters), source, val_fraction)
    print(f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, "
          f"{tokenizer} vocabulary of {meta['vocab_size']:,}; now: python gpt.py --dataset={chosen}")


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, word_setting="dataset")
