"""ftkit: from a base model, your data and this GPU to `ollama run mymodel`."""

__version__ = "0.1.0"
