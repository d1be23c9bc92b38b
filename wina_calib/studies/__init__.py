"""Measurements of models and checkpoints; nothing below needs them."""
