"""From a name to a model and its tokenizer."""
