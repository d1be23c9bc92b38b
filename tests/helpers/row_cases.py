"""Steps of a server: requests, rows that hold their first tokens, and rows of requests of which several tokens are computed."""

# Each request: tokens that were there before, and tokens that are computed now.
CASES = {
    "prompts begin": ([(0, 3), (0, 1), (0, 2)], [0, 3, 4], [0, 1, 2, 4, 5]),
    "a prompt goes on": ([(4, 3), (0, 2)], [3], [0, 1, 2, 3, 4]),
    "a cached prefix": ([(16, 5)], [], [0, 1, 2, 3, 4]),
    "decoding": ([(7, 1), (1, 1)], [], []),
    "mixed": ([(9, 1), (0, 4), (3, 1), (0, 1)], [1, 6], [1, 2, 3, 4]),
    "a request without tokens": ([(5, 0), (0, 2)], [0], [0, 1]),
}
