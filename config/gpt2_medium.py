# torchrun --standalone --nproc_per_node=8 gpt.py config/train_gpt2.py config/gpt2_medium.py
# 354.8M parameters with GPT-2's 50,257 tokens. Not run; estimate: 68 hours on eight H200s.
# This file is read after train_gpt2.py. Only the shape and the micro-batches differ.
n_layer = 24
n_head = 16
n_kv_head = 16
n_embd = 1024
batch_size = 4
gradient_accumulation_steps = 120
