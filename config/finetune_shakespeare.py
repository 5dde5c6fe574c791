# python gpt.py config/finetune_shakespeare.py
# This finetunes all weights of GPT-2 on Shakespeare. It was not
# run, because GPT-2's weights were not available. Prepare the data first:
#   python prepare.py shakespeare --tokenizer=gpt2 --name=shakespeare_bpe
# For another model: python hub.py get FOLDER_OR_ID, which says how to continue.
from pathlib import Path

import hub

if init_from == "auto":
    raise ValueError("init_from is auto: begin without it, and resume with --init_from=resume")
if init_from == "scratch":
    init_from = str(hub.get("gpt2"))
dataset = "shakespeare_bpe"
out_dir = str(Path(__file__).resolve().parent.parent / "out" / "finetune_shakespeare")
block_size = 256 if device_type == "cpu" else 1024
dropout = 0.1
batch_size = 2
gradient_accumulation_steps = 16
optimizer = "adamw"
learning_rate = 5e-5
weight_decay = 0.1
lr_schedule = "linear"
warmup_iters = 10
max_iters = 200
eval_interval = 20
eval_iters = 40
log_interval = 1
early_stop = 3
