# python gpt.py config/train_pydoc.py
# The text is the documentation that ships with Python, split into characters, so the run needs no
# network. On a CPU it takes 2 minutes, or --max_minutes, and gpt.py fits the model to that time.
# There is so little text that a larger model soon overfits. 2 CPU cores (AMD EPYC, AVX2; torch
# 2.13): validation loss 1.20 in 2 minutes. Not run on a GPU.
dataset = "pydoc"
if device_type == "cpu":
    max_minutes = max_minutes or 2.0
else:
    block_size = 256
    n_layer = 6
    n_head = 6
    n_kv_head = 6
    n_embd = 384
    dropout = 0.2
    batch_size = 64
    max_iters = 2000
    muon_lr = 0.02
    muon_momentum = 0.95
    learning_rate = 4e-3
    weight_decay = 0.05
    train_temperature = 0.87
