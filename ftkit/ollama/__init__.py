"""A shipped file becomes a model in Ollama."""
