"""How `make test` shares the tests out among its two processes."""

import pytest


def test_a_files_tests_stay_together(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("xdist_group").args == ("tests/test_side_by_side.py",)
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@tests/test_side_by_side.py"), "pytest-xdist did not see the group"
