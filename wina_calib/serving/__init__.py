"""Serving with vLLM: a plugin by which it loads calibrated checkpoints as they are. Importing this imports nothing of vLLM."""
