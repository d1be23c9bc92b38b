"""Recovery: a short training that gives a sparse model the dense model's distribution back."""
