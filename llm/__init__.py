"""The core: a GPT, its tokenizer, training, finetuning and decoding in plain PyTorch."""
