"""The command's frame: help, versions, and errors that people can read."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from flashdrive_node import __version__
from flashdrive_node.cli.main import COMMANDS, main
from flashdrive_node.engine.protocol import EngineError
from flashdrive_node.model.errors import ModelError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A subcommand "try" whose `run` can be set."""
    module = ModuleType("flashdrive_node.cli.try_it")
    holder = SimpleNamespace(run=lambda args: 0)
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)  # type: ignore[attr-defined]
    module.run = lambda args: holder.run(args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashdrive_node.cli.try_it", module)
    monkeypatch.setitem(COMMANDS, "try", ("try_it", "try something"))
    return holder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module_name, text = COMMANDS[name]
    module = importlib.import_module(f"flashdrive_node.cli.{module_name}")
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run)
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"{text[0].upper()}{text[1:]}."[:40] in capsys.readouterr().out


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name}" in out for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"flashdrive_node {__version__}"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["try", "--number", "x"], ["try", "--unknown"]])
def test_usage_errors_exit_with_2(
    command: SimpleNamespace, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: flashdrive" in capsys.readouterr().err


def test_arguments_and_exit_code_pass_through(command: SimpleNamespace) -> None:
    command.run = lambda args: args.number
    assert main(["try", "--number", "7"]) == 7


def test_ros_arguments_go_to_the_node_only(
    command: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("flashdrive_node.cli.node.run", lambda args: seen.append(args.ros_arguments) or 0)
    ros = ["--ros-args", "-p", "engine:=fake", "--params-file", "x.yaml", "--", "--debug"]
    assert main(["node", *ros]) == 0
    assert main(["node"]) == 0
    assert seen == [ros, []]
    with pytest.raises(SystemExit):
        main(["try", *ros])
    assert "try takes no --ros-args" in capsys.readouterr().err


def fail(error: BaseException) -> SimpleNamespace:
    def run(args: argparse.Namespace) -> int:
        raise error

    return SimpleNamespace(run=run)


@pytest.mark.parametrize(
    "error", [ModelError("no model"), EngineError("no engine"), FileNotFoundError(2, "No such file", "bag.mcap")]
)
def test_expected_errors_are_one_message(
    command: SimpleNamespace, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = fail(error).run
    assert main(["try"]) == 2
    assert capsys.readouterr().err == f"flashdrive: {error}\n"
    for arguments in (["--debug", "try"], ["try", "--debug"]):
        with pytest.raises(type(error)):
            main(arguments)


def test_unexpected_errors_keep_their_traceback(command: SimpleNamespace) -> None:
    command.run = fail(ZeroDivisionError()).run
    with pytest.raises(ZeroDivisionError):
        main(["try"])


def test_missing_packages_are_named(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = fail(ModuleNotFoundError("No module named 'rclpy.node'", name="rclpy.node")).run
    assert main(["try"]) == 2
    assert "needs the package 'rclpy': source ROS 2 Jazzy" in capsys.readouterr().err
    command.run = fail(ModuleNotFoundError("No module named 'flashdrive_node.x'", name="flashdrive_node.x")).run
    with pytest.raises(ModuleNotFoundError):
        main(["try"])


def test_interrupt(command: SimpleNamespace) -> None:
    command.run = fail(KeyboardInterrupt()).run
    assert main(["try"]) == 130


def test_help_imports_neither_ros_nor_torch() -> None:
    code = (
        "import sys; from flashdrive_node.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'rclpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"


def test_reader_that_goes_away() -> None:
    """`flashdrive inspect X | head -1` ends quietly."""
    checkpoint = Path(__file__).parent.parent / "data" / "oracle_small" / "checkpoint"
    code = (
        "import sys, time; from flashdrive_node.cli.main import main\n"
        f"code = main(['inspect', {str(checkpoint)!r}]); sys.stdout.flush(); sys.exit(code)"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 141
