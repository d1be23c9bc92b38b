"""A model folder as transformers sees it, before anything is sparse."""
