"""Text that has nothing to do with anybody's task, on every machine: the topics of Python's own help, English with code between."""

from __future__ import annotations


def general_text(characters: int, *, after: int = 0) -> str:
    """So much of it, the same each time, after so many characters that another asked for."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[after : after + characters]
