"""A decode step in fewer calls: attention, blocks, norms and lm_head."""
