"""What a recording of the world knows beside its sensors: why the expert drove as it did, and which scene it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flashdrive_node.evaluation.truth import Truth
from flashdrive_node.runtime.bag import BagError, messages, open_bag

#: std_msgs/String, JSON with what `world_bag.truth` gives, ``stamp_ns``, ``split`` and ``index``.
TRUTH_TOPIC = "/ground_truth/reasoning"


def read_truth(bag: Path) -> Truth | None:
    """The truth in a recording; None where it has none.

    Raises:
        BagError: The recording cannot be read, or its truth is not of this form.
    """
    with open_bag(bag) as reader:
        wanted = [c for c in reader.connections if c.topic == TRUTH_TOPIC]
        if not wanted:  # asked for no topic, the reader would give all of them
            return None
        texts: list[Any] = [reader.deserialize(raw, c.msgtype) for c, _, raw in messages(reader, wanted)]
    try:
        rows = sorted((json.loads(text.data) for text in texts), key=lambda row: row["stamp_ns"])
        stamps = np.array([row["stamp_ns"] for row in rows], np.int64)
        sentences = tuple(str(row["sentence"]) for row in rows)
        return Truth(str(rows[0]["split"]), int(rows[0]["index"]), stamps, sentences)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BagError(f"{bag}: {TRUTH_TOPIC} must hold JSON of a world's recording ({error!r})") from error
