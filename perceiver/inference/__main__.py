"""`python -m perceiver.inference RUN [PROMPT ...]`: tries a trained model on a prompt to continue, a
sentence with <mask>, a text or an image.

Without a prompt it asks for one line after another, until an empty line or the end of the input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import perceiver
from perceiver.config import UserError
from perceiver.generation.options import GenerationOptions, add_generation_options, given_generation_options, named_as_typed
from perceiver.inference.trained import TrainedModel
from perceiver.terminal import CommandParser, add_checkpoint_option, add_trust_option, print_anything


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a user's mistake is one line and exit status 2 (in a dialogue: one line, and the next
    question).
    """
    print_anything()
    args = parse(argv)
    try:
        if args.action is None or args.action == "generate":  # before the weights are read
            with named_as_typed():
                GenerationOptions(**given_generation_options(args)).check()
        model = perceiver.load(args.run, args.checkpoint, device=args.device, precision=args.precision, trust_code=args.trust_code)
        action = args.action or next(iter(model.abilities), "")
        if action in model.abilities and action not in ACTIONS:
            raise UserError(f"{model.name} takes no prompt here: run `perceiver {action} {args.run}`")
        if action not in model.abilities:
            getattr(model, action or "generate")("")
        print(f"{model.name}: {action}, on {model.device}", file=sys.stderr)
        for number, prompt in enumerate(args.prompt):
            ACTIONS[action](model, prompt, args, number)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.prompt:
        for number, prompt in enumerate(ask(HINTS[action])):
            try:
                ACTIONS[action](model, prompt, args, number)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    return 0


def _program() -> str:
    """How this was started: by a command of `perceiver`, or as a module."""
    started = Path(sys.argv[0]).name
    return f"perceiver {sys.argv[1]}" if started == "perceiver" and len(sys.argv) > 1 else "python -m perceiver.inference"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    words = sys.argv[1:] if argv is None else argv
    chosen = words[1] if words[:1] == ["--action"] and len(words) > 1 else None  # as the commands of `perceiver` begin
    parser = CommandParser(prog=_program(), description=f"{DESCRIPTIONS.get(chosen or '', DESCRIPTION)} {DIALOGUE}")
    parser.add_argument("run", help="folder or name of a run, an exported folder, published weights, or a name on the hub")
    parser.add_argument("prompt", nargs="*", help=f"{PROMPTS.get(chosen or '', 'texts or image files')}; none: ask for them")
    action = argparse.SUPPRESS if chosen in ACTIONS else "what to do (default: what the model was trained for)"
    parser.add_argument("--action", choices=ACTIONS, help=action)
    add_checkpoint_option(parser)
    add_trust_option(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of weights and computation")
    if chosen == "fill_mask":
        parser.add_argument("--top-k", type=int, help="number of predictions for each text (5)")
    else:
        top_k = "sample only from the k most likely tokens"
        top_k += "" if chosen == "generate" else "; number of predicted fills (5) or classes (3)"
        add_generation_options(parser, GenerationOptions(temperature=0.8), top_k)
    return parser.parse_args(words)


def ask(hint: str) -> Iterator[str]:
    """Lines that a person types."""
    while True:
        try:
            line = input(f"{hint}> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        yield line


def _generate(model: TrainedModel, prompt: str, args: argparse.Namespace, number: int) -> None:
    pieces = model.stream(prompt, row_id=number, **given_generation_options(args))
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _fill_mask(model: TrainedModel, text: str, args: argparse.Namespace, number: int) -> None:
    for fill in model.fill_mask(text, top_k=5 if args.top_k is None else args.top_k):
        print(f"{fill.probability:8.2%}  {fill.text}")


def _classify(model: TrainedModel, value: str, args: argparse.Namespace, number: int) -> None:
    probabilities = model.classify(value).probabilities
    ranking = sorted(zip(probabilities, model.class_names, strict=True), reverse=True)
    print("  ".join(f"{name} {probability:.2%}" for probability, name in ranking[: 3 if args.top_k is None else args.top_k]))


def _score(model: TrainedModel, text: str, args: argparse.Namespace, number: int) -> None:
    score = model.score(text)
    print(f"loss {score.loss:.4f} nats a token, {score.bits_per_byte:.4f} bits a byte, {score.tokens:,} tokens")


ACTIONS: dict[str, Callable[[TrainedModel, str, argparse.Namespace, int], None]] = {
    "generate": _generate,
    "fill_mask": _fill_mask,
    "classify": _classify,
    "score": _score,
}
DESCRIPTION = "Tries a trained model on a prompt to continue, a sentence with <mask>, a text or an image."
DESCRIPTIONS = {"generate": "Continues texts.", "fill_mask": "Fills in the words that <mask> stands for."}
DIALOGUE = "Without a prompt it asks for one line after another, until an empty line or the end of the input."
PROMPTS = {"generate": "texts to continue", "fill_mask": "texts with <mask>"}
HINTS = {"generate": "prompt", "fill_mask": "text with <mask>", "classify": "text or image file", "score": "text"}


if __name__ == "__main__":
    sys.exit(main())
