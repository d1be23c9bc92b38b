"""Hostile budget files and options: whatever comes in, only our errors come out, and soon."""

import random

from budget_cases import small_cells, smooth_curves
from hostile import only_our_errors

from wina_calib.budgets import ModelKey, Setting, explicit, format_budget, parse_budget, select, solve_global
from wina_calib.errors import WinaError

CELLS = small_cells()
MODEL = ModelKey.of("llama", 256, CELLS)
CASES = 3000
PIECES = (
    "&a", "*a", "!!python/name:os.system", "{", "}", "[", "]", "[" * 50, "{a: " * 50, ": ", "- ", "\n", "\n  ", "---\n",
    "...", "? ", "|", ">", "%YAML 9.9\n", "%TAG ! x\n", "<<: ", "'", '"', "\\", "\\u0000", "\\ud800", "\x00", "\x7f",
    "\u2028", "\ud7ff", "\U0001f600", "1e999", "-1e-999", "nan", "NaN", "Infinity", ".inf", "0x10", "1_000", "9" * 5000,
    "null", "true", "~", "layers", "layers.*.*", "layers.0-5.mlp_in", "layers.9.x", "+0.1", "-0.9", "#", "\t", "\r",
    ",", "format", "sparsity", "cells", "1970-01-01", "=", "@", "`",
)  # fmt: skip


def mutated(text: str, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = start if rng.random() < 0.5 else min(len(text), start + rng.randint(1, 40))
        kind = rng.random()
        piece = rng.choice(PIECES) if kind < 0.7 else text[end : end + 60] if kind < 0.85 else ""
        text = text[:start] + piece + text[end:]
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def test_only_our_errors_come_out_of_files():
    rng = random.Random(7)
    budget = solve_global(CELLS, smooth_curves(), 0.5)
    content = explicit(budget, CELLS, MODEL, 0.5, "wina")
    texts = {kind: format_budget(content, kind) for kind in ("yaml", "json")}
    refused = 0
    for number in range(CASES):
        kind = "yaml" if number % 2 else "json"
        data = mutated(texts[kind], rng)

        def read(data: bytes = data, kind: str = kind) -> None:
            try:
                found = parse_budget(data, kind).budget(MODEL, CELLS).sparsities
                assert ((found >= 0) & (found < 1)).all()
            except WinaError as error:
                assert str(error).isprintable()
                assert len(str(error)) < 1000
                raise

        refused += only_our_errors(read)
    assert CASES * 0.5 < refused < CASES


def test_only_our_errors_come_out_of_options():
    rng = random.Random(8)
    for _ in range(CASES):
        parts = rng.choices(["layers", ".", "0", "-", "5", ",", "*", "attn_in", "mlp_", "=", "+", "0.1", *PIECES], k=6)
        text = "layers." * (rng.random() < 0.5) + "".join(parts)
        for call in (Setting.parse_option, lambda pattern: select(pattern, CELLS)):
            try:
                call(text)
            except WinaError as error:
                assert str(error).isprintable()


def test_large_hostile_files_end_soon():
    for kind, text in (
        ("yaml", "[" * 900_000),
        ("yaml", "a:\n " * 200_000),
        ("yaml", "? " * 400_000),
        ("yaml", "".join(f"k{i}: 1\n" for i in range(90_000))),
        ("yaml", "&a " * 300_000),
        ("json", '{"a":' * 190_000),
        ("json", "[" + "9," * 490_000 + "9]"),
        ("json", '"' + "\\" * 900_000),
    ):
        data = text.encode()
        only_our_errors(lambda data=data, kind=kind: parse_budget(data, kind))
