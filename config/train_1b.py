# torchrun --standalone --nproc_per_node=8 gpt.py config/train_1b.py --dataset=NAME
# 1073.3M parameters with GPT-2's 50,257 tokens. Loss and time: not measured yet; for several large GPUs.
# Data first: python prepare.py --input=FOLDER --name=NAME --tokenizer=gpt2
dataset = "mytext"
tie_weights = True
block_size = 1024
n_layer, n_head, n_kv_head, n_embd = 22, 16, 4, 2048
gradient_checkpointing = True
batch_size = 8
gradient_accumulation_steps = 64  # 524,288 tokens per step
max_iters, eval_interval, warmup_iters = 40_000, 1000, 500
lr_schedule = "wsd"
muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 1e-3
weight_decay = 0.1
