"""Which batch fits, what would make it fit, and what every step costs."""
