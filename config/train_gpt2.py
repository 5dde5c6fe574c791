# torchrun --standalone --nproc_per_node=8 gpt.py config/train_gpt2.py
# Not run; estimate: 22 hours on eight H200s. nanoGPT's README reports a loss of about 2.85 for this
# recipe, after 4 days on 8 A100 40GB GPUs.
# This has GPT-2's shape, 124M parameters, and nanoGPT's recipe. Prepare the data first, as much
# text as you have:
#   python prepare.py --input=FOLDER --name=mytext --tokenizer=gpt2
dataset = "mytext"
tie_weights = True
block_size = 1024
n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
bias = True
use_rope = use_rms_norm = use_swiglu = qk_norm = False
batch_size = 12
gradient_accumulation_steps = 40  # 491,520 tokens per step over all GPUs
optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
lr_schedule = "cosine"
warmup_iters = 2000
max_iters = 600_000
eval_interval = 1000
eval_iters = 200
log_interval = 10
