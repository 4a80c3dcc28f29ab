"""``flashdrive world``: pictures and recordings of the procedural world, and how its expert drives."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import cv2

from flashdrive_node.model.errors import InputError
from flashdrive_node.world.draws import SPLITS
from flashdrive_node.world.scene import DT_S, Scenario
from flashdrive_node.world.sheet import contact_sheet
from flashdrive_node.world.survey import survey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--split", choices=sorted(SPLITS), default="validation", help="scenes (default: validation)")
    common.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    names = [s.name.lower() for s in Scenario]

    sheet = actions.add_parser("sheet", parents=[common], help="draw every scenario as every camera sees it")
    sheet.add_argument("out", type=Path, metavar="PNG", help="picture to write (.png or .jpg)")
    sheet.add_argument("--scenarios", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    sheet.add_argument("--first", type=int, default=0, help="index of the first scene that is tried (default: 0)")
    sheet.add_argument("--size", default="288x160", help="width x height of every picture (default: 288x160)")
    sheet.add_argument("--samples", type=int, default=2, help="rays per pixel and side (default: 2)")

    stats = actions.add_parser("stats", parents=[common], help="let the expert drive many scenes, and count")
    stats.add_argument("--scenes", type=int, default=3000, help="how many (default: 3000)")
    stats.add_argument("--seconds", type=float, default=20.0, help="length of a drive (default: 20)")
    stats.add_argument("--filtered", action="store_true", help="only scenes that the expert masters, as in a data set")
    stats.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well")

    recorded = actions.add_parser("record", parents=[common], help="write the drive of one scene as a rosbag2 (MCAP)")
    recorded.add_argument("out", type=Path, metavar="DIR", help="the bag to write; must not exist")
    recorded.add_argument("--index", type=int, help="index of the scene (default: the most varied daylight drive)")
    recorded.add_argument("--search", type=int, default=1000, help="of so many scenes, without --index (default: 1000)")
    recorded.add_argument("--seconds", type=float, default=20.0, help="length of the drive (default: 20)")
    recorded.add_argument("--rig", default="sample", help="name or file of the camera rig (default: sample)")
    recorded.add_argument("--size", default="576x320", help="width x height of every picture (default: 576x320)")
    recorded.add_argument("--samples", type=int, default=2, help="rays per pixel and side (default: 2)")
    recorded.add_argument("--quality", type=int, default=85, help="of the JPEG files, 1 to 100 (default: 85)")
    recorded.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Write the sheet or the recording, or print the table."""
    return {"sheet": _sheet, "stats": _stats, "record": _record}[args.action](args)


def _record(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from flashdrive_node.evaluation.varied_scene import most_varied_scene
    from flashdrive_node.evaluation.world_bag import PictureSettings, SceneChoice, truth, write_world_bag
    from flashdrive_node.runtime.rig import load_rig

    width, height = _size(args.size)
    if not 1 <= args.quality <= 100 or args.samples < 1 or args.seconds < DT_S or args.search < 1:
        raise InputError(
            "--quality 1 to 100, --samples and --search of 1 or more, and --seconds of a step of 0.1 s or more are "
            f"required, found {args.quality}, {args.samples}, {args.search} and {args.seconds:g}"
        )
    rig, index, steps = load_rig(args.rig), args.index, round(args.seconds / DT_S)
    if index is None:
        with tqdm(total=args.search, desc="searching", unit="scene", disable=args.quiet) as bar:
            index = most_varied_scene(args.split, args.search, steps, lambda tried: bar.update(tried - bar.n))
    choice = SceneChoice(args.split, index, args.seconds)
    pictures = PictureSettings(width, height, args.samples, args.quality, args.device)
    with tqdm(total=steps, desc="rendering", unit="step", disable=args.quiet) as bar:
        episode = write_world_bag(args.out, rig, choice, pictures, on_progress=lambda step: bar.update(step - bar.n))
    causes = Counter(truth(episode, step)["cause"] for step in range(steps))
    print(f"{args.out}: scene {index} of {args.split}, {args.seconds:g} s, {_megabytes(args.out):.2f} MB")
    print("seconds by cause: " + ", ".join(f"{name.lower()} {n * DT_S:.1f}" for name, n in causes.most_common()))
    return 0


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in text.split("x"))
    except ValueError:
        raise InputError(f"--size: WIDTHxHEIGHT is required, such as 288x160, found {text!r}") from None
    if width < 8 or width % 8 or height < 8:
        raise InputError(f"--size: a width that is a multiple of 8 and sides of 8 or more are required, found {text}")
    return width, height


def _sheet(args: argparse.Namespace) -> int:
    width, height = _size(args.size)
    if args.samples < 1 or args.first < 0:
        raise InputError(f"--samples must be at least 1 and --first 0, found {args.samples} and {args.first}")
    if args.out.suffix.lower() not in (".png", ".jpg"):
        raise InputError(f"a picture that ends in .png or .jpg is required, found {args.out}")
    chosen = [Scenario[name.upper()] for name in args.scenarios]
    started = time.monotonic()
    sheet = contact_sheet(chosen, args.split, args.first, width, height, samples=args.samples, device=args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85] if args.out.suffix.lower() == ".jpg" else []
    if not cv2.imwrite(str(args.out), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), quality):
        raise OSError(f"{args.out}: the picture could not be written")
    print(f"{args.out}: {len(chosen)} scenarios x 4 cameras, {time.monotonic() - started:.1f} s")
    return 0


def _stats(args: argparse.Namespace) -> int:
    if args.scenes < 1 or args.seconds < DT_S:
        raise InputError(f"--scenes and --seconds must be positive, found {args.scenes} and {args.seconds}")
    started = time.monotonic()
    counts = survey(args.split, args.scenes, round(args.seconds / DT_S), device=args.device, filtered=args.filtered)
    print("\n".join(counts.rows()))
    print(f"\n{time.monotonic() - started:.1f} s on {args.device}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
    return 0
