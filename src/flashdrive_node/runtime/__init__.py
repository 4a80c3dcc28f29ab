"""Everything between messages and the engine, without ROS: buffers, decoding, ego history, worker and checks.

    RawImage, OdometrySample -> Pipeline (RingBuffer, EgoHistory, DecodePool, EngineWorker) -> Outcome

``Pipeline`` joins the parts: the ROS node only converts messages, calls it, and publishes what its callback delivers.
Nothing here imports rclpy. Stamps are integer nanoseconds of the ROS clock; ages and durations inside a process are
taken from ``time.monotonic_ns``.
"""
