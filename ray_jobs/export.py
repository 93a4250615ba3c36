"""`python -m ray_jobs.export RUN --out FOLDER [--format perceiver|transformers|onnx] [--upload OWNER/NAME]`: writes
a model as files to keep or share.

Needs no Ray: it stands here with the other jobs so that a cluster can run it where the checkpoints lie.
"""

from __future__ import annotations

import perceiver
from perceiver.inference.export import FORMATS, upload
from perceiver.terminal import CommandParser, add_checkpoint_option, add_trust_option, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.export"), description=summary(__doc__).partition("\n\n")[0])
    parser.add_argument("run", help="folder or name of a run, an exported folder, or a name on the hub")
    parser.add_argument("--out", required=True, help="folder to write: a new one, or one that holds an earlier export and nothing else")
    add_checkpoint_option(parser)
    add_trust_option(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="perceiver: the default; transformers: for its from_pretrained; onnx: the default with an ONNX graph",
    )
    parser.add_argument("--license", help="license of the weights, for the card: apache-2.0, mit, other, ... (default: none is stated)")
    parser.add_argument("--upload", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub under this name")
    parser.add_argument("--public", action="store_true", help="a repository made by --upload is public, not private")
    args = parser.parse_args(argv)
    refuse_empty(args, ("run",))
    trained = perceiver.load(args.run, args.checkpoint, device="cpu", trust_code=args.trust_code)
    folder = trained.export(args.out, format=args.format, license=args.license)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{trained.name} written to {folder} ({size / 2**20:,.1f} MiB, format {args.format})", flush=True)
    if args.upload:
        print(f"uploaded to {upload(folder, args.upload, private=not args.public)}", flush=True)
    return 0


if __name__ == "__main__":
    main_entry(main)
