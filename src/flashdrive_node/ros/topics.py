"""Names of what the node publishes and offers; its inputs are named by ``runtime.rig``."""

from __future__ import annotations

NODE_NAME = "flashdrive_node"

PATH = "~/output/path"
TRAJECTORY = "~/output/trajectory"
TRAJECTORY_SAMPLES = "~/output/trajectory_samples"
REASONING = "~/output/reasoning"
RECORD = "~/output/record"
MARKERS = "~/debug/markers"
TIMING = "~/debug/timing"
DIAGNOSTICS = "/diagnostics"

RESET = "~/reset"
PAUSE = "~/pause"
