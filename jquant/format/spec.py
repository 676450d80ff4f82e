"""QuantSpec: what to do to one linear layer, and its short spelling.

    w4-g128            4-bit affine codes, asymmetric, groups of 128 inputs
    w4-g128-sym        the same, symmetric (no zero points)
    w4-g128-out        groups of 128 outputs inside one input channel (AdaDim's per-input-channel groups)
    w4                 one group a row
    w3-codebook        a table of 2**3 entries a row
    w3-codebook+s0.45% the same, and 0.45 % of the entries kept sparse
    w4-sym+o256        256 whole input columns kept

A spec is parsed once, at the border; inside, everything is this dataclass.
"""

import dataclasses
import re
from typing import Literal

Grid = Literal["affine", "codebook"]
GroupAxis = Literal["in", "out"]

_GRAMMAR = "wBITS[-gSIZE][-sym][-out][-codebook][+sPERCENT%][+oCOUNT], for example w4-g128 or w3-codebook+s0.45%"


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one weight matrix [N, K] is stored.

    bits: 2 to 8, of every code.
    grid: "affine" (scale and zero a group) or "codebook" (a table a row).
    group_size: entries that share a scale, counted along `group_axis`; None is the whole axis.
    group_axis: "in" groups inputs inside an output channel (the usual), "out" outputs inside an input channel.
    symmetric: no zero points, the grid is centred.
    sparse: percent of the entries kept exactly in a SparseResidual.
    outliers: number of input columns kept exactly in OutlierColumns.
    """

    bits: int
    grid: Grid = "affine"
    group_size: int | None = None
    group_axis: GroupAxis = "in"
    symmetric: bool = False
    sparse: float = 0.0
    outliers: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}; expected a whole number from 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group size is {self.group_size}; expected at least 1, or none for one group a row")
        if not 0.0 <= self.sparse < 100.0:
            raise ValueError(f"sparse is {self.sparse} %; expected 0 <= percent < 100")
        if self.outliers < 0:
            raise ValueError(f"outliers is {self.outliers}; expected the number of input columns to keep, 0 or more")
        if self.grid == "codebook":
            for name, given, wanted in (
                ("group size", self.group_size, None),
                ("group axis", self.group_axis, "in"),
                ("symmetric", self.symmetric, False),
            ):
                if given != wanted:
                    raise ValueError(f"a codebook has no {name}: its table spans a whole row; leave out {name}={given}")

    def __str__(self) -> str:
        parts = [f"w{self.bits}"]
        if self.grid == "codebook":
            parts.append("codebook")
        if self.group_size is not None:
            parts.append(f"g{self.group_size}")
        if self.symmetric:
            parts.append("sym")
        if self.group_axis == "out":
            parts.append("out")
        text = "-".join(parts)
        if self.sparse:
            text += f"+s{self.sparse:g}%"
        if self.outliers:
            text += f"+o{self.outliers}"
        return text

    @classmethod
    def parse(cls, text: str) -> "QuantSpec":
        """Reads the short spelling; ValueError names the part that is wrong and what was expected."""
        base, *kept = text.strip().split("+")
        head, *parts = base.split("-")
        match = re.fullmatch(r"w(\d+)", head)
        if match is None:
            raise ValueError(f"spec {text!r} starts with {head!r}; expected {_GRAMMAR}")
        values: dict[str, object] = {"bits": int(match[1])}
        for part in parts:
            if match := re.fullmatch(r"g(\d+)", part):
                key, value = "group_size", int(match[1])
            elif part in ("codebook", "sym", "out"):
                key, value = {
                    "codebook": ("grid", "codebook"),
                    "sym": ("symmetric", True),
                    "out": ("group_axis", "out"),
                }[part]
            else:
                raise ValueError(f"spec {text!r} has the unknown part {part!r}; expected {_GRAMMAR}")
            _put(values, key, value, text)
        for part in kept:
            if match := re.fullmatch(r"s(\d+(?:\.\d+)?)%", part):
                _put(values, "sparse", float(match[1]), text)
            elif match := re.fullmatch(r"o(\d+)", part):
                _put(values, "outliers", int(match[1]), text)
            else:
                raise ValueError(f"spec {text!r} has the unknown part +{part}; expected +sPERCENT% or +oCOUNT")
        return cls(**values)  # type: ignore[arg-type]


def _put(values: dict[str, object], key: str, value: object, text: str) -> None:
    if key in values:
        raise ValueError(f"spec {text!r} gives {key} twice")
    values[key] = value
