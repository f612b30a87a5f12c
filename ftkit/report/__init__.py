"""A plan as words, picture and page."""
