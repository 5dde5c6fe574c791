# python gpt.py config/finetune_shakespeare.py
# Not yet measured here. GPT-2, all its weights, on Shakespeare. Data first:
#   python prepare.py shakespeare --tokenizer=gpt2 --name=shakespeare_bpe
# Another model: --init_from=FOLDER_OR_ID, and in prepare.py --tokenizer=FOLDER_OR_ID.
init_from = "gpt2"
dataset = "shakespeare_bpe"
out_dir = "out/finetune_shakespeare"
block_size = 256 if device_type == "cpu" else 1024
dropout = 0.1
batch_size = 2
gradient_accumulation_steps = 16
optimizer = "adamw"
learning_rate = 5e-5
weight_decay = 0.1
lr_schedule = "linear"
warmup_iters = 10
max_iters = 200
eval_interval, eval_iters, log_interval = 20, 40, 1
early_stop = 3
