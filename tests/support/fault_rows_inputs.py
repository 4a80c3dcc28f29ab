"""Rows of the fault table: what goes wrong in the cameras, the clock and the odometry."""

from __future__ import annotations

from collections.abc import Sequence

from support import faults as cause
from support.faults import COMPRESSED, GOES_ON, NOTHING, RAW, FaultRow, Says
from support.observer import ERROR, WARN

WITH_FRAMES = "with the first complete set of frames"
WITH_WINDOW = "with the next window"
WITH_HISTORY = "when the odometry covers 1.5 s again"

INPUT_ROWS: Sequence[FaultRow] = (
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
        "A camera sends five times as fast as the rig says",
        GOES_ON,
        (Says("camera left", WARN, "... Hz, 10 Hz are expected (do two drivers publish it?)"),),
        WITH_FRAMES,
        cause.second_driver,
        cause.heal,
        keeps_stream=True,
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
)
