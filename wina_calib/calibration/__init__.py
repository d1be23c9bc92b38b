"""A dense model in, a checkpoint out."""
