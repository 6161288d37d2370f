"""Adapters: the files of a fine-tune that change a base model, LoRA and DoRA of peft and mlx-lm, and GGUF's.

read.py opens one, by way of peft.py, mlx_lm.py and gguf.py, as a Change (change.py); apply.py changes a checkpoint.
"""
