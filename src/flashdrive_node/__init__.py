"""A real-time ROS 2 driving node around the Alpamayo reasoning driving model.

Layers, none of which imports from one further down this list:

``model``    the networks, their checkpoints, the prompt and the action space
``engine``   what turns an observation into a prediction, and its state between calls
``runtime``  frame buffers, ego history, the worker thread, checks before publishing (no ROS)
``ros``      the node: the only place that imports rclpy and message packages
``world``, ``evaluation``   beside them: a procedural driving world; parity, benchmarks, reports
``cli``      the ``flashdrive`` command
"""

__version__ = "0.1.0"
