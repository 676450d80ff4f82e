"""The order of products, waits and scalings of a stage, on a tensor core whose sums are unknown until waited for."""

import types
from typing import Any

import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine
from pallas_kernels.affine_matmul import schedule, warpgroup


class TensorCore:
    """Products whose sums are in no register before they are waited for. Here a fragment is one weight, and column i
    of x of an instruction lies at its place + i."""

    i32 = staticmethod(lambda: int)

    def __init__(self) -> None:
        self.in_flight: list[tuple[list[Any], list[float]]] = []
        self.most = 0

    def multiply_tiles(
        self, begun: Any, fragments: Any, columns: np.ndarray, places: list[int], width: int, _: str, keep: Any
    ) -> list[Any]:
        start = [0.0] * (width // 2)
        if begun is not None and keep is None:
            unfinished = [done for sums, done in self.in_flight if sums is begun]
            start = unfinished[-1] if unfinished else [register.value for register in begun]
        done = [
            value + sum(a * columns[place + i] for a, place in zip(fragments, places, strict=True))
            for i, value in enumerate(start)
        ]
        sums = [Register() for _ in done]
        self.in_flight.append((sums, done))
        self.most = max(self.most, len(self.in_flight))
        return sums

    def wait_for_earlier(self, in_flight: int) -> None:
        while len(self.in_flight) > in_flight:
            for register, value in zip(*self.in_flight.pop(0), strict=True):
                register.value = value

    def wait_for_products(self, sums: list[Any], in_flight: int) -> list[Any]:
        self.wait_for_earlier(in_flight)
        assert all(register.value is not None for register in sums)
        return sums

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return Register(a.value * b.value + c.value)


class Register:
    type = float

    def __init__(self, value: float | None = None) -> None:
        self.value = value


class Stage:
    """Tiles with one weight each instruction; x of an instruction lies at places 1000 apart, a half 100 after the
    other."""

    def __init__(self, operand: str, random: np.random.Generator, tiles: int, run: int) -> None:
        self.operand, self.steps = operand, 2 if operand == "s8" else 4
        self.weights = random.integers(-8, 8, (tiles, self.steps)).astype(float)
        self.scales = random.integers(1, 9, tiles // run).astype(float)
        self.columns = random.integers(-9, 9, 1000 * tiles * self.steps).astype(float)
        self.group_stride = 0

    def words(self, tile: int) -> int:
        return tile

    def grid(self, run: int) -> Any:
        return types.SimpleNamespace(scales=[Register(self.scales[run])] * 2)

    def fragments(self, tile: int, grid: Any) -> list[float]:
        return list(self.weights[tile])

    def places(self, tile: int) -> list[int]:
        return [1000 * (self.steps * tile + step) for step in range(self.steps)]


@pytest.mark.parametrize("x_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("scale", ["sum", "operand", "row"])
def test_every_product_is_waited_for_and_scaled_once(
    x_dtype: str, continuous: bool, halves: int, scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = affine.Problem(32, 64, 1536, 4, None if scale == "row" else 128, False, x_dtype, "bfloat16")
    config = affine.Config(
        32, 512, 1, halves=halves, continuous=continuous, scale="operand" if scale == "operand" else "sum"
    )
    random, tensor_core, operand = np.random.default_rng(0), TensorCore(), "s8" if x_dtype == "int8" else "bf16"
    monkeypatch.setattr(schedule, "ops", tensor_core)
    monkeypatch.setattr(schedule.compat, "i32", lambda: int)
    grouped = scale == "sum"
    stages: list[Any] = [Stage(operand, random, 8, 2) for _ in range(3)]
    for stage in stages:
        stage.group_stride = 100 // (32 // halves // 8)
    carry = [[Register(0.0) for _ in range(count)] for count, _ in warpgroup.carried(this, config)]
    for stage in stages:
        carry = schedule.multiply_stage(this, config, stage, carry, 0)
        assert len(tensor_core.in_flight) == continuous
    total, *waiting = carry
    if waiting:
        schedule.add_scaled(total, halves - 1, tensor_core.wait_for_products(waiting[0], 0), waiting[1])
    elif continuous:
        total = tensor_core.wait_for_products(total, 0)
    assert tensor_core.most == 2
    expected = np.zeros(16)
    for stage in stages:
        for tile in range(8):
            factor = stage.scales[tile // 2] if grouped else 1.0
            for step, place in enumerate(stage.places(tile)):
                for i in range(16):
                    half, column = divmod(i, 16 // halves)
                    expected[i] += factor * stage.weights[tile, step] * stage.columns[place + 100 * half + column]
    np.testing.assert_array_equal([register.value for register in total], expected)
