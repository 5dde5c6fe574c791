# torchrun --standalone --nproc_per_node=8 gpt.py config/train_1b.py --dataset=NAME
# 1073.3M parameters with GPT-2's 50,257 tokens, for several large GPUs. Not run;
# estimate: 14 hours on eight H200s.
# Data first: python prepare.py --input=FOLDER --name=NAME --tokenizer=gpt2
dataset = "mytext"
tie_weights = True
block_size = 1024
n_layer = 22
n_head = 16
n_kv_head = 4
n_embd = 2048
gradient_checkpointing = True
batch_size = 8
gradient_accumulation_steps = 64  # 524,288 tokens per step
max_iters = 40_000
eval_interval = 1000
warmup_iters = 500
lr_schedule = "wsd"
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 1e-3
weight_decay = 0.1
