"""The world stands on the model's action space and on nothing else of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import flashdrive_node.world

ALLOWED = ("flashdrive_node.world", "flashdrive_node.model.action_space")


def test_world_imports_nothing_of_the_node() -> None:
    files = sorted(Path(flashdrive_node.world.__file__).parent.glob("*.py"))
    assert len(files) > 15
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("flashdrive_node") or name.startswith(ALLOWED), f"{path} imports {name}"
                assert not name.startswith(("rclpy", "transformers")), f"{path} imports {name}"
