"""The workspace builds with colcon, plain and with --symlink-install, and what is installed runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashdrive_node

ROOT = Path(__file__).resolve().parents[2]
#: What a checkout has at its top that the package links to.
_SOURCES = ("src", "launch", "params", "ros2_ws", "LICENSE")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that nothing is built into the sources."""
    top = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "install", "log")
    for name in _SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, top / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, top / name)
    (top / "tests").mkdir()
    return top


def build(checkout: Path, target: Path, *options: str) -> Path:
    """Build into ``target`` and return the package's install prefix."""
    command = [sys.executable, "-m", "colcon", "--log-base", str(target / "log"), "build", "--executor", "sequential"]
    command += ["--build-base", str(target / "build"), "--install-base", str(target / "install"), *options]
    done = subprocess.run(command, cwd=checkout / "ros2_ws", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Finished <<< flashdrive_node" in done.stdout
    return target / "install" / "flashdrive_node"


@pytest.fixture(scope="module", params=[(), ("--symlink-install",)], ids=["plain", "symlink"])
def prefix(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("colcon"), *request.param)


def in_workspace(prefix: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell that has sourced the workspace."""
    script = f'. "{prefix.parent / "setup.sh"}" && exec "$@"'
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "AMENT_PREFIX_PATH")}
    environment |= {"COLCON_CURRENT_PREFIX": str(prefix.parent), "ROS_LOG_DIR": str(prefix / "log")}
    return subprocess.run(
        ["/bin/sh", "-c", script, "sh", *command], env=environment, capture_output=True, text=True, timeout=60
    )


def test_data_files_are_installed(prefix: Path, checkout: Path) -> None:
    share = prefix / "share" / "flashdrive_node"
    for folder, pattern in (("launch", "*.launch.py"), ("params", "*.yaml"), ("params", "*.xml"), ("params", "*.rviz")):
        wanted = sorted(p.name for p in (checkout / folder).glob(pattern))
        assert wanted
        assert sorted(p.name for p in (share / folder).glob(pattern)) == wanted
    assert (share / "params" / "rigs" / "sample.yaml").read_text() == (checkout / "params/rigs/sample.yaml").read_text()
    assert (share / "package.xml").exists()
    assert (prefix / "share" / "ament_index" / "resource_index" / "packages" / "flashdrive_node").exists()


def test_executables_run_from_the_workspace(prefix: Path) -> None:
    # `ros2 run` and launch files look for executables in lib/<package>.
    executables = prefix / "lib" / "flashdrive_node"
    assert sorted(p.name for p in executables.iterdir()) == ["flashdrive", "flashdrive_node", "flashdrive_world"]
    said = in_workspace(prefix, str(executables / "flashdrive"), "--version")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == f"flashdrive_node {flashdrive_node.__version__}"
    said = in_workspace(prefix, str(executables / "flashdrive_node"), "--help")
    assert said.returncode == 0, said.stderr
    assert "flashdrive_node" in said.stdout


def test_installed_package_and_its_share_directory_are_found(prefix: Path, checkout: Path) -> None:
    program = "import flashdrive_node, flashdrive_node.runtime.rig as r; print(flashdrive_node.__file__); "
    program += "print(r.share_directory()); print(r.load_rig('sample').name); "
    program += "import flashdrive_node.bundled as b; print((b.bundled_drive() / 'metadata.yaml').is_file())"
    said = in_workspace(prefix, sys.executable, "-c", program)
    assert said.returncode == 0, said.stderr
    module, share, name, carried = said.stdout.splitlines()
    here = (prefix.resolve(), checkout.resolve(), prefix.parents[1].resolve())
    assert any(Path(module).resolve().is_relative_to(place) for place in here)
    assert Path(share) == prefix / "share" / "flashdrive_node"
    assert (name, carried) == ("sample", "True")
