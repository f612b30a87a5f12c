"""This machine: its device, its programs, and what ftkit brought to it."""
