"""The short spelling and the dataclass say the same; whatever is wrong is named."""

import itertools

import pytest

from jquant.format.spec import ActivationSpec, QuantSpec

SPELLINGS = {
    "w4-g128": QuantSpec(4, group_size=128),
    "w4-g128-sym": QuantSpec(4, group_size=128, symmetric=True),
    "w4-g128-sym-twolevel": QuantSpec(4, group_size=128, symmetric=True, two_level=True),
    "w2a8-g64-sym-twolevel-actsym": QuantSpec(
        2, group_size=64, symmetric=True, two_level=True, activation=ActivationSpec(8, symmetric=True)
    ),
    "w4-g64-out": QuantSpec(4, group_size=64, group_axis="out"),
    "w2": QuantSpec(2),
    "w3-codebook": QuantSpec(3, "codebook"),
    "w3-codebook+s0.45%": QuantSpec(3, "codebook", sparse=0.45),
    "w4-sym+o256": QuantSpec(4, symmetric=True, outliers=256),
    "w8-g32+s1%+o8": QuantSpec(8, group_size=32, sparse=1.0, outliers=8),
    "w4a8": QuantSpec(4, activation=ActivationSpec(8)),
    "w4a4-sym-actsim+o32": QuantSpec(4, symmetric=True, outliers=32, activation=ActivationSpec(4, mode="simulation")),
    "w4a3-codebook-shared-actcodebook+k0.5%": QuantSpec(
        4, "codebook", shared=True, activation=ActivationSpec(3, "codebook", exact=0.5)
    ),
    "w4a4-codebook-actcodebook+t0.5%": QuantSpec(
        4, "codebook", activation=ActivationSpec(4, "codebook", exact=0.5, static=True)
    ),
    "w4-sym-2:4": QuantSpec(4, symmetric=True, semistructured=True),
    "w8-codebook-nested3": QuantSpec(8, "codebook", nested_from=3),
    "w4-codebook-int8": QuantSpec(4, "codebook", int8_table=True),
    "w4a8-codebook-shared-int8-actsym": QuantSpec(
        4, "codebook", shared=True, int8_table=True, activation=ActivationSpec(8, symmetric=True)
    ),
    "w3-codebook-int8+s0.45%": QuantSpec(3, "codebook", int8_table=True, sparse=0.45),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spelling_means_the_dataclass_and_back(text: str) -> None:
    assert QuantSpec.parse(text) == SPELLINGS[text]
    assert str(SPELLINGS[text]) == text


def test_every_spec_survives_its_spelling() -> None:
    for bits, size, symmetric, axis in itertools.product((2, 5, 8), (None, 1, 100), (False, True), ("in", "out")):
        spec = QuantSpec(bits, "affine", size, axis, symmetric, sparse=0.125, outliers=3)
        assert QuantSpec.parse(str(spec)) == spec
        assert hash(QuantSpec.parse(str(spec))) == hash(spec)


def test_order_of_the_parts_and_blanks_around_do_not_matter() -> None:
    assert QuantSpec.parse(" w4-sym-out-g32 ") == QuantSpec.parse("w4-g32-out-sym")
    assert QuantSpec.parse("w4-twolevel-sym-g32") == QuantSpec.parse("w4-g32-sym-twolevel")
    assert QuantSpec.parse("w4+o8+s1%") == QuantSpec.parse("w4+s1%+o8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with ''; expected wBITS"),
        ("4bit", "starts with '4bit'"),
        ("w9", "bits is 9; expected a whole number from 2 to 8"),
        ("w1", "bits is 1"),
        ("w4-g0", "group size is 0; expected at least 1"),
        ("w4-g128-g64", "gives group_size twice"),
        ("w4-fast", "unknown part 'fast'"),
        ("w4+s5", r"unknown part \+s5"),
        ("w4+s100%", "sparse is 100.0 %"),
        ("w4-", "unknown part ''"),
        ("w3-codebook-g128", "a codebook has no group size"),
        ("w3-codebook-sym", "a codebook has no symmetric"),
        ("w3-codebook-out", "a codebook has no group axis"),
        ("w3-codebook-twolevel", "a codebook has no two-level scales"),
        ("w5-g64-sym-twolevel", "5 bits, whose multiples leave int8"),
        ("w4-g64-twolevel", "this spec has zero points: write w4-g128-sym-twolevel"),
        ("w4-sym-twolevel", "this spec has one scale a row"),
        ("w4-g64-sym-out-twolevel", "this spec has groups of outputs"),
        ("w4-g64-sym-2:4-twolevel", "this spec has a 2:4 pattern"),
        ("w4a9", "activation bits is 9"),
        ("w4-actsym", "not to how many bits"),
        ("w4a4+t1%", "-actcodebook"),
        ("w4a4-actcodebook-actsym", "no integer range"),
        ("w4-2:4", "needs a symmetric grid"),
        ("w4-shared", "only a codebook is shared"),
        ("w4-nested3", "only codebooks are nested"),
        ("w3-codebook-nested4", "nested from 4 to 3 bits"),
        ("w4-int8", "only the table of a codebook is snapped to int8"),
        ("w8-codebook-nested3-int8", "tables of several widths are not snapped"),
        ("w4a4+k50%", "0 <= percent < 50"),
    ],
)
def test_wrong_spelling_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec.parse(text)


def test_negative_outliers_and_boolean_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="outliers is -1"):
        QuantSpec(4, outliers=-1)
    with pytest.raises(ValueError, match="bits is True"):
        QuantSpec(True)
