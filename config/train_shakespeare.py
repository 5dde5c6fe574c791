# python gpt.py config/train_shakespeare.py
# 2 CPU cores (AMD EPYC; torch 2.13), validation loss: with AVX512-BF16 1.46 in 2 minutes, 1.40 in 5; held to
# AVX2 1.51 in 2.
# GPU (one H200, torch 2.11), means of 3 seeds: 1.40 after its 1,500 steps, 14 s; --max_iters=350: 1.46, 10 s.
# Tiny Shakespeare by characters, sized to the device and on a CPU to --max_minutes and to whether it has
# bfloat16: with more time a larger model, more dropout and decay against learning the text by heart, and a
# lower train_temperature against being sure of what it so learned. With --max_minutes=0 --max_iters=N the
# sizes are those for 2 minutes.
dataset = "shakespeare"
if device_type != "cpu":  # 3.1M parameters
    n_embd, n_head, n_kv_head, batch_size, eval_interval = 256, 4, 4, 32, 500
    if max_iters < 800:  # --max_iters=350: as soon as possible
        dropout, weight_decay, train_temperature = 0.03, 0.05, 0.9
        muon_lr, learning_rate = 0.04, 1e-2
    else:
        max_iters, learning_rate = 1500, 8e-3
        dropout, weight_decay, train_temperature = 0.2, 0.1, 0.83
else:
    max_minutes = max_minutes or 2.0
    _fast = native_bfloat16 and dtype != "float32"  # about 4 times as fast as float32
    _minutes = max_minutes if _fast else max_minutes / 4
    if _minutes < 0.5:  # 0.2M parameters and a shorter context
        n_layer, n_embd, block_size, batch_size = 2, 96, 64, 32
        eval_interval, eval_iters = 1000, 5
        # rates for few steps (measured: better at 140 to 2,500); the larger models want qk_norm
        muon_lr, learning_rate, muon_momentum, qk_norm, warmup_iters = 0.05, 0.03, 0.8, False, 5
    elif _minutes < 0.8:  # 0.5M parameters
        n_layer, block_size, batch_size, eval_interval = 3, 128, 16, 500
        muon_lr = 0.04
    elif _minutes < 8:  # 1.6M parameters
        n_embd, batch_size, learning_rate = 192, 16, 8e-3
        eval_interval, eval_iters = 500, 28  # all of validation
        muon_lr = 0.035 if _minutes < 2 else 0.03
        dropout = weight_decay = 0.0 if _minutes < 2 else 0.05 if _minutes < 4 else 0.1
        train_temperature = 0.87 if _minutes < 4 else 0.83
    else:  # 3.1M parameters
        n_embd, n_kv_head, batch_size, learning_rate = 256, 4, 32, 8e-3
        dropout = 0.15 if _minutes < 20 else 0.2
        weight_decay, train_temperature = 0.1, 0.83
