"""`python -m ray_jobs.predict RUN --input FILES --output OUTPUT [--mode MODE]`: applies a trained model to many inputs,
on Ray Data.

Modes: classify, flow, fill-mask, embed (mean of the latents), score (loss of each document), generate, play (continues MIDI files), and
predict (tables, and tasks of your own). Inputs are lines of .txt files, objects of .jsonl or .json files, rows of .csv, .tsv, .parquet and
.arrow files (in which a column may have the bytes or the path of an image or sound), folders of datasets.save_to_disk, image, sound or
MIDI files, images in .tar (WebDataset) or idx files, or, for flow, pairs of frames: those to which .flo files belong, else img1 and img2
of the same name, else consecutive numbers. OUTPUT is a file (.csv, .jsonl or .parquet) with exactly one row for each input row, in order,
with its id, or a folder with such rows as several Parquet files, and _errors.jsonl with the rows that could not be computed. A job that
was stopped continues when it is started again: parts that have been written are not computed again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import DataConfig, ParallelConfig, UserError
from perceiver.data.rows import KINDS
from perceiver.data.storage import atomic_file, list_folder, remove_folder
from perceiver.disk import local_folder
from perceiver.generation.options import add_generation_options, given_generation_options, named_as_typed
from perceiver.inference.frames import FRAMES
from perceiver.inference.joined import join, suffix_of
from perceiver.inference.load import Description, describe
from perceiver.inference.part import Part
from perceiver.inference.parts import from_plain, read_part, to_plain
from perceiver.inference.predict import MODES, PredictOptions, predict_rows
from perceiver.inference.rows import rows_from_table, rows_to_table
from perceiver.terminal import CommandParser, add_checkpoint_option, add_trust_option, number_of
from ray_jobs.cli import JobFailed, main_entry, refuse_empty
from ray_jobs.data import add_encoding
from ray_jobs.logs import show_progress
from ray_jobs.predict_job import ERRORS, Placement, PredictJob, finish, part_name, plan
from ray_jobs.predict_page import SHOWN, write_page
from ray_jobs.program import program

logger = logging.getLogger("ray_jobs.predict")  # which __name__ is not where it is run as a program

# Readers of parquet folders leave out files whose names begin with "_": the whole output folder is a table.
READ_CPUS = 0.5
"""CPUs of a task that reads a part."""


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    job, output, placement, model = parse(argv)
    for option, place in (("output", output), ("html", placement.page)):
        if place is not None and "://" not in place:
            local_folder(option, os.path.dirname(place) if suffix_of(place) or option == "html" else place)
    file = output if suffix_of(output) else None
    if file is not None:
        check_new_file(file)
        output = f"{file}.parts"
    if placement.page is not None:
        check_new_file(placement.page, "--html")
    summary = predict(job, output, placement, model)
    if placement.page is not None:
        parts = [(part_name(part.number), part) for part in plan(job, output)]
        lines = [f"{job.options.mode} of {job.source}, checkpoint {job.checkpoint}", f"input: {' '.join(job.inputs)}"]
        write_page(placement.page, file or output, lines, output, parts, lambda part: read_part(part, *job.reads))
    if file is not None:
        rows = join(output, [part_name(number) for number in range(summary["parts"])], file)
        remove_folder(output)
        logger.info(f"wrote {file}: {number_of(rows, 'row')}")
    if summary["errors"] == summary["rows"]:
        raise JobFailed(f"none of the {summary['rows']:,} rows could be computed; the first: {summary['first_error']}")
    return 0


def check_new_file(file: str, option: str = "--output") -> None:
    """Raises UserError where the output is there already: nothing is written over."""
    root, _, name = file.rpartition("/")
    if name in list_folder(root):
        raise UserError(f"{option} {file} exists: remove it, or choose another name")


def parse(argv: list[str]) -> tuple[PredictJob, str, Placement, Description]:
    """A command line as a job, its output, where it runs, and its model.

    Raises:
        UserError: a value out of range.
        SystemExit: an unknown argument, or `--help`.
    """
    parser = CommandParser(prog=program("ray_jobs.predict"), description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("run", help="folder or name of a run, an exported folder, or a name on the hub")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files or folders")
    parser.add_argument(
        "--output", required=True, metavar="OUTPUT", help="a new file (.csv, .jsonl, .parquet) or folder, or that of a job to continue"
    )
    parser.add_argument("--html", metavar="FILE", help=f"also write an HTML page with the predictions for the first {SHOWN} rows")
    parser.add_argument("--mode", choices=MODES, help="what to compute (default: what the model's task is for)")
    add_checkpoint_option(parser)
    add_trust_option(parser)
    parser.add_argument("--column", help='column with the text or image (default: that of the training, else "text" or "image")')
    parser.add_argument("--id-column", help="column with the rows' ids (default: file name and row number)")
    add_encoding(parser)
    parser.add_argument("--batch-size", type=int, default=PredictOptions.batch_size, help="rows computed at once (%(default)s)")
    parser.add_argument("--rows-per-part", type=int, default=1000, help="rows per output file (%(default)s)")
    parser.add_argument("--actors", type=int, default=1, help="model replicas, each on a GPU or on a share of the CPUs (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where the cluster has them")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of weights and computation")
    parser.add_argument("--address", help="Ray cluster to join (default: that of $RAY_ADDRESS, else a new local one)")
    defaults = PredictOptions(mode="generate")
    add_generation_options(parser, defaults, "fill-mask: predictions per row; generate: sample only from the k most likely tokens")
    args = parser.parse_args(argv)
    refuse_empty(args, ("run",))
    DataConfig(encoding=args.encoding).check_encoding()
    for name in ("batch_size", "rows_per_part", "actors"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)} and must be at least 1")
    model = describe(args.run, args.checkpoint, args.trust_code)
    mode = args.mode or _usual_mode(model.abilities, model.name)
    options = PredictOptions(mode=mode, batch_size=args.batch_size, **given_generation_options(args))
    with named_as_typed():
        options.check()
        causal = model.config.causal_limits() if model.config is not None and options.mode == "generate" else None
        if causal is not None and options.num_latents is not None and options.num_latents > causal[1]:
            raise UserError(f"num_latents is {options.num_latents} and must be at most the model's {causal[1]}")
    if model.abilities and MODES[options.mode].ability not in model.abilities:
        can = ", ".join(name for name, mode in MODES.items() if mode.ability in model.abilities)
        raise UserError(f"--mode is {options.mode}, but {model.name} can only {can}")
    kind = KINDS[model.task.kind].new_rows if model.task else "image" if args.column == "image" else "text"
    arrays = {"arrays": model.rows, "frames": FRAMES}.get(kind)
    if kind in ("arrays", "frames"):
        if args.column is not None:
            raise UserError(f"--column is {args.column}, but {model.name} reads rows of arrays, each column by its name: leave it out")
        if arrays is None:
            task = type(model.task).__name__
            raise UserError(f"{model.name} cannot be used on new rows: its task names no columns ({task}.rows gives none)")
    job = PredictJob(
        source=model.location,
        checkpoint=model.checkpoint,
        inputs=tuple(map(_absolute, args.input)),
        kind=kind,
        column=args.column or {"arrays": "", "frames": "", "text": model.data.text_column}.get(kind, kind),
        id_column=args.id_column,
        rows_per_part=args.rows_per_part,
        precision=args.precision,
        options=options,
        arrays=None if arrays is None else arrays.to_json(missing=True),
        encoding="utf-8" if args.encoding.lower() in ("utf-8", "utf8") else args.encoding,
    )
    page = _absolute(args.html) if args.html else None
    return job, _absolute(args.output), Placement(actors=args.actors, device=args.device, address=args.address, page=page), model


def predict(job: PredictJob, output: str, placement: Placement, model: Description) -> dict[str, Any]:
    """Runs a job to its end, from where an earlier call stopped, and returns its summary.

    Args:
        output: local folder or URI.
        model: the job's, whose code goes to the processes that load it.

    Raises:
        UserError: a mistake in the job or its inputs, or another job's output in the folder.
    """
    logger.info(f"mode {job.options.mode} of {job.source}, checkpoint {job.checkpoint}")
    parts = plan(job, output)
    there = list_folder(output)
    todo = [part for part in parts if part_name(part.number) not in there]
    total = sum(part.rows for part in parts)
    before = f", {len(parts) - len(todo):,} of them done before" if len(todo) < len(parts) else ""
    logger.info(f"{number_of(total, 'row')} in {number_of(len(parts), 'part')}{before}")
    started, done, bad = time.monotonic(), 0, 0
    if todo:
        for result in _compute(job, todo, output, placement, model):
            done += result["rows"]
            bad += result["errors"]
            rate = done / (time.monotonic() - started)
            left = sum(part.rows for part in todo) - done
            logger.info(f"{total - left:,} of {number_of(total, 'row')}, {rate:,.1f} rows/s" + (f", {bad:,} with errors" if bad else ""))
    seconds = time.monotonic() - started
    summary = finish(parts, output)
    logger.info(
        f"finished: {number_of(summary['rows'], 'row')} in {output}, {summary['errors']:,} with errors"
        + (f" ({ERRORS})" if summary["errors"] else "")
    )
    return summary | {"rows_now": done, "seconds_now": seconds}


# ------------------------------------------------------------------------------------------------------------------ Ray


def _compute(job: PredictJob, parts: list[Part], output: str, placement: Placement, model: Description) -> Iterator[dict[str, int]]:
    """Computes parts with a pool of actors; yields what each of them was, as it is done."""
    import ray

    from ray_jobs.ray_env import connect, use_gpus
    from ray_jobs.shipping import Shipped

    parallel = ParallelConfig(device=placement.device, address=placement.address)
    with connect(parallel):
        gpu = use_gpus(parallel)
        cluster = ray.cluster_resources()
        kind, available = ("GPU", cluster.get("GPU", 0)) if gpu else ("CPU", cluster.get("CPU", 0) - READ_CPUS)
        actors = min(placement.actors, len(parts))
        if actors > available:
            otherwise = ": wait until it has grown, or say --device cpu" if gpu else ""
            raise UserError(f"--actors is {placement.actors}, but the cluster has room for {int(available)} ({kind}s){otherwise}")
        context = ray.data.DataContext.get_current()
        # A part stays in one piece from its reader to the actor, which writes it as one file.
        context.target_max_block_size = None
        context.execution_options.preserve_order = False
        items = [{"part": json.dumps(to_plain([part])[0])} for part in parts]
        data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read, fn_kwargs={"job": job}, batch_size=None, batch_format="pyarrow", num_cpus=READ_CPUS
        )
        results = data.map_batches(
            Predictor,
            fn_constructor_kwargs={
                "job": job,
                "output": output,
                "device": "cuda" if gpu else "cpu",
                "actors": 0 if gpu else actors,
                "classes": Shipped((model.task, model.config)),
            },
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            concurrency=actors,
        )
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()


def _read(items: pa.Table, job: PredictJob) -> pa.Table:
    """The rows of one part as a table."""
    (item,) = items.to_pylist()
    (part,) = from_plain([json.loads(item["part"])])
    rows = read_part(part, job.kind, job.column, job.id_column, job.rows)
    return rows_to_table(rows, job.rows).append_column("number", pa.array([part.number] * len(rows), pa.int64()))


class Predictor:
    """An actor with one model: computes a part and writes its output file, whole or not at all."""

    def __init__(self, job: PredictJob, output: str, device: str, actors: int, classes: Any = None) -> None:
        """Loads the model; `classes` are its own, whose code came along with them (and was checked where the job was started)."""
        import torch

        import perceiver

        if actors:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // actors))
        self.job, self.output = job, output
        self.model = perceiver.load(job.source, job.checkpoint, device=device, precision=job.precision, trust_code=True)

    def __call__(self, table: pa.Table) -> pa.Table:
        number = table["number"][0].as_py()
        rows = rows_from_table(table, self.job.kind, self.job.rows)
        result = predict_rows(self.model, rows, self.job.options)
        with atomic_file(self.output, part_name(number)) as file:
            pq.write_table(result, file)
        errors = len(rows) - result["error"].null_count
        return pa.table({"number": [number], "rows": [len(rows)], "errors": [errors]})


def _absolute(path: str) -> str:
    """A local path as seen from any folder; URIs as they are."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _usual_mode(abilities: tuple[str, ...], name: str) -> str:
    """The mode of what a model was trained for: a task's first ability."""
    modes = {mode.ability: name for name, mode in MODES.items()}
    usual = next((modes[ability] for ability in abilities if ability in modes), None)
    if usual is None and abilities:
        raise UserError(f"{name} can only {', '.join(abilities)}, which is no mode of predict: run `perceiver {abilities[0]} {name}`")
    if usual is None:
        raise UserError(f"--mode is needed for {name}: one of {', '.join(MODES)}")
    return usual


if __name__ == "__main__":
    # By the module's own name: what goes to Ray's workers is then found there by reference.
    from ray_jobs.predict import main as job

    main_entry(job)
