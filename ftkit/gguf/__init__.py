"""GGUF files: made, read back, and how large each type will be."""
