"""The line: what a job is, its steps, and how they are made in order."""
