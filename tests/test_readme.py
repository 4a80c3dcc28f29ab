"""The README says what the code does: parameters, topics, commands, files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashdrive_node.cli.main import COMMANDS
from flashdrive_node.ros import topics
from flashdrive_node.ros.parameters import parameters_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_parameter_table_is_the_nodes():
    """Write it anew with: python tests/test_readme.py"""
    found = re.search(r"<!-- parameters: .*? -->\n(.*?)<!-- /parameters -->", README, re.DOTALL)
    assert found is not None
    assert found.group(1) == parameters_markdown().strip() + "\n"


def test_every_topic_and_service_is_named():
    names = [getattr(topics, name) for name in dir(topics) if name.isupper() and name != "NODE_NAME"]
    assert [name for name in names if f"`{name}`" not in README] == []


def test_every_command_is_named():
    assert [name for name in COMMANDS if f"`flashdrive {name}`" not in README] == []


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_make_targets_exist():
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    table = f"\\g<1>{parameters_markdown().strip()}\n\\g<2>"
    text = re.sub(r"(<!-- parameters: .*? -->\n).*?(<!-- /parameters -->)", table, README, flags=re.DOTALL)
    (ROOT / "README.md").write_text(text)
    sys.exit(0)
