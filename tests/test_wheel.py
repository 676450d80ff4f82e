"""What is shipped: the wheel holds the three packages and nothing else."""

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_holds_the_three_packages_only(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read("jquant_jax-0.1.0.dist-info/entry_points.txt").decode()
    top = {name.partition("/")[0] for name in names}
    assert top == {"jquant", "pallas_kernels", "convert", "jquant_jax-0.1.0.dist-info"}
    assert not [name for name in names if "test" in name or "bench" in name.split("/")[:2] or name.endswith(".pyc")]
    assert {"jquant/__init__.py", "jquant/format/checkpoint.py", "pallas_kernels/packing.py"} <= set(names)
    assert "jquant = jquant.cli:main" in entry_points
    assert any(name.endswith("LICENSE") for name in names)
