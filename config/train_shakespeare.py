# python gpt.py config/train_shakespeare.py
# On a GPU (one H200, torch 2.11, before version 2.0.0) the validation loss is 1.40 after 1,500 steps
# (14 s) and 1.46 after 350 (--max_iters=350, 10 s). These are means over 3 seeds.
# The text is tiny Shakespeare, split into characters. On a CPU the run takes 2 minutes, or
# --max_minutes, and gpt.py fits the model to that time. The fit was not measured for very
# short runs, so their settings are given here.
dataset = "shakespeare"
if device_type != "cpu":  # 3.1M parameters
    block_size = 256
    n_layer = 4
    n_embd = 256
    n_head = 4
    n_kv_head = 4
    batch_size = 32
    eval_interval = 500
    if max_iters < 800:  # such as --max_iters=350, for a quick result
        dropout = 0.03
        weight_decay = 0.05
        train_temperature = 0.9
        muon_lr = 0.04
        learning_rate = 1e-2
    else:
        max_iters = 1500
        learning_rate = 8e-3
        dropout = 0.2
        weight_decay = 0.1
        train_temperature = 0.83
else:
    max_minutes = max_minutes or 2.0
    _fast = native_bfloat16 and dtype != "float32"  # about 4 times as fast as float32
    if max_minutes < (0.5 if _fast else 2.0):  # 0.2M parameters and a shorter context
        n_layer = 2
        n_embd = 96
        n_head = 4
        n_kv_head = 1
        block_size = 64
        batch_size = 32
        eval_interval = 1000
        eval_iters = 5
        dropout = weight_decay = max_epochs = 0.0
        train_temperature = 1.0
        # These learning rates are for few steps (measured: better at 140 to 2,500). The
        # larger models need qk_norm.
        muon_lr = 0.05
        learning_rate = 0.03
        muon_momentum = 0.8
        qk_norm = False
        warmup_iters = 5
    else:
        eval_interval = 500
