# torchrun --standalone --nproc_per_node=8 gpt.py config/train_gpt2.py config/gpt2_large.py
# 774.0M parameters with GPT-2's 50,257 tokens. Not run; estimate: 145 hours on eight H200s.
# This file is read after train_gpt2.py. Only the shape and the micro-batches differ.
n_layer = 36
n_head = 20
n_kv_head = 20
n_embd = 1280
batch_size = 4
gradient_accumulation_steps = 120
