"""Commands of the package as processes of their own, in a ROS domain of the test's own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from support.node_process import own_domain_id
from support.processes import remember


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "ROS_DOMAIN_ID": str(own_domain_id()),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOG_DIR": str(folder / "ros_log"),
        "OMP_NUM_THREADS": "1",
    }


def stop(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> subprocess.CompletedProcess[str]:
    """Send a signal and wait for the end."""
    process.send_signal(number)
    out, err = process.communicate(timeout=30.0)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(folder: Path, module: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return remember(process)


def run(folder: Path, module: str, *arguments: object, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    process = start(folder, module, *arguments)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
