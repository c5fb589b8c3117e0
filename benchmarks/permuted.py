"""What the order of channels gains where R4 has blocks (PeRQ): SmolLM2-135M, two domains.

    python benchmarks/permuted.py --json benchmarks/results/FILE

The texts are those of `learned.py`. Orders come from the text to learn from, as
`fastrot.learn(permute=True)` finds them, without its gate; they and the rotations (Hadamard R1-R4)
are deterministic, so there are no seeds. Reported is the share of the loss that quantization adds
with R4 in blocks and that the orders take away, with the standard error of the paired differences.
The file grows with every cell; one that it has is not made again.
"""

import argparse
import copy
import json
from typing import Any

from learned import DOMAINS, ROTATIONS, losses_of, parser_of, prepared, started, taken_away

import fastrot
from fastrot.learning.balance import orders_of

CELLS = ("mxfp4:32", "nvfp4:16", "a4kv4:32")


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Fill in the cells that are not there yet."""
    base, windows = prepared(args)
    found["tokens"] = {name: windows[name][:, 1:].numel() for name in ("learn", *DOMAINS)}
    wanted = [cell for cell in args.cells if cell not in found["cells"]]
    exact = losses_of(base, None, None, windows) if wanted else {}
    for name in wanted:
        scheme, block = name.split(":")
        recipe = fastrot.Recipe(ROTATIONS, block_size={"R4": int(block)})
        before = losses_of(base, recipe, scheme, windows)
        rotated = copy.deepcopy(base)
        orders = orders_of(rotated, fastrot.apply(rotated, recipe).plan, windows["learn"])
        ordered = fastrot.Recipe(
            ROTATIONS, block_size=recipe.block_size, permutations={"R4": orders}
        )
        after = losses_of(base, ordered, scheme, windows)
        cell: dict[str, Any] = {
            domain: {
                "float": exact[domain].mean,
                "blocks": before[domain].mean,
                "ordered": after[domain].mean,
                **taken_away(exact[domain], before[domain], after[domain]),
            }
            for domain in DOMAINS
        }
        for domain, figures in cell.items():
            shown = f"{figures['closed']:6.1%} ± {figures['error']:.1%}"
            print(f"{name:<10} {domain:<12} {shown}", flush=True)
        found["cells"][name] = cell
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Print shares; write all figures."""
    parser = parser_of(__doc__)
    parser.add_argument("--cells", nargs="+", default=CELLS, help="SCHEME:BLOCK OF R4")
    args = parser.parse_args()
    measure(args, started(args.json, "permuted"))


if __name__ == "__main__":
    main()
