"""`perceiver flow RUN FRAME FRAME ... --out FOLDER`: the optical flow of frames, as .flo files and as pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perceiver.config import UserError
from perceiver.terminal import CommandParser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a user's mistake is one line and exit status 2."""
    args = _parse(argv)
    try:
        for number, written in enumerate(_run(args), 1):
            print(f"{number:,} of {len(args.frames) - 1:,}: {written}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> Iterator[str]:
    if len(args.frames) < 2:
        raise UserError(f"{args.frames[0]} is one frame, and a flow is from one to the next: give at least two, in order")
    stems = [Path(frame).stem for frame in args.frames[:-1]]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise UserError(f"two frames are called {twice}, and their flows would have one name: rename them")
    out = Path(args.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {args.out} is a file and must be a folder")
    if missing := next((frame for frame in args.frames if not Path(frame).expanduser().is_file()), None):
        raise UserError(f"there is no image file {missing}")
    import perceiver
    from perceiver.data.flow_formats import write_flo
    from perceiver.data.make_flow import as_png
    from perceiver.tasks.flow_pictures import flow_picture

    model = perceiver.load(args.run, args.checkpoint, device=args.device, trust_code=args.trust_code)
    out.mkdir(parents=True, exist_ok=True)
    for stem, pair in zip(stems, zip(args.frames, args.frames[1:], strict=False), strict=True):
        flow = model.flow(pair, batch_size=args.batch_size)
        (out / f"{stem}.flo").write_bytes(write_flo(flow))
        (out / f"{stem}.png").write_bytes(as_png(flow_picture(flow)[0]))
        length = np.linalg.norm(flow, axis=-1)
        yield f"{out / stem}.flo and .png, {length.mean():.2f} pixels on average, {length.max():.1f} at most"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="perceiver flow", description="Writes the optical flow from each frame to the next as a .flo file and as a picture."
    )
    parser.add_argument("run", help="folder or name of a run, an exported folder, or published weights")
    parser.add_argument("frames", nargs="+", help="image files of one size, in order")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write, for each frame but the last, .flo and .png")
    parser.add_argument("--batch-size", type=int, default=4, help="parts of a frame computed at once (%(default)s)")
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a step; best:ema and so on are averaged weights")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--trust-code", action="store_true", help="run the code saved with the run although it has never been run from this account"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
