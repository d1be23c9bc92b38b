"""What is changed in libraries while a calibrated model runs. Each says why, for which versions, and what is elsewhere.

| module | library | what it changes |
| --- | --- | --- |
| `late_stop` | transformers | `generate` looks at new tokens one step late on CUDA |
| `compile_guards` | torch, transformers | fewer checks before a compiled step |
| `continuous_batching` | transformers | `generate_batch` of a model whose attention it does not know by name |
| `triton_launch` | Triton, torch | starts a compiled kernel without Triton's own launcher |
"""
