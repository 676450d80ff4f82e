"""QuantSpec: what to do to one linear layer, and its short spelling.

    w4-g128            4-bit affine codes, asymmetric, groups of 128 inputs
    w4-g128-sym        the same, symmetric (no zero points)
    w4-g128-sym-twolevel  the scales of a row's groups are whole multiples, 1 to 16, of one step
    w4-g128-out        groups of 128 outputs inside one input channel (AdaDim's per-input-channel groups)
    w4                 one group a row
    w4-sym-2:4         two of every four inputs are zero and not stored
    w3-codebook        a table of 2**3 entries a row
    w4-codebook-shared one table for the matrix, a scale a row
    w8-codebook-nested3 readable at every width from 3 to 8 bits (Any-Precision)
    w4-codebook-int8   the table's entries are whole numbers from -127 to 127, times a scale a row
    w3-codebook+s0.45% the same, and 0.45 % of the entries kept sparse
    w4-sym+o256        256 whole input columns kept

Activations are quantized where the first part says so, per token, outlier columns excepted:

    w4a8               8-bit integers, asymmetric; -actsym symmetric; -actsim with the integer zero point of simulations
    w4a4-sym+o256      QUIK
    w4a4-codebook-actcodebook+k0.5%   KLLM: activations by a table, the 0.5 % largest and smallest of a token exact
    ...+t0.5%          the same by thresholds from calibration

A spec is parsed once, at the border; inside, everything is this dataclass.
"""

import dataclasses
import re
from typing import Literal

Grid = Literal["affine", "codebook"]
GroupAxis = Literal["in", "out"]
ActivationMode = Literal["kernel", "simulation"]

_GRAMMAR = (
    "wBITS[aBITS][-gSIZE][-sym][-twolevel][-out][-2:4][-codebook][-shared][-nestedBITS][-int8]"
    "[-actsym][-actsim][-actcodebook][+sPERCENT%][+oCOUNT][+kPERCENT%][+tPERCENT%], "
    "for example w4-g128, w3-codebook+s0.45% or w4a8"
)

TWO_LEVEL_BITS = 4  # the widest codes that a multiple of up to 16 leaves inside int8


@dataclasses.dataclass(frozen=True)
class ActivationSpec:
    """How the inputs of a layer are quantized, token by token, while it runs.

    bits: 2 to 8. grid: "affine" (integers) or "codebook" (one table, from calibration).
    symmetric, mode: of integers; see `jquant.format.activations`.
    exact: percent of a token's entries kept exactly at either end, chosen in each token, or, if `static`, by
    thresholds from calibration.
    """

    bits: int
    grid: Grid = "affine"
    symmetric: bool = False
    mode: ActivationMode = "kernel"
    exact: float = 0.0
    static: bool = False

    def __post_init__(self) -> None:
        _check_bits(self.bits, "activation bits")
        if not 0.0 <= self.exact < 50.0:
            raise ValueError(f"{self.exact} % of activations kept at either end; expected 0 <= percent < 50")
        if self.static and (not self.exact or self.grid != "codebook"):
            raise ValueError("static thresholds are for activations by a table; write -actcodebook+tPERCENT%")
        if self.grid == "codebook" and (self.symmetric or self.mode != "kernel"):
            raise ValueError("activations by a table have no integer range; leave out -actsym and -actsim")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one weight matrix [N, K] is stored, and how its inputs are quantized.

    bits: 2 to 8, of every code.
    grid: "affine" (scale and zero a group) or "codebook" (a table a row).
    group_size: entries that share a scale, counted along `group_axis`; None is the whole axis.
    group_axis: "in" groups inputs inside an output channel (the usual), "out" outputs inside an input channel.
    symmetric: no zero points, the grid is centred.
    two_level: scales of groups are whole multiples of one step a row, which kernels multiply with the codes, exactly.
    shared: one table for the matrix and a scale a row, instead of a table a row.
    semistructured: 2:4, two of every four inputs are zero.
    nested_from: the table's narrowest width, all from there to `bits` can be read; None is `bits` alone.
    int8_table: the entries of tables are snapped to int8, times a scale a row.
    sparse: percent of the entries kept exactly in a SparseResidual.
    outliers: number of input columns kept exactly in OutlierColumns.
    activation: None leaves the inputs as they are.
    """

    bits: int
    grid: Grid = "affine"
    group_size: int | None = None
    group_axis: GroupAxis = "in"
    symmetric: bool = False
    two_level: bool = False
    shared: bool = False
    semistructured: bool = False
    nested_from: int | None = None
    int8_table: bool = False
    sparse: float = 0.0
    outliers: int = 0
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        _check_bits(self.bits, "bits")
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
                ("two-level scales", self.two_level, False),
                ("2:4 pattern", self.semistructured, False),
            ):
                if given != wanted:
                    raise ValueError(f"a codebook has no {name}: its table spans a whole row; leave out {name}={given}")
            if self.nested_from is not None:
                _check_bits(self.nested_from, "the narrowest width of nested tables")
                if self.nested_from >= self.bits or self.shared or self.sparse:
                    raise ValueError(
                        f"tables nested from {self.nested_from} to {self.bits} bits need a table a row, a narrowest "
                        "width below the widest, and no sparse part (its values would fit one width only)"
                    )
                if self.int8_table:
                    raise ValueError("tables of several widths are not snapped to int8; leave out -nested or -int8")
        elif self.nested_from is not None:
            raise ValueError("only codebooks are nested; write w8-codebook-nested3")
        elif self.int8_table:
            raise ValueError("only the table of a codebook is snapped to int8; write w4-codebook-int8")
        elif self.shared:
            raise ValueError("only a codebook is shared by the rows of a matrix; write -codebook-shared")
        if self.two_level:
            for wrong, problem in (
                (self.bits > TWO_LEVEL_BITS, f"{self.bits} bits, whose multiples leave int8"),
                (not self.symmetric, "zero points"),
                (self.group_axis == "out", "groups of outputs"),
                (self.group_size is None, "one scale a row, which has no multiples"),
                (self.semistructured, "a 2:4 pattern"),
            ):
                if wrong:
                    raise ValueError(
                        f"two-level scales belong to symmetric grids of up to {TWO_LEVEL_BITS} bits in groups of "
                        f"inputs; this spec has {problem}: write w4-g128-sym-twolevel, or leave two-level scales out"
                    )
        if self.semistructured and (not self.symmetric or self.group_size is not None or self.group_axis == "out"):
            raise ValueError("a 2:4 pattern needs a symmetric grid with one scale a row; write w4-sym-2:4")

    def __str__(self) -> str:
        act = self.activation
        parts = [f"w{self.bits}" + ("" if act is None else f"a{act.bits}")]
        if self.grid == "codebook":
            parts.append("codebook")
        if self.group_size is not None:
            parts.append(f"g{self.group_size}")
        flags = [(self.symmetric, "sym"), (self.two_level, "twolevel"), (self.group_axis == "out", "out")]
        flags += [(self.semistructured, "2:4"), (self.shared, "shared")]
        flags += [(self.nested_from is not None, f"nested{self.nested_from}"), (self.int8_table, "int8")]
        if act is not None:
            flags += [(act.symmetric, "actsym"), (act.mode == "simulation", "actsim")]
            flags.append((act.grid == "codebook", "actcodebook"))
        text = "-".join(parts + [name for given, name in flags if given])
        if self.sparse:
            text += f"+s{self.sparse:g}%"
        if self.outliers:
            text += f"+o{self.outliers}"
        if act is not None and act.exact:
            text += f"+{'t' if act.static else 'k'}{act.exact:g}%"
        return text

    @classmethod
    def parse(cls, text: str) -> "QuantSpec":
        """Reads the short spelling; ValueError names the part that is wrong and what was expected."""
        base, *kept = text.strip().split("+")
        head, *parts = base.split("-")
        match = re.fullmatch(r"w(\d+)(?:a(\d+))?", head)
        if match is None:
            raise ValueError(f"spec {text!r} starts with {head!r}; expected {_GRAMMAR}")
        values: dict[str, object] = {"bits": int(match[1])}
        act: dict[str, object] = {} if match[2] is None else {"bits": int(match[2])}
        for part in parts:
            if size := re.fullmatch(r"g(\d+)", part):
                _put(values, "group_size", int(size[1]), text)
            elif size := re.fullmatch(r"nested(\d+)", part):
                _put(values, "nested_from", int(size[1]), text)
            elif part in _WEIGHT_PARTS:
                key, value = _WEIGHT_PARTS[part]
                _put(values, key, value, text)
            elif part in _ACTIVATION_PARTS:
                key, value = _ACTIVATION_PARTS[part]
                _put(act, key, value, text)
            else:
                raise ValueError(f"spec {text!r} has the unknown part {part!r}; expected {_GRAMMAR}")
        for part in kept:
            if match := re.fullmatch(r"([skt])(\d+(?:\.\d+)?)%", part):
                if match[1] == "s":
                    _put(values, "sparse", float(match[2]), text)
                else:
                    _put(act, "exact", float(match[2]), text)
                    act["static"] = match[1] == "t"
            elif match := re.fullmatch(r"o(\d+)", part):
                _put(values, "outliers", int(match[1]), text)
            else:
                raise ValueError(
                    f"spec {text!r} has the unknown part +{part}; expected +sPERCENT%, +oCOUNT, +kPERCENT%, +tPERCENT%"
                )
        if act and "bits" not in act:
            raise ValueError(f"spec {text!r} says how to quantize activations, but not to how many bits: write w4a8...")
        activation = ActivationSpec(**act) if act else None  # type: ignore[arg-type]
        return cls(**values, activation=activation)  # type: ignore[arg-type]


_WEIGHT_PARTS = {
    "codebook": ("grid", "codebook"),
    "sym": ("symmetric", True),
    "twolevel": ("two_level", True),
    "out": ("group_axis", "out"),
    "shared": ("shared", True),
    "int8": ("int8_table", True),
    "2:4": ("semistructured", True),
}
_ACTIVATION_PARTS = {
    "actsym": ("symmetric", True),
    "actsim": ("mode", "simulation"),
    "actcodebook": ("grid", "codebook"),
}


def _check_bits(bits: object, name: str) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{name} is {bits!r}; expected a whole number from 2 to 8")


def _put(values: dict[str, object], key: str, value: object, text: str) -> None:
    if key in values:
        raise ValueError(f"spec {text!r} gives {key} twice")
    values[key] = value
