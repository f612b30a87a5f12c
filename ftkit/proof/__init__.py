"""Whether two forms of one model are the same."""
