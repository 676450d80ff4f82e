"""How the affine product is cut into blocks, which cuts fit the machine, and which one a shape gets.

A CTA computes [64 * row_warpgroups] outputs times [block_m] tokens. It streams block_k inputs a stage; row_warpgroups
* k_warpgroups warpgroups compute, each on 64 outputs and block_k / k_warpgroups of the inputs; one more copies.
Of the last blocks `cluster` CTAs, which run at the same time, share the inputs, so that no CTA idles. Or all CTAs do,
by stream-K, through memory. Or `splits` CTAs share those of every block, and another kernel adds their sums.
"""

import dataclasses
from typing import Literal

from pallas_kernels.kept_columns import DTYPES

MULTIPROCESSORS = 132  # of an H100 or H200
SHARED_MEMORY = 227 * 1024
_BARRIERS = 1280  # bytes for these, and to align what is swizzled
_REGISTERS = 65536  # of a multiprocessor
_OTHER_REGISTERS = 72  # words, fragments of two tiles, addresses
_FEWEST_REGISTERS = 38  # with which blocks of 192 tokens do, and nothing spills
MOST_WARPGROUPS = 5
STORED_TOKENS = 16  # of a tile in which outputs leave: four matrices a warp
_ALIGNMENT = 1024  # of what lies in shared memory
LARGEST_OWN_TOKEN = 32768  # inputs: a thread of 128 keeps as many registers as it can
BEHIND_TOKEN = 128  # bytes, which the tensor core reads, for columns that are none
AHEAD = 2  # tiles whose words are read before they are decoded
IN_FLIGHT = 2  # tiles that are decoded before the products before are waited for
SEGMENT = 512  # inputs of a warpgroup after which running sums start anew

MOST_MULTIPLES = 16  # of a step that a scale can be: times the largest of 16 codes, 8 below the middle, it is an int8
SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}

ScaleWhere = Literal["sum", "operand"]


@dataclasses.dataclass(frozen=True)
class Config:
    """scale: where the scale of a group is multiplied beside 16-bit tokens. "sum": its sums are scaled, exact weights;
    "operand": the weight is scaled in 16 bits, which rounds it unless the scale is a whole multiple of a step, and
    costs fewer registers. Scales and steps of whole rows are multiplied at the end in either case. kept_places: tiles
    of 64 kept columns, if there are any, that shared memory holds beside the stages."""

    block_m: int
    block_k: int
    row_warpgroups: int
    k_warpgroups: int = 1
    splits: int = 1
    stages: int = 4
    scale: ScaleWhere = "sum"
    blocks: int = MULTIPROCESSORS
    cluster: int = 1
    stream_k: bool = False
    kept_places: int = 2

    @property
    def warpgroups(self) -> int:
        return self.row_warpgroups * self.k_warpgroups

    @property
    def rows(self) -> int:
        """Outputs of a CTA."""
        return 64 * self.row_warpgroups

    def launch_registers(self) -> int:
        """Registers a thread that the kernel is launched with: an equal share, in the units the hardware deals in."""
        return min(_REGISTERS // 128 // (self.warpgroups + 1) // 8 * 8, 255)

    def registers(self) -> tuple[int, int]:
        """Registers a thread after the warpgroup that copies has given most of its own to those that compute.

        They can only share what the kernel was launched with: asking for more waits for ever.
        """
        if self.warpgroups == 1:
            return 255, 255
        copying = {2: 40, 3: 32, 4: 24}.get(self.warpgroups, 24)
        pool = self.launch_registers() * (self.warpgroups + 1)
        return copying, min((pool - copying) // self.warpgroups // 8 * 8, 240)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one product. x_dtype "bfloat16", "float16" or "int8"; group_size None: whole rows; entry_words:
    words of sparse entries a block of 64 x 128 weights, 0 if there are none; pieces: rows of x that are the only token
    in parts, whose scaled products are added, or 1: every row is a token; planes: 8-bit operands of a weight, each with
    sums of its own, of which the second stand for 256 times as much; kept_columns: inputs apart from those, multiplied
    by weights of kept_dtype, 16 bits, as they are; token_dtype: the type of the only token, of which the kernel itself
    makes x (`pallas_kernels.affine_matmul.own_token`), "" if x comes as it is multiplied; token_bits: of its codes, if
    it is not in pieces. scale_dtype "uint8": scales of groups are whole multiples of a step a row."""

    tokens: int
    outputs: int
    inputs: int
    bits: int
    group_size: int | None
    has_zeros: bool
    x_dtype: str
    scale_dtype: str
    entry_words: int = 0
    pieces: int = 1
    planes: int = 1
    kept_columns: int = 0
    kept_dtype: str = "bfloat16"
    token_dtype: str = ""
    token_bits: int = 8

    @property
    def x_bytes(self) -> int:
        return 1 if self.x_dtype == "int8" else 2

    @property
    def x_columns(self) -> int:
        """Inputs in the 128 bytes of a swizzled row of x."""
        return 128 // self.x_bytes

    @property
    def two_level(self) -> bool:
        """Whether the scales of groups are whole multiples of a step a row."""
        return self.scale_dtype == "uint8"

    @property
    def multiplies_entries(self) -> bool:
        """Whether sparse entries are multiplied by the inputs of the only token, and not added to weights."""
        return self.entry_words > 0 and self.tokens == 1

    @property
    def kept_tiles(self) -> int:
        """Products of 64 kept columns each."""
        return -(-self.kept_columns // 64)


def registers_of_sums(problem: Problem, config: Config) -> int:
    """Registers of a thread that hold the sums of a block."""
    return config.block_m // 2 * problem.planes


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA, without its barriers."""
    words = config.rows * config.block_k * problem.bits // 8
    stage, token = words, 0
    if problem.token_dtype:
        token = -(-token_bytes(problem, config) // _ALIGNMENT) * _ALIGNMENT
    else:
        stage += config.block_m * config.block_k * problem.x_bytes
    if problem.group_size is not None:
        scale = SCALE_BYTES[problem.scale_dtype]
        stage += _groups(problem, config) * config.rows * (scale + problem.has_zeros)
    stage += config.row_warpgroups * (config.block_k // 128) * problem.entry_words * 4
    others = config.k_warpgroups - 1 + config.cluster - 1  # whose sums are handed over
    kept = kept_places(problem, config) * (config.rows + config.block_m) * 128
    tiles = 2 * STORED_TOKENS * config.rows * 2 if writes_tiles(problem, config) else 0  # two places, of 16 bits
    return config.stages * stage + others * config.rows * config.block_m * problem.planes * 4 + kept + tiles + token


def token_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of the codes of a token that the kernel makes itself, for all stages, and of what goes with it."""
    steps = config.splits * -(-problem.inputs // (config.block_k * config.splits))
    return steps * config.block_k * problem.pieces + BEHIND_TOKEN


def kept_places(problem: Problem, config: Config) -> int:
    """Tiles of kept columns that shared memory holds, none without any."""
    return min(problem.kept_tiles, config.kept_places)


def writes_tiles(problem: Problem, config: Config) -> bool:
    """Whether outputs of 16 bits leave in tiles, which are 64 outputs wide."""
    whole = config.block_m >= 64 and config.block_m % STORED_TOKENS == 0
    return whole and problem.outputs % 64 == 0 and config.splits == 1


def _groups(problem: Problem, config: Config) -> int:
    """Groups of inputs in a stage."""
    return max(1, config.block_k // (problem.group_size or config.block_k))


def supported_config(problem: Problem, config: Config) -> str | None:
    """None, or the reason why `config` cannot compute `problem`."""
    per_warpgroup = config.block_k // config.k_warpgroups
    group = problem.group_size
    if config.block_m % 8 or not 8 <= config.block_m <= 256:
        return f"block_m={config.block_m} is no width of a tensor-core product; expected a multiple of 8 up to 256"
    if config.block_k % problem.x_columns or config.block_k % config.k_warpgroups or per_warpgroup % 64:
        return f"block_k={config.block_k} is not whole tiles for {config.k_warpgroups} warpgroups along K"
    if config.k_warpgroups > 1 and per_warpgroup % problem.x_columns:
        return f"{per_warpgroup} inputs a warpgroup are not a multiple of {problem.x_columns}"
    if problem.entry_words and per_warpgroup % 128:
        return f"{per_warpgroup} inputs a warpgroup are not a multiple of 128, the inputs that share sparse entries"
    if config.block_k > 256 * 64 or config.rows > 256:
        return "a block is larger than one copy can be"
    if group is not None and (config.block_k % group and group % config.block_k):
        return f"block_k={config.block_k} and group_size={group}: neither is a multiple of the other"
    if group is not None and (per_warpgroup % group and group % per_warpgroup):
        return f"{per_warpgroup} inputs a warpgroup and group_size={group}: neither is a multiple of the other"
    if (problem.has_zeros or problem.two_level) and (size := _groups(problem, config) * config.rows) % 128:
        what = "zero points" if problem.has_zeros else "scales"
        return f"the {what} of a stage are {size} bytes; expected a multiple of 128, as copies need them"
    if runs_on(problem) and SEGMENT % per_warpgroup:
        return f"{per_warpgroup} inputs a warpgroup do not divide the {SEGMENT} after which running sums start anew"
    if config.scale == "operand" and problem.x_dtype == "int8":
        return "an 8-bit operand cannot hold a scaled weight"
    if config.cluster not in (1, 2) or config.blocks % config.cluster:
        return (
            f"{config.blocks} blocks do not come in clusters of {config.cluster}; expected 1, or 2 and an even number"
        )
    if (config.cluster > 1) + (config.splits > 1) + config.stream_k > 1:
        return "sums would be added in several ways; expected one of a cluster, stream-K and splits"
    if config.cluster > 1 and problem.inputs <= config.block_k:
        return "a cluster shares the stages of a block, and there is only one"
    if config.stream_k and config.blocks > (stages := _stages(problem, config)):
        return f"{config.blocks} CTAs for {stages} stages; expected one for each at least"
    if config.kept_places < 1:
        return f"{config.kept_places} places for kept columns; expected at least 1"
    if config.warpgroups + 1 > MOST_WARPGROUPS:
        return f"{config.warpgroups} warpgroups that compute; expected at most {MOST_WARPGROUPS - 1}"
    if accumulators(problem, config) + _FEWEST_REGISTERS > config.registers()[1]:
        return f"block_m={config.block_m} needs {accumulators(problem, config)} registers for sums; too many"
    if problem.token_dtype and config.block_m != 8:
        return f"block_m={config.block_m}; expected 8, the token and the columns that are none"
    needed = shared_bytes(problem, config)
    if needed > SHARED_MEMORY - _BARRIERS:
        return f"{needed} bytes of shared memory; expected at most {SHARED_MEMORY - _BARRIERS}"
    return None


def tiles_of(config: Config) -> int:
    """Tiles of 64 inputs of a stage that a warpgroup multiplies."""
    return config.block_k // config.k_warpgroups // 64


def tiles_of_scale(problem: Problem, config: Config) -> int:
    """Those of them that share a scale."""
    return min((problem.group_size or config.block_k) // 64, tiles_of(config))


def blocks_of(problem: Problem, config: Config) -> int:
    """Blocks of outputs and tokens."""
    return -(-problem.outputs // config.rows) * -(-problem.tokens // config.block_m)


def _stages(problem: Problem, config: Config) -> int:
    """Stages of all blocks."""
    return blocks_of(problem, config) * -(-problem.inputs // config.block_k)


def runs_on(problem: Problem) -> bool:
    """Whether sums run on over groups: those of 8-bit operands, which are integers, with scales that are not."""
    return problem.group_size is not None and problem.x_dtype == "int8" and not problem.two_level


def sums_groups(problem: Problem, config: Config) -> bool:
    """Whether every group has sums of its own."""
    return problem.group_size is not None and config.scale == "sum" and problem.x_bytes == 2


def sums_in_flight(config: Config) -> int:
    """Sets of group sums: with two, one is scaled while the tensor core fills the other."""
    return 2 if 3 * config.block_m // 2 + _OTHER_REGISTERS <= config.registers()[1] else 1


def accumulators(problem: Problem, config: Config) -> int:
    """Registers of a thread that hold sums."""
    own = registers_of_sums(problem, config)
    if runs_on(problem):
        return 2 * own + 2  # and the scales of two rows
    return own * (1 + sums_in_flight(config)) if sums_groups(problem, config) else own


def no_entries(problem: Problem) -> str | None:
    """None, or the reason why the sparse entries of `problem` cannot be added to its weights."""
    if problem.entry_words and problem.x_bytes == 1:
        return "sparse entries are added to 16-bit operands, and activations are int8"
    group = problem.group_size
    if problem.entry_words and group is not None and group % 128 and 128 % group:
        return f"group_size={group} does not go with sparse entries, which come for 128 inputs at a time"
    return None


def no_kept_columns(problem: Problem) -> str | None:
    """None, or the reason why the kept columns of `problem` cannot be added to its sums."""
    if problem.kept_columns and problem.kept_dtype not in DTYPES:
        return f"kept columns are {problem.kept_dtype}; expected bfloat16 or float16"
    if problem.kept_columns and problem.pieces > 1:
        return "kept columns are multiplied by tokens, not by pieces of one"
    return None


def no_own_token(problem: Problem) -> str | None:
    """None, or the reason why the kernel cannot make the 8-bit x of `problem` of a 16-bit token itself."""
    if not problem.token_dtype:
        return None
    if problem.token_dtype not in ("bfloat16", "float16"):
        return f"a token to quantize is {problem.token_dtype}; expected bfloat16 or float16"
    if problem.x_dtype != "int8" or problem.pieces not in (1, 3) or not 2 <= problem.token_bits <= 8:
        return (
            f"a token becomes {problem.pieces} rows of {problem.x_dtype}, {problem.token_bits} bits; expected int8 of "
            "2 to 8 bits, or three pieces"
        )
    if problem.tokens != 1:
        return f"{problem.tokens} tokens; the kernel quantizes one"
    if problem.inputs % 16 or problem.inputs > LARGEST_OWN_TOKEN:
        return f"K={problem.inputs} is not a multiple of 16 up to {LARGEST_OWN_TOKEN}, a token in registers"
    if problem.kept_columns or problem.entry_words:
        return "the kernel quantizes a whole token, with nothing kept and no entries beside it"
    return None


def no_scales(problem: Problem) -> str | None:
    """None, or the reason why scales of such a type have no kernel."""
    if problem.scale_dtype not in SCALE_BYTES:
        return f"scales are {problem.scale_dtype}; expected bfloat16, float16, float32 or, in two levels, uint8"
    if not problem.two_level:
        return None
    if problem.group_size is None or problem.has_zeros or problem.bits > 4 or problem.entry_words:
        return "scales in two levels go with groups of inputs, no zero points, at most 4 bits and no sparse entries"
    return None


def supported(problem: Problem) -> str | None:
    """None, or the reason why no configuration computes `problem`."""
    group = problem.group_size
    if reason := no_entries(problem) or no_kept_columns(problem) or no_own_token(problem):
        return reason
    if problem.bits not in (2, 3, 4, 8):
        return f"bits={problem.bits} has no kernel; expected 2, 3, 4 or 8"
    if problem.x_dtype not in ("bfloat16", "float16", "int8"):
        return f"activations are {problem.x_dtype}; expected bfloat16, float16 or int8"
    if reason := no_scales(problem):
        return reason
    if problem.inputs < 1 or problem.outputs < 1 or problem.tokens < 1:
        return f"nothing to multiply: M={problem.tokens}, N={problem.outputs}, K={problem.inputs}"
    if group is not None and group % 64:
        return f"group_size={group} is not a multiple of 64"
    if group is not None and problem.x_dtype == "int8" and group % 64 == 0 and group & (group - 1):
        return f"group_size={group} is not a power of two"
    if problem.has_zeros and problem.x_dtype == "int8" and problem.bits == 8:
        return "8-bit codes with zero points do not fit 8-bit operands"
    return None
