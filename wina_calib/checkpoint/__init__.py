"""A calibrated folder: what is in it, read, written, described, pushed."""
