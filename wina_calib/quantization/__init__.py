"""Quantized weights of mask groups: formats, quantizers, bits read. Pure functions on tensors."""
