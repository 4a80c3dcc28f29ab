"""What all tests need."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from support.processes import end_started

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Scripts start background jobs with SIGINT ignored, and every process below would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says nothing about it where two test processes share two cores.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

#: Folders of tests that start processes: one after the other, whatever runs beside them.
ONE_AT_A_TIME = {"packaging", "replay", "ros"}


# In front of xdist, which writes the groups into the names of the tests.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(item.config.rootpath)
        # A file's tests stay together, so that what they share is made once.
        group = "processes" if ONE_AT_A_TIME & set(path.parts) else str(path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Beside processes that drive in real time, what computes takes the processor that they leave. It cannot be undone,
    # and need not be: the processes' group is the largest, so it is handed out first.
    if getattr(item.config.option, "loadgroup", False) and not item.nodeid.endswith("@processes"):
        os.setpriority(os.PRIO_PROCESS, 0, 10)


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the node's process: how a sum is split among threads changes its rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
