"""What answers: transformers, llama.cpp in this process, an Ollama server."""
