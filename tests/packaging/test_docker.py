"""The images and the compose file, as far as they can be checked without building them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
PINS = dict(
    line.split("==") for line in (DOCKER / "requirements.txt").read_text().splitlines() if line and line[0] != "#"
)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and argument of each logical line."""
    kept = (line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
    text = re.sub(r"\\\n", " ", "\n".join(kept))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()]


def test_both_machines_have_an_image() -> None:
    assert [f.name for f in DOCKERFILES] == ["Dockerfile.thor", "Dockerfile.x86"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hadolint"), str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_image_runs_as_a_user_and_offline(file: Path) -> None:
    found = instructions(file)
    names = [name for name, _ in found]
    last = dict(found)
    assert last["USER"] == "${UID}"
    # Everything after the switch only sets things.
    assert set(names[len(names) - 1 - names[::-1].index("USER") :]) <= {
        "USER", "WORKDIR", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    assert "HF_HUB_OFFLINE=1" in last["ENV"]
    assert "/models" in last["VOLUME"]
    assert "ros2 lifecycle get" in last["HEALTHCHECK"]
    assert next(value for name, value in found if name == "ARG").endswith("ros:jazzy-ros-base-noble")
    for name, value in found:
        if name == "COPY":
            *sources, _ = [part for part in value.split() if not part.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), value


def test_images_differ_in_torch_only() -> None:
    first, second = ([line for line in f.read_text().splitlines() if not line.startswith("#")] for f in DOCKERFILES)
    assert set(second) - set(first) == {
        " && /opt/flashdrive/bin/pip install --no-cache-dir --requirement /tmp/requirements.txt"
    }
    assert any("whl/cu130" in line and f"torch=={PINS['torch']}+cu130" in line for line in first)


def test_every_dependency_is_pinned_within_what_the_package_accepts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["tools"]]
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(PINS[requirement.name]), text
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"torch=={PINS['torch']}" in constraints
    # The ROS packages of the distribution are compiled against numpy 1.26.
    assert PINS["numpy"].startswith("1.26.")


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_service_is_confined_and_sees_the_gpu(name: str) -> None:
    service = COMPOSE["services"][name]
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert service["ipc"] == "host"
    assert service["network_mode"] == "host"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "${FLASHDRIVE_UID:-1000}"
    (models,) = service["volumes"]
    assert models.startswith("${FLASHDRIVE_MODELS:?")
    assert models.endswith(":/models:ro")
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["healthcheck"]["test"][-1] == "ros2 lifecycle get --no-daemon /flashdrive_node | grep -q '^active'"
    assert service["environment"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_launch_arguments_exist(name: str) -> None:
    launch, package, file, *arguments = COMPOSE["services"][name]["command"][1:]
    assert (launch, package) == ("launch", "flashdrive_node")
    text = (ROOT / "launch" / file).read_text()
    for argument in arguments:
        assert f'"{argument.split(":=")[0]}"' in text, argument


def test_ignored_files_leave_what_the_images_need() -> None:
    text = (ROOT / ".dockerignore").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert {"src", "launch", "params", "ros2_ws", "docker", "LICENSE"} <= kept
    for link in (ROOT / "ros2_ws" / "src" / "flashdrive_node").iterdir():
        if link.is_symlink() and link.name != "tests":
            assert link.resolve().relative_to(ROOT).parts[0] in kept


def test_entrypoint_is_a_correct_script_and_names_the_profile() -> None:
    script = DOCKER / "entrypoint.sh"
    assert subprocess.run(["/bin/bash", "-n", str(script)], timeout=10).returncode == 0
    name = re.search(r"params/(\S+\.xml)", script.read_text())
    assert name is not None
    assert (ROOT / "params" / name[1]).is_file()
