"""`python -m ray_jobs.push RUN OWNER/NAME [--public] [--license NAME] [--yes]`: uploads a model to the Hugging Face hub, with its card.

Shows what will be uploaded and asks first. A new repository is private unless --public is given.
The token is that of `hf auth login`, or $HF_TOKEN.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import perceiver
from perceiver.config import UserError
from perceiver.inference.card import CARD, check_license, name_card
from perceiver.inference.export import FORMATS, read_config, upload
from perceiver.interop.pretrained import is_hub_name
from perceiver.terminal import CommandParser, add_checkpoint_option, add_trust_option, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.push"), description=summary(__doc__))
    parser.add_argument("run", help="folder or name of a run, or an exported folder, which is uploaded as it is")
    parser.add_argument("name", help="OWNER/NAME on the hub")
    add_checkpoint_option(parser)
    add_trust_option(parser)
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="format, as for `perceiver export`")
    parser.add_argument("--license", help="license of the weights, for the card: apache-2.0, mit, other, ... (default: none is stated)")
    parser.add_argument("--public", action="store_true", help="a new repository is public, not private")
    parser.add_argument("--yes", action="store_true", help="upload without asking")
    args = parser.parse_args(argv)
    refuse_empty(args, ("run", "name"))
    check_license(args.license)
    if not is_hub_name(args.name):
        raise UserError(f"the name on the hub is {args.name!r} and must be OWNER/NAME")
    if not args.yes and not sys.stdin.isatty():
        raise UserError("nobody can be asked here before it is uploaded: say --yes")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.run).expanduser()
        if read_config(folder) is None:
            trained = perceiver.load(args.run, args.checkpoint, device="cpu", trust_code=args.trust_code)
            folder = trained.export(Path(temporary) / "export", format=args.format, license=args.license)
            name_card(folder, args.name)
        elif args.license is not None:
            raise UserError(f"--license is {args.license}, but {folder} is an export already: export again with it, or change its {CARD}")
        _show(folder, args.name, not args.public)
        if not args.yes and input("upload it? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was uploaded")
            return 0
        print(f"uploaded to {upload(folder, args.name, private=not args.public)}", flush=True)
    return 0


def _show(folder: Path, name: str, private: bool) -> None:
    """The files and the card, as they will be on the hub."""
    print(f"to {name}, {'private' if private else 'public'} if it is made now:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name:<24}{path.stat().st_size:>14,} bytes")
    if (card := folder / CARD).is_file():
        print("\n".join(f"  | {line}" for line in card.read_text().splitlines()), flush=True)


if __name__ == "__main__":
    main_entry(main)
