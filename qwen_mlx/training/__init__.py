"""Training of LoRA adapters beside a model whose own weights stay as they are, dense or packed."""
