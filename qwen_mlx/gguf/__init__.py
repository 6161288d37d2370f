"""GGUF files: the container (reader), the block formats (blocks) and the tensor names (names)."""
