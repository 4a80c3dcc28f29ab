"""Processes that tests start, so that none outlives a test that failed."""

import contextlib
import subprocess

import psutil

_started: list[subprocess.Popen[str]] = []


def remember(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """Have the process ended with the test."""
    _started.append(process)
    return process


def end_started() -> None:
    """Kill what a failed test left running, with all its children."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid)
                for member in (*family.children(recursive=True), family):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
            process.communicate()
