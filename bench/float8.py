"""Train with float8 matrix products, by the library torchao, versus plain ones: speed and loss.

    pip install torchao
    python bench/float8.py --data=data/NAME [--shape=large] [--batch_size=16] [--steps=300]
        [--recipe=tensorwise] [--accumulate=8] [--runs=3]
    python bench/float8.py --data=data/NAME --small=1      (does it run? emulated, on a CPU, too)

Only the blocks' matrices are in float8; embedding and output head stay as they are. Both runs take
the same batches with the learning rates of gpt.py. The figures are tokens per second without the
first tenth of the steps, the peak of the memory, and the loss over --batches validation batches.
The two take turns, --runs times, with another seed each time. It needs a GPU of compute capability
8.9 or higher.
"""

import gc
import time

import torch
from common import best_device, flags, ratios, record, show, wait_for
from train_speed import SHAPES

import gpt

DEFAULTS = {
    "data": "",
    "shape": "large",
    "batch_size": 16,
    "accumulate": 8,
    "steps": 300,
    "batches": 40,
    "runs": 3,
    "recipe": "tensorwise",
    "small": 0,
}
SMALL = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "block_size": 64}


def to_float8(model, recipe, emulate):
    """Let the linear layers of the blocks multiply in float8, where their sizes allow it."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if emulate:  # the same rounding, by slow operations
        config = Float8LinearConfig(emulate=True)
    else:
        config = Float8LinearConfig.from_recipe_name(recipe)

    def suits(module, name):
        return module.in_features % 16 == 0 and module.out_features % 16 == 0

    for block in model.h:
        convert_to_float8_training(block, config=config, module_filter_fn=suits)


def new_trainer(f, data, float8, seed):
    """Return a Trainer of the shape that the flags f name, compiled on a GPU."""
    device = best_device()
    sizes, more = SHAPES[f["shape"]]
    sizes = SMALL if f["small"] else {**sizes, **more}
    settings = gpt.checked_settings(
        **{name: value for name, value in sizes.items() if name != "vocab_size"},
        batch_size=f["batch_size"],
        gradient_accumulation_steps=f["accumulate"],
        max_iters=f["steps"],
        seed=seed,
        compile=device.type == "cuda",
        device=device.type,
    )
    machine = gpt.set_up_machine(settings)
    torch.manual_seed(settings.seed)
    model = gpt.GPT(gpt.model_config(settings, data.meta["vocab_size"]))
    if float8:
        to_float8(model, f["recipe"], emulate=device.type == "cpu")
    trainer = gpt.Trainer(settings, model, data, machine)
    trainer.get_ready()
    return trainer


def figures_of(trainer, n_batches):
    """Take all steps; return (tokens per second, peak memory in MiB or None, validation loss)."""
    settings = trainer.settings
    rows_per_step = settings.batch_size * settings.gradient_accumulation_steps
    n_warm = max(1, settings.max_iters // 10)
    for step in range(settings.max_iters):
        if step == n_warm:
            wait_for(trainer.machine.device)
            began = time.perf_counter()
        scale = gpt.lr_scale(step, step / settings.max_iters, settings)
        gpt.set_learning_rates(trainer.optimizers, scale)
        trainer.gradients(step * rows_per_step)
        trainer.update()
    wait_for(trainer.machine.device)
    seconds = time.perf_counter() - began
    tokens = (settings.max_iters - n_warm) * rows_per_step * settings.block_size
    memory = None
    if torch.cuda.is_available():
        memory = round(torch.cuda.max_memory_allocated() / 2**20)
    loss = gpt.evaluate(
        trainer.eval_model, trainer.data, trainer.machine, n_batches, settings.batch_size
    )
    return round(tokens / seconds), memory, round(loss, 4)


def free_memory():
    """Free the memory of a Trainer that nothing refers to, and count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main():
    f = flags(**DEFAULTS)
    if f["small"]:
        f |= {"batch_size": 4, "accumulate": 1, "steps": 20, "batches": 4, "runs": 1}
    block_size = (SMALL if f["small"] else SHAPES[f["shape"]][0])["block_size"]
    found = {"plain": [], "float8": []}
    for run in range(f["runs"]):
        data = gpt.Data(gpt.as_path(f["data"]), block_size, seed=1337 + run)
        for name, figures in found.items():
            free_memory()
            trainer = new_trainer(f, data, name == "float8", 1337 + run)
            figures.append(figures_of(trainer, f["batches"]))
            del trainer
            print(f"run {run + 1}: {name} {figures[-1]}", flush=True)
    result = {key: f[key] for key in ("shape", "recipe", "steps", "batch_size", "accumulate")}
    result["tokens_per_s"] = {name: [speed for speed, _, _ in runs] for name, runs in found.items()}
    result["mib"] = {name: runs[-1][1] for name, runs in found.items()}
    result["val_loss"] = {name: [loss for _, _, loss in runs] for name, runs in found.items()}
    result["ratio"] = ratios(*(result["tokens_per_s"][name] for name in ("float8", "plain")))
    if f["small"]:
        show("float8", **result)
    else:
        record("float8", **result)


if __name__ == "__main__":
    main()
