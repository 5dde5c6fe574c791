# python gpt.py config/train_shakespeare.py
# 2 CPU cores (AMD EPYC, AVX512-BF16; torch 2.13): validation loss 1.49 in 2 minutes. GPU: not measured yet.
# Tiny Shakespeare by characters, sized to the device. prepare.py shakespeare --input=FILE takes a local copy.
dataset = "shakespeare"
if device_type == "cpu":  # 0.75M parameters, gpt.py's default sizes
    max_minutes = 2.0
else:  # 10.6M parameters
    n_layer, n_head, n_kv_head, n_embd = 6, 6, 6, 384
    dropout = 0.2
    batch_size = 64
    max_iters = 3000
    muon_lr, learning_rate = 0.02, 4e-3
