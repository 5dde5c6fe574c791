# python gpt.py config/finetune_rated.py
# This finetunes GPT-2 with LoRA on prompts and responses, weighted by ratings from 1 to 5. It was
# not run, because GPT-2's weights were not available. Prepare the data first:
#   python prepare.py --input=rated.csv --name=rated --tokenizer=gpt2
import hub

if init_from == "auto":
    raise ValueError("init_from is auto: begin without it, and resume with --init_from=resume")
if init_from == "scratch":
    init_from = str(hub.get("gpt2"))
dataset = "rated"
block_size = 256  # near the longest example's length, which prepare.py prints
lora_rank = 8
batch_size = 8
gradient_accumulation_steps = 4
optimizer = "adamw"
learning_rate = 1e-3
lr_schedule = "linear"
warmup_iters = 20
max_iters = 300
eval_interval = 50
eval_iters = 20
log_interval = 10
early_stop = 3
