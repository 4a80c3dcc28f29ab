"""What ``pip install .`` puts into a Python environment."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import flashdrive_node

ROOT = Path(__file__).resolve().parents[2]


def test_wheel_holds_modules_data_and_commands(tmp_path: Path) -> None:
    top = tmp_path / "top"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "launch", "params"):
        shutil.copytree(ROOT / name, top / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, top / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "."], cwd=top, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = archive.read(f"flashdrive_node-{flashdrive_node.__version__}.dist-info/entry_points.txt").decode()
    data = f"flashdrive_node-{flashdrive_node.__version__}.data/data/share/flashdrive_node/"
    for folder in ("launch", "params"):
        for file in (ROOT / folder).rglob("*.*"):
            if "__pycache__" not in file.parts:
                assert data + str(file.relative_to(ROOT)) in names
    modules = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "flashdrive_node").rglob("*.py")}
    assert modules <= names
    assert {"flashdrive_node/py.typed", "flashdrive_node/model/data/qwen_prompt_vocab.json"} <= names
    bundled = (ROOT / "src" / "flashdrive_node" / "data").rglob("*.*")
    assert {str(path.relative_to(ROOT / "src")) for path in bundled} <= names
    assert "flashdrive = flashdrive_node.cli.main:main" in scripts
    assert "flashdrive_node = flashdrive_node.ros.main:main" in scripts
