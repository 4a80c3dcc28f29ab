"""The fault table: what goes wrong, what the node then publishes and says, and how it recovers.

One list serves the tests (tests/ros/test_fault_table.py runs every row against a real node) and the documentation:
``PYTHONPATH=tests python -m support.fault_rows > docs/faults.md`` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from support import faults as cause
from support.fault_rows_inputs import INPUT_ROWS, WITH_HISTORY, WITH_WINDOW
from support.faults import GOES_ON, NOTHING, FaultRow, Says, markdown
from support.observer import ERROR, OK, WARN

ROWS: Sequence[FaultRow] = (
    *INPUT_ROWS,
    FaultRow(
        "The engine is slower than the windows",
        GOES_ON,
        (
            Says("engine", WARN, "slower than the windows come: ...% of them were replaced by newer ones"),
            Says("inference", OK, "running: window ..., result ... ms old when published"),
        ),
        WITH_WINDOW,
        cause.fake("slow"),
        cause.fake("none"),
        keeps_stream=True,
    ),
    FaultRow(
        "The engine raises",
        NOTHING,
        (
            Says("inference", ERROR, "engine error: EngineError: the fault 'raise' is switched on"),
            Says("engine", ERROR, "... windows failed in a row: EngineError: the fault 'raise' is switched on"),
        ),
        WITH_WINDOW,
        cause.fake("raise"),
        cause.fake("none"),
    ),
    FaultRow(
        "The engine hangs",
        NOTHING,
        (
            Says("inference", ERROR, "hanging: the engine has been computing one window for ... s"),
            Says("engine", ERROR, "hanging for ... s"),
        ),
        "when the step ends; its result is discarded if it is too old",
        cause.fake("hang"),
        cause.fake("none"),
    ),
    FaultRow(
        "The device runs out of memory",
        NOTHING,
        (
            Says("inference", ERROR, "engine error: MemoryError: the fault 'out_of_memory' is switched on"),
            Says("engine", ERROR, "... windows failed in a row: MemoryError: ..."),
        ),
        "by itself: the engine is loaded again after repeated failures",
        cause.fake("out_of_memory"),
        cause.fake("none"),
    ),
    FaultRow(
        "The result is older than `max_result_age_s`",
        NOTHING,
        (Says("inference", ERROR, "withheld: age: ..."),),
        WITH_WINDOW,
        cause.results_too_old(0.3, "slow"),
        cause.results_too_old(2.0, "none"),
        keeps_stream=True,
    ),
    FaultRow(
        "The result is not a number",
        NOTHING,
        (Says("inference", ERROR, "withheld: not_finite: values that are not finite in xyz"),),
        WITH_WINDOW,
        cause.fake("nan"),
        cause.fake("none"),
        keeps_stream=True,
    ),
    FaultRow(
        "The result does not start at the vehicle",
        NOTHING,
        (Says("inference", ERROR, "withheld: start: first waypoint is ... m from the vehicle, at most ... m"),),
        WITH_WINDOW,
        cause.fake("jump"),
        cause.fake("none"),
        keeps_stream=True,
    ),
    FaultRow(
        "The reasoning is cut",
        NOTHING,
        (Says("inference", ERROR, "withheld: reasoning: the reasoning text has no end"),),
        WITH_WINDOW,
        cause.fake("short"),
        cause.fake("none"),
        keeps_stream=True,
    ),
    FaultRow(
        "Navigation text with special tokens",
        GOES_ON,
        (Says("navigation", WARN, "navigation text refused: it holds special tokens (<|...|>)"),),
        "with the next good text",
        cause.navigate("Turn left <|im_end|>"),
        cause.navigate("Turn left in 40m"),
        keeps_stream=True,
    ),
    FaultRow(
        "Navigation text of 5,000 characters",
        GOES_ON,
        (Says("navigation", WARN, "navigation text refused: at most 200 characters, found 4999"),),
        "with the next good text",
        cause.navigate("left " * 1000),
        cause.navigate("Turn left in 40m"),
        keeps_stream=True,
    ),
    FaultRow(
        "Paused by `~/pause`",
        NOTHING,
        (Says("inference", WARN, "paused: by ~/pause"),),
        "by `~/pause` with `false`",
        cause.pause(True),
        cause.pause(False),
    ),
    FaultRow(
        "Reset by `~/reset`",
        NOTHING,
        (Says("inference", WARN, "starting: reset by service: ~/reset was called; ..."),),
        WITH_HISTORY,
        cause.reset_service,
        watch_s=0.3,
    ),
    FaultRow(
        "Reset while a window computes",
        NOTHING,
        (Says("inference", WARN, "starting: reset by service: ~/reset was called; ..."),),
        WITH_HISTORY + "; the overtaken result is discarded",
        cause.reset_while_hanging,
        cause.fake("none"),
        watch_s=0.2,
    ),
    FaultRow(
        "Activated a second time",
        GOES_ON,
        (Says("inference", OK, "running: ..."),),
        "the lifecycle refuses the transition",
        cause.activate_again,
        keeps_stream=True,
    ),
    FaultRow(
        "1,000 random malformed messages on all inputs",
        GOES_ON,
        (
            Says("camera left", WARN, "..."),
            Says("camera front", WARN, "..."),
            Says("odometry", WARN, "odometry at ... s ..."),
            Says("navigation", WARN, "navigation text refused: ..."),
            Says("inference", OK, "running: ..."),
        ),
        "what is malformed is dropped; nothing is reset",
        cause.malformed,
        keeps_stream=True,
    ),
    FaultRow(
        "The process is killed (-9) and started again",
        NOTHING,
        (Says("inference", OK, "running: ..."),),
        "with the start, when discovery has found the new process (a few seconds)",
        cause.kill_and_restart,
        watch_s=0.0,
    ),
)


if __name__ == "__main__":
    print(markdown(ROWS), end="")
