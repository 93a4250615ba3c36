"""`python -m perceiver.inference.play RUN [PROMPT.mid] --out FILE.mid`: what a model of symbolic audio plays, as a MIDI file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from perceiver.config import UserError
from perceiver.terminal import CommandParser, add_checkpoint_option, add_trust_option


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a user's mistake is one line and exit status 2."""
    args = _parse(argv)
    try:
        out = _check_out(args.out)
        from perceiver.data.midi import decode, write_midi
        from perceiver.generation.generate import new_seed
        from perceiver.generation.options import Sampling

        seed = new_seed() if args.seed is None else args.seed
        Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed).check()
        import perceiver

        model = perceiver.load(args.run, args.checkpoint, device=args.device, trust_code=args.trust_code)
        events = model.play(
            args.prompt or None, max_new_tokens=args.events, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed
        )
        try:
            out.write_bytes(write_midi(events))
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror})") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    notes = decode(events)
    print(f"{out}: {len(notes):,} notes, {max((note.end for note in notes), default=0.0):.1f} s, seed {seed}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="perceiver play", description="Continues a MIDI file, or starts from nothing, and writes the result as a new MIDI file."
    )
    parser.add_argument("run", help="folder or name of a run, an exported folder, or published weights")
    parser.add_argument("prompt", nargs="?", help="MIDI file to continue; none: begin from nothing")
    parser.add_argument("--out", required=True, metavar="FILE.mid", help="where to write the prompt and its continuation")
    parser.add_argument("--events", type=int, default=1024, help="events to add (%(default)s); a note takes about four")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely event (%(default)s)")
    parser.add_argument("--top-k", type=int, help="sample only from the k most likely events")
    parser.add_argument("--top-p", type=float, help="sample only from the smallest set of most likely events with this total probability")
    parser.add_argument("--seed", type=int, help="seed of the sampling (default: a different one each time)")
    add_checkpoint_option(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add_trust_option(parser)
    return parser.parse_args(argv)


def _check_out(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".mid", ".midi"):
        raise UserError(f"--out {name} must end in .mid")
    if not path.parent.is_dir():
        raise UserError(f"--out {name}: there is no folder {path.parent}")
    return path


if __name__ == "__main__":
    sys.exit(main())
