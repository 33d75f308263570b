"""Generated texts for in-context learning. Each text is one new random task, so only its own context can predict it.

The tasks are `markov` chains, associative `recall` with overwritten values, labelled `points`, `string_function`s and
`repeats`. Every generator takes a `numpy.random.Generator` and the number of items, and returns one string.
"""

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def markov_chain(rng: np.random.Generator, num_states: int, concentration: float = 0.5) -> np.ndarray:
    """A transition matrix (S, S) whose rows are drawn from a symmetric Dirichlet distribution."""
    return rng.dirichlet(np.full(num_states, concentration), size=num_states)


def markov_symbols(rng: np.random.Generator, transition: np.ndarray, length: int) -> np.ndarray:
    """A path of `length` symbols (integers) of one chain. The first symbol is uniform."""
    cumulative, draws = transition.cumsum(1), rng.random(length)
    symbols = np.empty(length, dtype=np.int64)
    symbols[0] = int(draws[0] * len(transition))
    for t in range(1, length):
        symbols[t] = min(int(np.searchsorted(cumulative[symbols[t - 1]], draws[t])), len(transition) - 1)
    return symbols


def symbols_to_text(symbols: np.ndarray, letters: str = LETTERS) -> str:
    """Write symbols as letters with a space before each, which makes one token per symbol in the embedded tokenizer."""
    return "".join(f" {letters[s]}" for s in symbols)


def markov(rng: np.random.Generator, length: int) -> str:
    """Symbols of a random Markov chain, usually with 8 states."""
    num_states = 8 if rng.random() < 0.7 else int(rng.integers(3, 13))
    letters = LETTERS if num_states == 8 and rng.random() < 0.7 else "".join(rng.permutation(list(LETTERS)))
    concentration = 0.5 if rng.random() < 0.7 else float(rng.uniform(0.1, 1.0))
    return symbols_to_text(markov_symbols(rng, markov_chain(rng, num_states, concentration), length), letters)


def recall(rng: np.random.Generator, length: int) -> str:
    """Pairs `k=v`. Half of the lines ask for a known key again (`k?v`), and keys may be overwritten."""
    keys = rng.permutation(list(LETTERS))[: int(rng.integers(4, 17))]
    memory: dict[str, str] = {}
    lines = []
    for _ in range(length):
        if memory and rng.random() < 0.5:
            key = str(rng.choice(sorted(memory)))
            lines.append(f"{key}?{memory[key]}")
        else:
            key = str(rng.choice(keys))
            memory[key] = str(rng.integers(0, 100))
            lines.append(f"{key}={memory[key]}")
    return "\n".join(lines)


def points(rng: np.random.Generator, length: int) -> str:
    """Integer points of the plane with a label that says on which side of a random line they lie: `37 82 B`."""
    normal, centre = rng.normal(size=2), rng.integers(30, 70, size=2)
    names = rng.permutation(list(LETTERS.upper()))[:2]
    xy = rng.integers(0, 100, size=(length, 2))
    return "\n".join(f"{x} {y} {names[int((np.array([x, y]) - centre) @ normal > 0)]}" for x, y in xy)


STRING_FUNCTIONS = {
    "reverse": lambda s: s[::-1],
    "first": lambda s: s[0],
    "last": lambda s: s[-1],
    "upper": str.upper,
    "double": lambda s: s + s,
    "sorted": lambda s: "".join(sorted(s)),
    "tail": lambda s: s[1:],
    "capital": str.capitalize,
    "swap": lambda s: s[-1] + s[1:-1] + s[0],
    "next": lambda s: "".join(chr((ord(c) - 96) % 26 + 97) for c in s),
}


def string_function(rng: np.random.Generator, length: int) -> str:
    """Random words and the result of one string function: `abc -> cba`."""
    function = STRING_FUNCTIONS[str(rng.choice(sorted(STRING_FUNCTIONS)))]
    words = ["".join(rng.choice(list(LETTERS), size=int(rng.integers(2, 6)))) for _ in range(length)]
    return "\n".join(f"{w} -> {function(w)}" for w in words)


def repeats(rng: np.random.Generator, length: int) -> str:
    """Phrases of random words that are repeated in random order, which an induction head can predict."""
    word = lambda: "".join(rng.choice(list(LETTERS), size=int(rng.integers(1, 8))))  # noqa: E731
    phrases = [" ".join(word() for _ in range(int(rng.integers(2, 9)))) for _ in range(int(rng.integers(2, 8)))]
    return "\n".join(phrases[i] for i in rng.integers(0, len(phrases), size=length))


GENERATORS = {
    "markov": markov,
    "recall": recall,
    "points": points,
    "string_function": string_function,
    "repeats": repeats,
}


def generate_task_text(rng: np.random.Generator, kind: str, length: int) -> str:
    """Draw a new task and write one text of it.

    Args:
        rng: source of all random draws.
        kind: kind of task, a key of `GENERATORS`.
        length: number of items in the text.
    """
    return GENERATORS[kind](rng, length)
