"""One version and one list of entry points, wherever they must be repeated."""

import ast
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import flashdrive_node

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ros2_ws" / "src" / "flashdrive_node"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def setup_arguments() -> dict[str, Any]:
    """The literal arguments of the call of setup()."""
    tree = ast.parse((PACKAGE / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    found = {}
    for keyword in call.keywords:
        try:
            found[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return found


def test_versions_are_equal() -> None:
    versions = {
        "pyproject.toml": PROJECT["version"],
        "package.xml": ElementTree.parse(PACKAGE / "package.xml").findtext("version"),
        "setup.py": setup_arguments()["version"],
        "__init__.py": flashdrive_node.__version__,
    }
    assert len(set(versions.values())) == 1, versions
    assert re.fullmatch(r"\d+\.\d+\.\d+", flashdrive_node.__version__)


def test_entry_points_are_equal() -> None:
    scripts = setup_arguments()["entry_points"]["console_scripts"]
    assert dict(s.split(" = ") for s in scripts) == PROJECT["scripts"]


def test_names_and_licences_are_equal() -> None:
    xml = ElementTree.parse(PACKAGE / "package.xml").getroot()
    arguments = setup_arguments()
    assert xml.get("format") == "3"
    assert xml.findtext("license") == arguments["license"] == PROJECT["license"]
    assert xml.findtext("description") == arguments["description"]
    assert xml.findtext("name") == PROJECT["name"] == "flashdrive_node"
    assert xml.findtext("export/build_type") == "ament_python"


def test_every_ros_package_that_is_imported_is_declared() -> None:
    xml = ElementTree.parse(PACKAGE / "package.xml").getroot()
    declared = {element.text for element in xml.findall("exec_depend")}
    imported = set()
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    ros = {name for name in imported if name.endswith(("_msgs", "_srvs", "_interfaces"))}
    ros |= imported & {"rclpy", "launch", "launch_ros", "ament_index_python"}
    optional = {"autoware_planning_msgs"}
    assert len(ros) > 8
    assert ros - optional <= declared, ros - optional - declared


def test_links_lead_to_the_top_of_the_repository() -> None:
    for name in ("src", "launch", "params", "tests", "LICENSE"):
        assert (PACKAGE / name).is_symlink()
        assert (PACKAGE / name).resolve() == ROOT / name


def test_pytest_does_not_follow_the_links_back() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    assert "ros2_ws" in options["norecursedirs"]
