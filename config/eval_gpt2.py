# python gpt.py config/eval_gpt2.py
# Not yet measured. GPT-2's loss on the validation split of wikitext-2 in overlapping windows. Data first:
#   python prepare.py wikitext-2 --tokenizer=gpt2
# On any text: --eval_text=FILE. Another model: --init_from=FOLDER_OR_ID, with its own tokenizer's data.
init_from = "gpt2"
eval_only = True
dataset = "wikitext-2"
block_size = 1024
eval_stride = 512
batch_size = 4
