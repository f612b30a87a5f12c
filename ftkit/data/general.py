"""Text that has nothing to do with anybody's task, on every machine: the topics of Python's own help, English with code between."""

from __future__ import annotations


def general_text(characters: int) -> str:
    """So much of it, from the same place each time."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:characters]
