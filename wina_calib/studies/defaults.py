"""What the studies do unless told otherwise. Nothing is imported here, so that their commands' help is told at once."""

BENCH_SPARSITIES = (0.5, 0.65)
BENCH_PROMPT = 64
BENCH_NEW = 32
BENCH_ROUNDS = 5

SYNTHETIC_WIDTH = 256
SYNTHETIC_DEPTH = 3
SYNTHETIC_SEEDS = 20
BOUNDS_TRANSFORMS = ("none", "stacked")
BOUNDS_TOKENS = 4096

COMPARE_METHODS = ("papers",)
COMPARE_SPARSITIES = (0.25, 0.4, 0.5, 0.65)

DIAGNOSE_PARTS = ("importance", "propagation", "extremes", "texts")
DIAGNOSE_TOKENS = 4096
DIAGNOSE_INPUTS = 4
DIAGNOSE_EXTREMES = (0.7, 0.8, 0.9)
DIAGNOSE_AMOUNTS = (1, 4, 16, 64, 256)

FLOPS_SPARSITIES = (0.25, 0.4, 0.5, 0.65)
FLOPS_CONTEXT = 4096

TRANSFER_SAMPLES = 8
