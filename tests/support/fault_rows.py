"""The fault table: what goes wrong, what the node then publishes and says, and how it recovers.

One list serves the tests (tests/ros/test_fault_table.py runs every row against a real node) and the documentation:
``PYTHONPATH=tests python -m support.fault_rows > docs/faults.md`` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from support import faults as cause
from support.faults import COMPRESSED, GOES_ON, NOTHING, RAW, FaultRow, Says, markdown
from support.observer import ERROR, OK, WARN

WITH_FRAMES = "with the first complete set of frames"
WITH_WINDOW = "with the next window"
WITH_HISTORY = "when the odometry covers 1.5 s again"

ROWS: Sequence[FaultRow] = (
    FaultRow(
        "A camera goes silent",
        NOTHING,
        (
            Says("camera left", ERROR, "silent for ... s"),
            Says("inference", ERROR, "no window: camera left has been silent for ... s"),
        ),
        WITH_FRAMES,
        cause.damage(COMPRESSED, lambda: cause.silent),
        cause.heal,
    ),
    FaultRow(
        "A camera repeats one picture",
        NOTHING,
        (
            Says("camera left", ERROR, "frozen: it repeats one picture"),
            Says("inference", ERROR, "no window: camera left repeats the same picture in all frames of the window"),
        ),
        WITH_FRAMES,
        cause.damage(COMPRESSED, cause.frozen),
        cause.heal,
    ),
    FaultRow(
        "JPEG files are cut",
        NOTHING,
        (
            Says("camera left", ERROR, "JPEG of ... bytes is cut off: it must end with an end-of-image marker"),
            Says(
                "inference",
                ERROR,
                "no window: camera left ... JPEG of ... bytes is cut off: it must end with an end-of-image marker",
            ),
        ),
        WITH_FRAMES,
        cause.damage(COMPRESSED, lambda: cause.truncated),
        cause.heal,
    ),
    FaultRow(
        "Images of an unknown encoding",
        NOTHING,
        (
            Says("camera front", ERROR, "encoding must be one of rgb8, ..., found 'rgb13'"),
            Says("inference", ERROR, "no window: camera front ... encoding must be one of ..., found 'rgb13'"),
        ),
        WITH_FRAMES,
        cause.damage(RAW, lambda: cause.wrong_encoding),
        cause.heal,
    ),
    FaultRow(
        "Images of another size",
        NOTHING,
        (
            Says("camera left", ERROR, "image must be 160 x 96 pixels, found 320 x 192"),
            Says("inference", ERROR, "no window: camera left ... image must be 160 x 96 pixels, found 320 x 192"),
        ),
        WITH_FRAMES,
        cause.resize,
        cause.heal,
    ),
    FaultRow(
        "`step` is smaller than a row",
        NOTHING,
        (
            Says("camera front", ERROR, "step of rgb8 must be at least 160 x 3 = 480 bytes, found 475"),
            Says(
                "inference",
                ERROR,
                "no window: camera front ... step of rgb8 must be at least 160 x 3 = 480 bytes, found 475",
            ),
        ),
        WITH_FRAMES,
        cause.damage(RAW, lambda: cause.wrong_step),
        cause.heal,
    ),
    FaultRow(
        "Stamps of a camera run backwards",
        NOTHING,
        (
            Says("camera left", ERROR, "stamps do not increase: the last ... came before the newest one"),
            Says(
                "inference",
                ERROR,
                "no window: camera left has been silent for ... s; refused: stamps do not increase: ...",
            ),
        ),
        WITH_FRAMES,
        cause.damage(COMPRESSED, cause.stamps_run_backwards),
        cause.heal,
    ),
    FaultRow(
        "Stamps of a camera stand still",
        NOTHING,
        (
            Says("camera left", ERROR, "image at ... s dropped: duplicate"),
            Says(
                "inference",
                ERROR,
                "no window: camera left has been silent for ... s; refused: image at ... s dropped: duplicate",
            ),
        ),
        WITH_FRAMES,
        cause.damage(COMPRESSED, cause.stamp_fixed),
        cause.heal,
    ),
    FaultRow(
        "The clock jumps an hour ahead",
        NOTHING,
        (Says("inference", WARN, "starting: reset by clock_jump: the clock jumped by +3600... s; ..."),),
        WITH_HISTORY,
        cause.jump(3600.0),
        watch_s=0.3,
    ),
    FaultRow(
        "The clock jumps ten minutes back",
        NOTHING,
        (Says("inference", WARN, "starting: reset by clock_jump: the clock jumped by -599... s; ..."),),
        WITH_HISTORY,
        cause.jump(-600.0),
        watch_s=0.3,
    ),
    FaultRow(
        "A recording starts again",
        NOTHING,
        (Says("inference", WARN, "starting: reset by clock_jump: the clock jumped by -... s; ..."),),
        WITH_HISTORY,
        cause.jump(-4.0),
        watch_s=0.3,
    ),
    FaultRow(
        "The player pauses",
        NOTHING,
        (Says("inference", ERROR, "no window: ..."),),
        "with the next window, without a reset",
        cause.stop_playback,
        cause.resume_playback,
        keeps_stream=True,
    ),
    FaultRow(
        "A hole of 0.6 s in the odometry",
        NOTHING,
        (
            Says("odometry", ERROR, "silent for ... s"),
            Says("inference", ERROR, "no window: odometry has a gap of ... s (at most 0.25 s) after ... s"),
        ),
        WITH_HISTORY,
        cause.odometry_gap,
        watch_s=0.3,
    ),
    FaultRow(
        "Odometry goes silent",
        NOTHING,
        (
            Says("odometry", ERROR, "silent for ... s"),
            Says("inference", ERROR, "no window: newest odometry is ... ms older than the newest frame"),
        ),
        WITH_HISTORY,
        cause.odometry(lambda message: None),
        cause.heal,
    ),
    FaultRow(
        "Odometry teleports by 50 m",
        NOTHING,
        (Says("inference", ERROR, "no window: odometry moved ... m within ... ms at ... s (at most 70 m/s)"),),
        WITH_HISTORY,
        cause.odometry(cause.teleported),
        cause.heal,
        watch_s=0.3,
    ),
    FaultRow(
        "Odometry is not a number",
        NOTHING,
        (
            Says("odometry", ERROR, "odometry at ... s has a value that is not finite"),
            Says(
                "inference",
                ERROR,
                "no window: newest odometry is ... ms older than the newest frame; refused: odometry at ... s has a "
                "value that is not finite",
            ),
        ),
        WITH_HISTORY,
        cause.odometry(cause.not_finite),
        cause.heal,
    ),
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
        (
            Says("inference", WARN, "starting: reset by activated; ..."),
            Says("inference", OK, "running: ..."),
        ),
        "with the start, when discovery has found the new process (a few seconds)",
        cause.kill_and_restart,
        watch_s=0.0,
    ),
)


if __name__ == "__main__":
    print(markdown(ROWS), end="")
