# python gpt.py config/finetune_chat.py
# This finetunes a small open model with LoRA on conversations, a .jsonl file of messages. It is
# meant for a GPU and was not run to the end. Prepare the data first:
#   python prepare.py --input=chat.jsonl --name=chat --tokenizer=HuggingFaceTB/SmolLM2-135M
# Then: python sample.py --chat --out_dir=out/chat
import hub

if init_from == "auto":
    raise ValueError("init_from is auto: begin without it, and resume with --init_from=resume")
if init_from == "scratch":
    init_from = str(hub.get("HuggingFaceTB/SmolLM2-135M"))
dataset = "chat"
block_size = 512
lora_rank = 8
batch_size = 4
gradient_accumulation_steps = 4
optimizer = "adamw"
learning_rate = 1e-3
lr_schedule = "linear"
warmup_iters = 20
max_iters = 500
eval_interval = 50
eval_iters = 20
log_interval = 10
early_stop = 3
