# python gpt.py config/train_pydoc.py
# 2 CPU cores (AMD EPYC; torch 2.13), validation loss after its 2 minutes: 1.12 with AVX512-BF16, 1.11 held to
# AVX2 (two seeds, one). GPU: not measured yet.
# The documentation that ships with Python, by characters: works without a network. There is so little of it
# that a model soon knows it by heart: hence dropout, weight_decay and train_temperature.
dataset = "pydoc"
if device_type == "cpu":
    max_minutes = 2.0
    dropout, weight_decay, train_temperature = 0.05, 0.05, 0.87
    if native_bfloat16 and dtype != "float32":
        n_embd, batch_size, learning_rate = 192, 16, 8e-3
    else:  # 4 times slower: a smaller model, a shorter context
        n_layer, block_size, batch_size = 3, 128, 16
        muon_lr = 0.04
else:
    n_layer, n_head, n_kv_head, n_embd = 6, 6, 6, 384
    dropout = 0.2
    batch_size = 64
    max_iters = 2000
    muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 4e-3
