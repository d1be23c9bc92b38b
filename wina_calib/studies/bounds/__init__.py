"""The paper's bounds, and what a model's errors are beside them."""
