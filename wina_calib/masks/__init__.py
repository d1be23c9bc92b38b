"""Which inputs are kept: the rule, and nothing of where it runs."""
