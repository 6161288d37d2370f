"""A GGUF or a folder of safetensors becomes an MLX model folder."""
