"""Rows measured anew into bench/results/matmul.json: `python -m bench.merge FILE ...`, results of `bench.matmul --out`.

A row of the same kind, shape and number of tokens takes the place of the old one, others are added. Every row keeps the
dense product of its own process beside it, and from here on the commit that it was measured at, if that is not the
commit of the whole result.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.matmul import BASELINES, OPS, SHAPES
from bench.record import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    target = RESULTS / "matmul.json"
    result = json.loads(target.read_text())
    for file in options.files:
        result = merged(result, json.loads(file.read_text()))
    target.write_text(json.dumps(result, indent=1) + "\n")


def merged(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`result` with the rows of `other`, in the order in which `bench.matmul` measures. ValueError if these are of
    another kind of device."""
    theirs, ours = other["environment"], result["environment"]
    if theirs["device"] != ours["device"]:
        raise ValueError(f"rows are from {theirs['device']}, the result from {ours['device']}; expected one kind")
    apart = {} if theirs["commit"] == ours["commit"] else {"commit": theirs["commit"]}
    rows = {(row["shape"], row["op"], row["m"]): row for row in result["rows"]}
    rows |= {(row["shape"], row["op"], row["m"]): row | apart for row in other["rows"]}
    shapes, ops = list(SHAPES), [op.label for op in (*OPS, *(op for op, _ in BASELINES))]
    order = sorted(rows, key=lambda key: (shapes.index(key[0]), ops.index(key[1]), key[2]))
    return result | {"rows": [rows[key] for key in order]}


if __name__ == "__main__":
    main()
