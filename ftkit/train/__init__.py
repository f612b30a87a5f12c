"""Supervised fine-tuning: watched, resumable, its best checkpoint kept."""
