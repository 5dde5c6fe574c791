"""resume.py: go on with what has been trained: a run's newest checkpoint, or a model to finetune.

python gpt.py --init_from=resume            go on with the run in out_dir
python gpt.py --init_from=auto              the same if there is one, else begin: for jobs that restart
python gpt.py config/finetune_chat.py       another model, further; see pretrained.py
"""

import errno
import re
from dataclasses import asdict

import torch

from scaling import shard

FREE = (
    "dropout",
    "train_temperature",
    "gradient_checkpointing",
)  # of GPTConfig: shape no weight, no average


def newest_checkpoint(gpt, out):
    """Return (path, state) of the newest sound checkpoint in out; those that are not are named and set aside.

    Raises FileNotFoundError if there is none, ValueError if all are damaged.
    """
    paths = [path for path in out.glob("ckpt*.pt") if re.fullmatch(r"ckpt(-\d+)?", path.stem)]
    paths = sorted(paths, key=lambda path: (len(path.name), path.name)) or [out / "ckpt.pt"]
    for path, before in zip(paths, [*paths[1:], None]):
        try:
            return path, gpt.read_checkpoint(path)
        except ValueError as e:
            unread = getattr(e.__cause__, "errno", None) in (errno.EIO, errno.EACCES, errno.ESTALE)
            if (
                before is None or unread or isinstance(e.__cause__, MemoryError)
            ):  # not the file's fault
                raise
            kept = path.rename(f"{path}.damaged")
            print(
                f"{path} is damaged ({e.__cause__!r}): {before.name} is taken, it is now {kept.name}"
            )


def read_run(gpt, out, machine, new):
    """Return the state of the run to go on with, or None; new: what a run that begins has, by name.

    gpt: the module that asks, gpt.py imported or run, by its settings. Raises as newest_checkpoint does.
    """
    if gpt.init_from == "auto" and not machine.first(lambda: any(out.glob("ckpt*.pt"))):
        return None
    found = {}

    def find():  # in the first process, which alone sets damaged ones aside
        path, found["state"] = newest_checkpoint(gpt, out)
        return path

    path = machine.first(find)
    state = found.get("state") or gpt.read_checkpoint(path)
    for name, value in ({"optimizers": [], "scaler": {}, "config": {}} | new).items():
        if type(state.get(name)) is not type(value) or (name in new and not state[name] >= 0):
            raise ValueError(
                f"{path} does not hold a run to resume ({name}): best.pt, say, is for use only"
            )
    return state


def same_ids(a, b):
    """Return whether each id of two tokenizers means the same."""
    tokens = [getattr(t.encoding, "_mergeable_ranks", t.state["json"]) for t in (a, b)]
    return tokens[0] == tokens[1] and a.special == b.special


def check_tokenizer(data, tokenizer):
    if not same_ids(data.tokenizer, tokenizer):
        raise ValueError(
            f"{data.folder} has another tokenizer than the model: prepare it --tokenizer=MODEL"
        )


def check_settings(gpt, model, state):
    """Raise ValueError if settings that shape weights or averages are not as in the checkpoint's state."""
    now = {name: getattr(gpt, name) for name in ("block_size", "optimizer", "lora_rank")}
    now = asdict(model.config) | now
    then = state | state["model_args"] | {"block_size": state["config"].get("block_size")}
    names = now.keys() & then.keys() - {*FREE}
    if differ := sorted(name for name in names if now[name] != then[name]):
        found = "; ".join(
            f"{name} is {now[name]}, in the checkpoint {then[name]}" for name in differ
        )
        raise ValueError(
            f"{found}: go on with " + " ".join(f"--{name}={then[name]}" for name in differ)
        )


def trained_model(gpt, data, state, out):
    """Return the model to go on with: a checkpoint's, by its state, or, with none, that of init_from."""
    named = "" if gpt.init_from in ("scratch", "resume", "auto") else gpt.init_from
    base = state["base"] if state else named
    if base or gpt.lora_rank:
        from pretrained import start_finetuning

        changes = {name: getattr(gpt, name) for name in ("block_size", *FREE)}
        model, tokenizer = start_finetuning(
            base, state, out, gpt.lora_rank, gpt.optimizer, **changes
        )
    else:
        model, tokenizer = gpt.GPT(gpt.model_config(data.meta["vocab_size"])), None
    try:
        tokenizer = gpt.Tokenizer(**state["tokenizer"]) if state else tokenizer
        check_tokenizer(data, tokenizer)
        if state:
            check_settings(gpt, model, state)
            model.load_state_dict(
                state["model"], strict=not gpt.lora_rank
            )  # or else the adapters alone
    except (
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
    ) as e:  # as many as ways to be damaged
        raise ValueError(f"the checkpoint does not fit this model ({type(e).__name__}): {e}") from e
    return model


def go_on(optimizers, scaler, state, machine):
    """Give optimizers and scaler what a checkpoint's state holds of them, then empty it, as it takes memory.

    Rates and decay stay as they are set.
    """
    try:
        for o, saved in zip(optimizers, state["optimizers"], strict=True):
            params, averages = [p for group in o.param_groups for p in group["params"]], {}
            adamw = isinstance(o, torch.optim.AdamW)
            names = ["exp_avg", "exp_avg_sq", "step"] if adamw else ["momentum_buffer"]
            if len(saved["state"]) not in (0, len(params)):  # 0: before the first step
                raise ValueError(f"averages of {len(saved['state'])} parameters, not {len(params)}")
            for i, of in saved["state"].items():
                shapes = {k: () if k == "step" else params[i].shape for k in names}
                if {k: v.shape for k, v in of.items()} != shapes:
                    raise ValueError(f"averages of parameter {i} have other names or shapes")
                averages[i] = (
                    {k: shard(v, params[i]) for k, v in of.items()} if machine.sharded else of
                )
            o.load_state_dict({"state": averages, "param_groups": o.state_dict()["param_groups"]})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"the checkpoint's optimizers do not fit ({type(e).__name__}: {e})") from e
    scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    state.clear()
