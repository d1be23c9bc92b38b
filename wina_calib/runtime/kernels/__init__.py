"""Products of kept columns, and how each is chosen."""
