"""Log records of the layers below, which know no ROS, in the node's log and on /rosout."""

from __future__ import annotations

import logging

from rclpy.impl.rcutils_logger import RcutilsLogger


class RosHandler(logging.Handler):
    """Hands the records of Python's ``logging`` to a ROS logger; may be called from any thread."""

    def __init__(self, logger: RcutilsLogger):
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record at the ROS level that corresponds to its own."""
        text = self.format(record)
        # One call site per level: rclpy refuses a call site that changes its level.
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)


def forward_logs(logger: RcutilsLogger) -> RosHandler:
    """Send everything that this package logs to a ROS logger; returns the handler, to be removed with the node."""
    handler = RosHandler(logger)
    package = logging.getLogger("flashdrive_node")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    return handler
