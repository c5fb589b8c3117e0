"""The page of the matrix of servers: ``make serving-matrix`` writes it to docs/."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "results" / "serving-matrix.json"
HEAD = """# The matrix of servers

Each cell was served and judged by `make serving-matrix`, on the CPU, with tiny random models of
the families, and is compared with the unrotated checkpoint in the same server and numbers:

- **right**: in float32 the same greedy tokens, and log-probabilities within 2·10⁻⁵. In other
  numbers the mean distance of the log-probabilities from those without rounding is at most twice
  that of the unrotated checkpoint; the figure is that ratio. Where rotations act online, taking
  those of any one place away makes the distance more than three times the limit.
- **refused**: fastrot says why, at the start, or in `fastrot serve` with the first request.
- **not run**: the server does not do it with the unrotated checkpoint either, for the reason in
  the note; or the note says that the cell has not been served.

"vLLM, models of transformers" is `model_impl="transformers"`; `fastrot serve` is asked over HTTP,
one by one and in float32 also with continuous batching, and its log-probabilities are those of the
model that it has. W8A8 and W4A16 were quantized after rotating, in the format of
compressed-tensors, experts as well. fp8 KV is `kv_cache_dtype="fp8"` on a model in float32, so
nothing but the cache is rounded.

Made with {versions}.
"""
UNSERVED = {"status": "not run", "reason": "This cell has not been served yet."}
# What differs between cells of one kind: names of classes and layers, counts.
GENERAL = {
    r"this \w+For\w+": "this model",
    r"\blayers\.\d+": "layers.N",
    r"\b\d+ (?=of the online|such)": "N ",
    r", R\d on the [^;]+ first;": ";",
    r"^NotImplementedError: (?=transformers)": "",
    r"^(?=\w+Error: )": "The server's own ",
    r"(?<=^.{300}).+": "...",
}


def document(recorded: dict[str, Any]) -> str:
    """The page, of what is recorded."""
    servers, families, rotations, numbers = recorded["axes"]
    keys = ("/".join(names) for names in product(servers, families, rotations, numbers))
    cells = {key: recorded["cells"].get(key, UNSERVED) for key in keys}
    notes: list[str] = []
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    parts = [HEAD.format(versions=versions), _summary(cells)]
    for server in servers:
        rows = [f"## {server}", "", f"| family | rotations | {' | '.join(numbers)} |"]
        rows.append("|---|---" + "|---" * len(numbers) + "|")
        for family in families:
            for rotation in rotations:
                shown = (_shown(cells[f"{server}/{family}/{rotation}/{n}"], notes) for n in numbers)
                rows.append(f"| {family} | {rotation} | {' | '.join(shown)} |")
        parts.append("\n".join(rows) + "\n")
    parts.append("## Notes\n\n" + "".join(f"{n}. {note}\n" for n, note in enumerate(notes, 1)))
    return "\n".join(parts)


def _summary(cells: dict[str, Any]) -> str:
    states = [cell["status"] for cell in cells.values()]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states, key=_rank))
    )
    return f"{len(cells)} cells: {counts}.\n"


def _rank(state: str) -> int:
    return ["right", "refused", "not run", "unproven", "wrong"].index(state)


def _shown(cell: dict[str, Any], notes: list[str]) -> str:
    if "reason" in cell:
        reason = cell["reason"]
        for pattern, general in GENERAL.items():
            reason = re.sub(pattern, general, reason)
        reason = reason.replace("|", "/")
        if reason not in notes:
            notes.append(reason)
        return f"{cell['status']} ({notes.index(reason) + 1})"
    # A limit is 2e-5, or twice the distance of the unrotated checkpoint.
    exact = cell["limit"] == 2e-5
    return (
        cell["status"] if exact else f"{cell['status']}, {2 * cell['distance'] / cell['limit']:.2f}"
    )


if __name__ == "__main__":
    print(document(json.loads(RECORDED.read_text(encoding="utf-8"))), end="")
