"""Loading a calibrated checkpoint and decoding with it."""
