"""A job of predictions: what determines its output, the parts that it is computed in, and whether all are there."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pyarrow.parquet as pq

from perceiver.config import UserError, differences, flatten
from perceiver.data.rows import ArrayRows
from perceiver.data.storage import list_folder, open_folder, read_file, write_file
from perceiver.inference.part import Part
from perceiver.inference.parts import from_plain, list_inputs, plan_parts, to_plain
from perceiver.inference.predict import PredictOptions
from perceiver.inference.rows import Kind

PLAN = "_plan.json"


ERRORS = "_errors.jsonl"


SUMMARY = "_summary.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictJob:
    """What determines the output of a job."""

    source: str
    """Run, exported folder or hub name."""
    checkpoint: str
    inputs: tuple[str, ...]
    kind: Kind
    column: str
    id_column: str | None
    rows_per_part: int
    precision: Literal["fp32", "bf16"]
    options: PredictOptions
    arrays: dict[str, Any] | None = None
    """The columns of rows of arrays (`ArrayRows.to_json`)."""

    encoding: str = "utf-8"
    """Of text in the input."""

    @property
    def reads(self) -> tuple[Kind, str, str | None, ArrayRows | None]:
        """What `read_part` takes besides a part."""
        return self.kind, self.column, self.id_column, self.rows

    @property
    def rows(self) -> ArrayRows | None:
        return None if self.arrays is None else ArrayRows.from_json(self.arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a job runs. Not part of what it computes."""

    actors: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    address: str | None = None
    page: str | None = None
    """HTML file that shows what was said of the first rows."""


def plan(job: PredictJob, output: str) -> list[Part]:
    """The parts of a job: as an earlier call planned them, or made now and written to the output folder.

    Raises:
        UserError: the folder holds another job's output, or something else; or the input has changed.
    """
    files = list_inputs(job.inputs, job.kind)
    settings = flatten(dataclasses.asdict(job) | {"files": {name: size for _, name, size in files}})
    if job.arrays is None:
        del settings["arrays"]
    if job.encoding == "utf-8":
        del settings["encoding"]
    settings = json.loads(json.dumps(settings))
    _check_apart(job.inputs, output)
    there = list_folder(output)
    if PLAN in there:
        earlier, parts = _read_plan(output)
        if changes := differences(earlier, settings):
            raise UserError(f"--output {output} holds the output of another job ({'; '.join(changes[:5])}): choose another folder")
        return parts
    if any(not name.startswith(".") for name in there):  # a first start may have been stopped in the middle of its first file
        raise UserError(f"--output {output} is not empty and holds no earlier output: choose another folder")
    parts = plan_parts(files, job.rows_per_part, job.column, job.id_column, job.rows, job.kind, job.encoding)
    if not parts:
        raise UserError("--input has no rows")
    content = json.dumps({"settings": settings, "parts": to_plain(parts)}, indent=1) + "\n"
    write_file(output, PLAN, content.encode())
    return parts


def _check_apart(inputs: tuple[str, ...], output: str) -> None:
    """Raises UserError where the output would become input of the next start of the same job."""
    for given in inputs:
        if f"{output}/".startswith(f"{given.rstrip('/')}/"):
            raise UserError(f"--output {output} lies inside --input {given}: choose a folder outside")


def _read_plan(output: str) -> tuple[dict[str, Any], list[Part]]:
    """Settings and parts of the job that an output folder belongs to.

    Raises:
        UserError: its _plan.json is damaged or no plan of a job.
    """
    try:
        content = json.loads(read_file(output, PLAN))
        settings, parts = content["settings"], from_plain(content["parts"])
        if not isinstance(settings, dict) or not all(isinstance(part.rows, int) for part in parts):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{PLAN} in --output {output} is damaged or no plan of this program: choose another folder") from None
    return settings, parts


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def finish(parts: list[Part], output: str) -> dict[str, Any]:
    """Checks that every row is there, and writes _errors.jsonl and _summary.json.

    Returns:
        The summary, and the error of the first row that has one ("" if none has).
    """
    filesystem, path = open_folder(output)
    rows, lines = 0, []
    for part in parts:
        table = pq.read_table(f"{path}/{part_name(part.number)}", columns=["id", "error"], filesystem=filesystem)
        if table.num_rows != part.rows:
            raise RuntimeError(f"{part_name(part.number)} has {table.num_rows} rows, not {part.rows}")
        rows += table.num_rows
        bad = table.filter(table["error"].is_valid())
        lines += [json.dumps({**row, "part": part_name(part.number)}) + "\n" for row in bad.to_pylist()]
    summary = {"rows": rows, "errors": len(lines), "parts": len(parts)}
    write_file(output, ERRORS, "".join(lines).encode())
    write_file(output, SUMMARY, (json.dumps(summary) + "\n").encode())
    return summary | {"first_error": json.loads(lines[0])["error"] if lines else ""}
