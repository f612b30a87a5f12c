"""From a model reference to its files on this machine."""
