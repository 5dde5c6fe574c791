# python prepare.py stdlib && python gpt.py config/train_stdlib.py
# The sources of Python's standard library with a BPE vocabulary of 8,192 trained on them: needs no network.
dataset = "stdlib"
tie_weights = True
if device_type == "cpu":
    n_layer, n_embd = 6, 192
    max_minutes = 10.0
else:
    n_layer, n_head, n_kv_head, n_embd = 8, 8, 4, 512
    dropout = 0.1
    batch_size = 64
    max_iters = 3000
    muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 4e-3
