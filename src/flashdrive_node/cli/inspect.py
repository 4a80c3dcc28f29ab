"""``flashdrive inspect``: what a checkpoint is and needs, from its configuration and file headers alone."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from flashdrive_node.model.base_check import compare_with_base
from flashdrive_node.model.checkpoint_files import check_tensors, survey
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import CheckpointError, ConfigError
from flashdrive_node.model.footprint import (
    PARTS,
    PRECISIONS,
    cache_bytes_per_token,
    cache_tokens,
    part_of,
    weight_bytes,
)
from flashdrive_node.model.images import target_size
from flashdrive_node.model.presets import PROMPT_TEXT_TOKENS
from flashdrive_node.model.prompt import driving_prompt
from flashdrive_node.model.quantised_files import CONFIG_KEY, find_quantised
from flashdrive_node.model.source import read_config, resolve_source, snapshot_revision, tokenizer_directory
from flashdrive_node.model.state_dict import release_slots
from flashdrive_node.model.tokenizer import load_tokenizer

#: The standard window: cameras by index, frames of each, and the frames' height and width in pixels.
CAMERAS, FRAMES, FRAME_SIZE = (0, 1, 2, 6), 4, (1080, 1920)
SAMPLES = (1, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("checkpoint", help="checkpoint directory, or a Hugging Face id in the local cache")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--allow-download", action="store_true", help="fetch what the local Hugging Face cache lacks")
    parser.add_argument(
        "--base", metavar="DIR", help="of a quantised checkpoint: the plain one that it was made from, to compare with"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0, or 1 where the checkpoint has problems."""
    directory = resolve_source(args.checkpoint, args.revision, args.allow_download)
    base = resolve_source(args.base, None, args.allow_download) if args.base else None
    report = examine(directory, args.allow_download, base)
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if report["problems"] else 0


def examine(directory: Path, allow_download: bool = False, base: Path | None = None) -> dict[str, Any]:
    """Everything that `inspect` reports, ready for JSON; sizes in bytes. Problems are listed, not raised.

    Args:
        directory: The checkpoint.
        allow_download: Fetch the backbone's files where the local cache lacks them.
        base: Checkpoint that a quantised one is compared with.
    """
    files = survey(directory)
    report: dict[str, Any] = {
        "checkpoint": str(directory),
        "revision": snapshot_revision(directory),
        "files": [{"name": h.path.name, "bytes": h.file_bytes, "tensors": len(h.entries)} for h in files.headers],
        "parts": _parts({name: entry for name, (_, entry) in files.tensors.items()}),
        "problems": list(files.problems),
    }
    try:
        config = read_config(directory, allow_download)
    except (ConfigError, CheckpointError) as error:
        report["problems"] += [f"{error.where}: {problem}" for problem in error.problems]
        return report
    quantised = find_quantised(files, release_slots(config), config.raw.get(CONFIG_KEY))
    report["problems"] += quantised.problems + check_tensors(files, quantised.slots, quantised.ignored)
    if quantised.layout is not None:
        report["quantised"] = {"layout": quantised.layout.name, "layers": len(quantised.matrices)}
    if base is not None and not report["problems"]:
        try:
            report["base"] = asdict(compare_with_base(files, quantised, base))
        except CheckpointError as error:
            report["problems"] += [f"{error.where}: {problem}" for problem in error.problems]
    report["model_type"] = config.model_type
    report["architecture"] = _architecture(config)
    image, prompt_tokens = _standard_prompt(config)
    try:
        source = tokenizer_directory(directory, config, allow_download)
        tokenizer = load_tokenizer(source, config)
        grid = (image.height // config.vision.patch_size, image.width // config.vision.patch_size)
        prompt_tokens = len(driving_prompt(tokenizer, config, CAMERAS, FRAMES, [grid] * len(CAMERAS) * FRAMES).ids)
        report["tokenizer"] = {
            "directory": str(source),
            "vocabulary": config.tokens.vocab_size,
            "first_trajectory_token": config.tokens.traj_token_start,
            "trajectory_tokens": config.tokens.traj_vocab_size,
            "first_history_token": config.tokens.history_token_start,
        }
    except (ConfigError, CheckpointError) as error:
        report["problems"] += [f"{error.where}: {problem}" for problem in error.problems]
    report["prompt"] = {"tokens": prompt_tokens, **image._asdict()}
    report["memory"] = _memory(config, prompt_tokens)
    return report


class _Image(NamedTuple):
    """A frame as the vision tower takes it."""

    height: int
    width: int
    image_tokens: int


def _standard_prompt(config: AlpamayoConfig) -> tuple[_Image, int]:
    """One frame of the standard window, and the prompt's tokens where its text is tokenised as in the release."""
    factor = config.vision.resize_factor
    height, width = target_size(*FRAME_SIZE, config.min_pixels, config.max_pixels, factor)
    image = _Image(height, width, height * width // factor**2)
    text = PROMPT_TEXT_TOKENS[config.model_type] + config.tokens_per_history_traj
    return image, len(CAMERAS) * FRAMES * image.image_tokens + text


def _parts(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Tensors, parameters and bytes of each part, as found in the files."""
    rows = []
    for part in [*PARTS, "other"]:
        own = [entry for name, entry in entries.items() if part_of(name) == part]
        if own:
            types = Counter(entry.dtype for entry in own)
            parameters = sum(entry.elements for entry in own)
            size = sum(entry.nbytes for entry in own)
            rows.append(
                {"part": part, "tensors": len(own), "parameters": parameters, "bytes": size, "types": dict(types)}
            )
    return rows


def _architecture(config: AlpamayoConfig) -> dict[str, dict[str, Any]]:
    return {
        "vision": asdict(config.vision),
        "text": asdict(config.text),
        "expert": asdict(config.expert),
        "action_in_proj": asdict(config.action_in_proj),
        "flow": asdict(config.flow),
        "action_space": {"n_waypoints": config.action_space.n_waypoints, "dt_s": config.action_space.dt},
        "prompt": {
            "history_poses": config.history_poses,
            "camera_names": config.include_camera_ids,
            "frame_numbers": config.include_frame_nums,
            "navigation": config.supports_navigation,
            "min_pixels": config.min_pixels,
            "max_pixels": config.max_pixels,
        },
    }


def _memory(config: AlpamayoConfig, prompt_tokens: int) -> dict[str, Any]:
    slots = release_slots(config)
    tokens = {str(n): cache_tokens(config, prompt_tokens, n) for n in SAMPLES}
    rows = []
    for precision in PRECISIONS:
        per_token = cache_bytes_per_token(config, precision.plain_bytes)
        cache = {n: per_token * count for n, count in tokens.items()}
        weights = weight_bytes(slots, precision)
        rows.append({"precision": precision.name, "weight_bytes": weights, "cache_bytes": cache})
    return {"cache_bytes_per_token": cache_bytes_per_token(config), "cache_tokens": tokens, "precisions": rows}


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"Checkpoint  {report['checkpoint']}"]
    if report["revision"]:
        lines.append(f"Revision    {report['revision']}")
    if "model_type" in report:
        lines.append(f"Model       {report['model_type']}")
        if "quantised" in report:
            packed = report["quantised"]
            lines.append(f"4 bits      {packed['layers']} layers, layout {packed['layout']}")
        if "base" in report:
            base = report["base"]
            lines.append(f"Base        {base['matrix']} is {100 * base['relative_error']:.1f} % away from it")
        lines += ["", "Architecture"]
        for name, part in report["architecture"].items():
            text = ", ".join(f"{key} {_plain(value)}" for key, value in part.items())
            lines += textwrap.wrap(text, 110, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
    rows = [[f["name"], f"{f['tensors']:,}", _size(f["bytes"])] for f in report["files"]]
    lines += ["", "Files", *_table(["name", "tensors", "size"], rows)]
    rows = [
        [p["part"], f"{p['tensors']:,}", f"{p['parameters']:,}", _size(p["bytes"]), ", ".join(p["types"])]
        for p in report["parts"]
    ]
    totals = [sum(p[key] for p in report["parts"]) for key in ("tensors", "parameters", "bytes")]
    rows.append(["all", f"{totals[0]:,}", f"{totals[1]:,}", _size(totals[2]), ""])
    lines += ["", "Tensors", *_table(["part", "tensors", "parameters", "size", "types"], rows)]
    if "tokenizer" in report:
        lines += ["", *_tokenizer_lines(report["tokenizer"])]
    if "memory" in report:
        lines += ["", *_memory_lines(report["memory"], report["prompt"])]
    problems = report["problems"]
    lines += ["", f"Problems ({len(problems)})" if problems else "No problems found.", *(f"  - {p}" for p in problems)]
    return "\n".join(lines)


def _tokenizer_lines(t: dict[str, Any]) -> list[str]:
    last = t["first_trajectory_token"] + t["trajectory_tokens"] - 1
    return [
        f"Tokenizer   {t['directory']}",
        f"  {t['vocabulary']:,} ids, of which {t['first_trajectory_token']} to {last} are trajectory tokens "
        f"(ego history from {t['first_history_token']})",
    ]


def _memory_lines(memory: dict[str, Any], prompt: dict[str, Any]) -> list[str]:
    rows = []
    for row in memory["precisions"]:
        totals = (_size(row["weight_bytes"] + row["cache_bytes"][str(n)]) for n in SAMPLES)
        rows.append([row["precision"], _size(row["weight_bytes"]), *totals])
    per_token = memory["cache_bytes_per_token"]
    cache = ", ".join(f"{_size(per_token * memory['cache_tokens'][str(n)])} at {_samples(n)}" for n in SAMPLES)
    return [
        "Memory of weights and key/value cache (activations and the CUDA context come on top)",
        *_table(["precision", "weights", *(f"with cache, {_samples(n)}" for n in SAMPLES)], rows),
        f"  cache: {per_token:,} bytes per token in bfloat16, twice that beside float32 weights; {cache}",
        f"  window: {len(CAMERAS)} cameras x {FRAMES} frames of {FRAME_SIZE[1]} x {FRAME_SIZE[0]}, resized to "
        f"{prompt['width']} x {prompt['height']} ({prompt['image_tokens']} tokens each);",
        f"    a prompt of {prompt['tokens']:,} tokens takes {_size(per_token * prompt['tokens'])} of cache",
        "  fp8: text layers, vision tower and action expert, with lm_head in int8; w4a8, w4a16: text layers in 4 bits;",
        "    embeddings, norms and the projections of actions and patches stay in bfloat16",
    ]


def _samples(n: int) -> str:
    return f"{n} sample{'s'[: n - 1]}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as they must be; all but the first and any text column flush right."""
    table = ([head] if head else []) + rows
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))] if table else []
    right = [i > 0 and all(row[i][:1].isdigit() for row in rows) for i in range(len(widths))]
    return [
        "  " + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in table
    ]


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _size(n: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"
