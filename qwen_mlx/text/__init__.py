"""Text: the tokenizer, the chat template, and files that people ask for."""
