"""Frame buffers, ego history, the worker thread and the checks before publishing; no ROS in here."""
