"""model < engine < runtime < ros < cli: nothing imports upwards, and ROS stays in ros/."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashdrive_node

PACKAGE = Path(flashdrive_node.__file__).parent
LAYERS = ("model", "engine", "runtime", "ros", "cli")
#: What stands beside the layers, and what it must not import.
BESIDE = {"evaluation": ("ros", "cli", "training"), "training": ("ros", "cli")}
ROS_PREFIXES = ("rclpy", "launch", "ament_index_python", "rosgraph_msgs", "lifecycle_msgs", "builtin_interfaces")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_upwards(layer: str) -> None:
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    above = tuple(f"flashdrive_node.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :])
    for path in files:
        found = [name for name in imported(path) if name.startswith(above)] if above else []
        assert not found, f"{path} imports {found}"


@pytest.mark.parametrize("part", BESIDE)
def test_evaluation_and_training_stand_beside_the_node(part: str) -> None:
    forbidden = tuple(f"flashdrive_node.{name}" for name in BESIDE[part])
    for path in sorted((PACKAGE / part).rglob("*.py")):
        found = [name for name in imported(path) if name.startswith(forbidden)]
        assert not found, f"{path} imports {found}"


@pytest.mark.parametrize("layer", ["model", "engine", "runtime"])
def test_no_ros_below_the_ros_layer(layer: str) -> None:
    for path in (PACKAGE / layer).rglob("*.py"):
        found = [name for name in imported(path) if name.split(".")[0] in ROS_PREFIXES or "_msgs" in name]
        assert not found, f"{path} imports {found}"


def test_runtime_and_fake_engine_need_no_torch() -> None:
    """A node with the fake engine must start within a second, and without torch."""
    code = (
        "import sys, flashdrive_node.runtime.pipeline, flashdrive_node.engine.fake; "
        "sys.exit(str([m for m in ('torch', 'transformers', 'rclpy') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "", done.stderr
