"""The fault table: what goes wrong, what the node then publishes and says, and how it recovers.

One list serves the tests (tests/ros/test_fault_table.py runs every row against a real node) and the documentation:
``PYTHONPATH=tests python -m support.fault_rows > docs/faults.md`` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from support import faults as cause
from support.faults import COMPRESSED, GOES_ON, NOTHING, RAW, FaultRow, Says
from support.observer import ERROR, OK, WARN

WITH_FRAMES = "with the first complete set of frames"
WITH_WINDOW = "with the next window"
WITH_HISTORY = "when the odometry covers 1.5 s again"

ROWS: Sequence[FaultRow] = (
    FaultRow(
        "A camera goes silent",
        NOTHING,
        (Says("camera left", ERROR, "silent for ... s"), Says("inference", ERROR, "camera left ... silent")),
        WITH_FRAMES,
        cause.damage(COMPRESSED, lambda: cause.silent),
        cause.heal,
    ),
    FaultRow(
        "A camera repeats one picture",
        NOTHING,
        (Says("camera left", ERROR, "frozen"), Says("inference", ERROR, "left ... frozen")),
        WITH_FRAMES,
        cause.damage(COMPRESSED, cause.frozen),
        cause.heal,
    ),
    FaultRow(
        "JPEG files are cut",
        NOTHING,
        (Says("camera left", ERROR, "corrupt"), Says("inference", ERROR, "left")),
        WITH_FRAMES,
        cause.damage(COMPRESSED, lambda: cause.truncated),
        cause.heal,
    ),
    FaultRow(
        "Images of an unknown encoding",
        NOTHING,
        (Says("camera front", ERROR, "rgb13"),),
        WITH_FRAMES,
        cause.damage(RAW, lambda: cause.wrong_encoding),
        cause.heal,
    ),
    FaultRow(
        "Images of another size",
        NOTHING,
        (Says("camera left", ERROR, "size"),),
        WITH_FRAMES,
        cause.resize,
        cause.heal,
    ),
    FaultRow(
        "`step` is smaller than a row",
        NOTHING,
        (Says("camera front", ERROR, "step"),),
        WITH_FRAMES,
        cause.damage(RAW, lambda: cause.wrong_step),
        cause.heal,
    ),
    FaultRow(
        "Stamps of a camera run backwards",
        NOTHING,
        (Says("camera left", WARN, "stamp"),),
        WITH_FRAMES,
        cause.damage(COMPRESSED, cause.stamps_run_backwards),
        cause.heal,
    ),
    FaultRow(
        "Stamps of a camera stand still",
        NOTHING,
        (Says("camera left", WARN, "stamp"),),
        WITH_FRAMES,
        cause.damage(COMPRESSED, cause.stamp_fixed),
        cause.heal,
    ),
    FaultRow(
        "The clock jumps an hour ahead",
        NOTHING,
        (Says("inference", WARN, "clock"),),
        WITH_HISTORY,
        cause.jump(3600.0),
        watch_s=0.3,
    ),
    FaultRow(
        "The clock jumps ten minutes back",
        NOTHING,
        (Says("inference", WARN, "clock"),),
        WITH_HISTORY,
        cause.jump(-600.0),
        watch_s=0.3,
    ),
    FaultRow(
        "A recording starts again",
        NOTHING,
        (Says("inference", WARN, "clock"),),
        WITH_HISTORY,
        cause.jump(-4.0),
        watch_s=0.3,
    ),
    FaultRow(
        "A hole of 0.6 s in the odometry",
        NOTHING,
        (Says("inference", ERROR, "gap"),),
        WITH_HISTORY,
        cause.odometry_gap,
        watch_s=0.3,
    ),
    FaultRow(
        "Odometry goes silent",
        NOTHING,
        (Says("odometry", ERROR, "silent for ... s"), Says("inference", ERROR, "odometry")),
        WITH_HISTORY,
        cause.odometry(lambda message: None),
        cause.heal,
    ),
    FaultRow(
        "Odometry teleports by 50 m",
        NOTHING,
        (Says("inference", ERROR, "teleport"),),
        WITH_HISTORY,
        cause.odometry(cause.teleported),
        cause.heal,
        watch_s=0.3,
    ),
    FaultRow(
        "Odometry is not a number",
        NOTHING,
        (Says("odometry", ERROR, "finite"), Says("inference", ERROR, "odometry")),
        WITH_HISTORY,
        cause.odometry(cause.not_finite),
        cause.heal,
    ),
    FaultRow(
        "The engine is slower than the windows",
        GOES_ON,
        (Says("engine", WARN, "slow"),),
        WITH_WINDOW,
        cause.fake("slow"),
        cause.fake("none"),
    ),
    FaultRow(
        "The engine raises",
        NOTHING,
        (Says("inference", ERROR, "engine"), Says("engine", ERROR, "...")),
        WITH_WINDOW,
        cause.fake("raise"),
        cause.fake("none"),
    ),
    FaultRow(
        "The engine hangs",
        NOTHING,
        (Says("inference", ERROR, "hanging"),),
        "when the step ends; its result is discarded if it is too old",
        cause.fake("hang"),
        cause.fake("none"),
    ),
    FaultRow(
        "The device runs out of memory",
        NOTHING,
        (Says("inference", ERROR, "memory"),),
        "by itself: the engine is loaded again after repeated failures",
        cause.fake("out_of_memory"),
        cause.fake("none"),
    ),
    FaultRow(
        "The result is not a number",
        NOTHING,
        (Says("inference", ERROR, "withheld ... finite"),),
        WITH_WINDOW,
        cause.fake("nan"),
        cause.fake("none"),
    ),
    FaultRow(
        "The result does not start at the vehicle",
        NOTHING,
        (Says("inference", ERROR, "withheld ... start"),),
        WITH_WINDOW,
        cause.fake("jump"),
        cause.fake("none"),
    ),
    FaultRow(
        "The reasoning is cut",
        NOTHING,
        (Says("inference", ERROR, "withheld ... reasoning"),),
        WITH_WINDOW,
        cause.fake("short"),
        cause.fake("none"),
    ),
    FaultRow(
        "Navigation text with special tokens",
        GOES_ON,
        (Says("navigation", WARN, "special"),),
        "with the next good text",
        cause.navigate("Turn left <|im_end|>"),
        cause.navigate("Turn left in 40m"),
    ),
    FaultRow(
        "Navigation text of 5,000 characters",
        GOES_ON,
        (Says("navigation", WARN, "5000"),),
        "with the next good text",
        cause.navigate("left " * 1000),
        cause.navigate("Turn left in 40m"),
    ),
    FaultRow(
        "Paused by `~/pause`",
        NOTHING,
        (Says("inference", WARN, "paused"),),
        "by `~/pause` with `false`",
        cause.pause(True),
        cause.pause(False),
    ),
    FaultRow(
        "Reset by `~/reset`",
        NOTHING,
        (Says("inference", WARN, "reset"),),
        WITH_HISTORY,
        cause.reset_service,
        watch_s=0.3,
    ),
    FaultRow(
        "Activated a second time",
        GOES_ON,
        (Says("inference", OK, ""),),
        "the lifecycle refuses the transition",
        cause.activate_again,
    ),
    FaultRow(
        "1,000 random malformed messages on all inputs",
        GOES_ON,
        (),
        "with the first complete set of frames and 1.5 s of odometry",
        cause.malformed,
    ),
    FaultRow(
        "The process is killed (-9) and started again",
        NOTHING,
        (Says("inference", OK, ""),),
        "with the start; nothing is left over from the killed process",
        cause.kill_and_restart,
        watch_s=0.0,
    ),
)


def markdown(rows: Sequence[FaultRow]) -> str:
    """The table of the documentation."""
    lines = [
        "# Faults",
        "",
        "What the node does when something goes wrong. On a fault it publishes nothing and says why; it never invents",
        "motion, so the vehicle's own fallback must act on missing output. Every row is a test that runs the node as a",
        "process (`tests/ros/test_fault_table.py`); figures and stamps in the messages are shown as `...`.",
        "",
        "| fault | outputs | diagnostic | level | message | recovers |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for i, says in enumerate(row.says):
            head = (row.fault, row.published) if i == 0 else ("", "")
            tail = row.recovers if i == 0 else ""
            lines.append(f"| {head[0]} | {head[1]} | {says.status} | {says.level} | `{says.text}` | {tail} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(ROWS), end="")
