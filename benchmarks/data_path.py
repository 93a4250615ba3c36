"""Speed of the data path on one core: tokenizing, words, masking, preparation, reading; beside plain loops and
`datasets.map`.

    python -m benchmarks.data_path [--source FILES] [--tokenizer spiece.model] [--ray] [--out results.json]

Each pair does the same work on the same text in the same process, alternately, three times; the best time counts. The
plain loops go over bytes and words as the reference's collator does; `datasets.map` tokenizes by the same tokenizer
and packs rows in batches of 1000 documents. `--source` is anything that `--data.source` takes for language models;
without it, English-like text is made up.

The input pipeline alone is all that a worker of clm-c4 does before the model: reading, shuffling, cutting to the step's
length, batches of tensors; from shards, and from text that becomes ids as it is read (`--data.prepare stream`). In this process
its CPU time counts; with `--ray` also through Ray Data tasks as in training, where the time on the clock counts, with all cores
of the machine, which the consumer shares. Beside it stands what 8 A100s at 40% MFU would take.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from perceiver.config import DataConfig, ParallelConfig
from perceiver.costs.devices import DEVICES
from perceiver.costs.flops import training_flops
from perceiver.data.chunks import Chunks, chunk_ids, chunk_rows, chunks_of, measure
from perceiver.data.columns import fixed_array, fixed_column
from perceiver.data.files import InputFile
from perceiver.data.manifest import SPLITS, Split
from perceiver.data.order import Order, plan
from perceiver.data.pieces import cut_pieces, make_piece
from perceiver.data.preparation import Job
from perceiver.data.prepare import make_shard, make_split, plan_shards
from perceiver.data.read_documents import read_documents
from perceiver.data.sources import resolve
from perceiver.data.spans import Problems
from perceiver.data.stream import read_unit
from perceiver.data.tables import Columns
from perceiver.data.text import mask_words, windows, word_ids
from perceiver.data.tokenizers import MASK, ByteTokenizer, Tokenizer, load_tokenizer
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.training.batches import Loader, ReadAll, StreamLoader, make_loader, read_here

REPEATS = 3
MLM, CLM = (32, 2048), (24, 4096)
"""Examples and ids of a batch, as in the published recipes."""
BYTES = ByteTokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="files to read; without them text is made up")
    parser.add_argument("--tokenizer", help="SentencePiece model to measure besides bytes")
    parser.add_argument("--megabytes", type=float, default=20, help="use about so much of the text")
    parser.add_argument("--ray", action="store_true", help="measure the input pipeline through Ray Data too")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaders: dict[str, Loader] = {}
        texts = read_texts(args.source, args.megabytes) if args.source else made_up(args.megabytes)
        results = [*arrays(texts), *preparation(texts, "bytes", Path(folder), loaders)]
        if args.tokenizer:
            results += preparation(texts, args.tokenizer, Path(folder), loaders)
        results += [pipeline(loader, read_here, how) for how, loader in loaders.items()]
        if args.ray:
            results += pipelines_with_ray(loaders)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {size:.1f} MB; one core, through Ray Data {os.cpu_count()}\n")
    print(f"{'what':<58}{'ours':>12}{'other':>12}{'ratio':>8}  unit")
    for row in results:
        other, ratio = ("", "") if row["other"] is None else (f"{row['other']:,.2f}", f"{row['ours'] / row['other']:.1f}")
        print(f"{row['what']:<58}{row['ours']:>12,.2f}{other:>12}{ratio:>8}  {row['unit']}")
    print("\n" + demand([row for row in results if row["what"].startswith("input pipeline")]))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


def read_texts(source: str, megabytes: float) -> list[str]:
    found, size = [], 0
    for piece in cut_pieces(resolve(DataConfig(source=source), "tokens").files):
        for span in piece.spans:
            for documents in read_documents(span, Columns(text="text", label=None), Problems(skip=False)):
                for text in documents.texts:
                    found.append(text)
                    size += len(text)
                    if size > megabytes * 1e6:
                        return found
    return found


def made_up(megabytes: float) -> list[str]:
    """Documents of words with frequencies like English."""
    chooser = random.Random(0)
    vocabulary = ["".join(chooser.choices("etaoinshrdlu", k=chooser.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    words = chooser.choices(vocabulary, weights, k=int(megabytes * 1e6 / 5.2))
    return [" ".join(words[i : i + 300]) for i in range(0, len(words), 300)]


def best(function: Callable[[], object], other: Callable[[], object] | None = None) -> tuple[float, float | None]:
    """The shortest CPU time of each in seconds, run alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for run, measured in zip((function, other), times, strict=True):
            if run is not None:
                start = time.process_time()
                run()
                measured.append(time.process_time() - start)
    return min(times[0]), min(times[1]) if other else None


def row(what: str, unit: str, amount: float, times: tuple[float, float | None], other_amount: float | None = None) -> dict:
    ours, other = times
    rate = None if other is None else (other_amount or amount) / other
    return {"what": what, "unit": unit, "ours": amount / ours, "other": rate}


# --------------------------------------------------------------------------------------------------------------- arrays


def arrays(texts: list[str]) -> list[dict]:
    """Tokenizer, words and batches, against loops over bytes and words."""
    ids, _ = BYTES.encode_batch(texts)
    size = len(ids) / 1e6
    few = texts[: max(1, len(texts) // 20)]
    few_ids = BYTES.encode_batch(few)[0]
    less = len(few_ids) / 1e6
    batch = ids[: len(ids) // MLM[1] * MLM[1]].reshape(-1, MLM[1])
    numbers = np.arange(len(batch))
    num = max(1, min(len(batch) // MLM[0], 20)) * MLM[0]
    block = ids[: len(ids) // CLM[1] * CLM[1]].reshape(-1, CLM[1])[: 4 * CLM[0] + 1]

    def mask() -> None:
        for i in range(0, num, MLM[0]):
            mask_words(
                batch[i : i + MLM[0]],
                BYTES.words,
                mask_id=MASK,
                probability=0.15,
                seed=0,
                epoch=0,
                rows=numbers[i : i + MLM[0]],
            )

    def shift() -> None:
        table = pa.table({"tokens": fixed_column(windows(block, 1234))})
        for i in range(0, table.num_rows, CLM[0]):
            fixed_array(table.slice(i, CLM[0]), "tokens").astype(np.int64)

    encoding = best(lambda: BYTES.encode_batch(texts), lambda: loop_encode(few))
    words = best(lambda: word_ids(batch, BYTES.words), lambda: loop_words(few_ids))
    return [
        row("byte tokenizer", "MB/s", size, encoding, less),
        row("word boundaries", "MB/s", size, words, less),
        row(f"whole-word masking, {MLM[0]} x {MLM[1]}", "examples/s", num, best(mask, lambda: loop_mask(batch[:8])), 8),
        row(f"shifted windows, {CLM[0]} x {CLM[1]}", "examples/s", len(block) - 1, best(shift)),
    ]  # fmt: skip


def loop_encode(texts: list[str]) -> list[list[int]]:
    return [[byte + 6 for byte in text.encode()] for text in texts]


def loop_words(ids: np.ndarray) -> list[int]:
    blank = {ord(c) + 6 for c in " \t\n\r\v\f"}
    words, word, previous_blank = [], 0, True
    for i in ids.tolist():
        if i in blank and not previous_blank:
            word += 1
        previous_blank = i in blank
        words.append(word)
    return words


def loop_mask(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole-word masking word by word, as a collator in plain Python does it."""
    chooser = random.Random(0)
    all_inputs, all_labels = [], []
    for ids in batch:
        inputs, labels, places = ids.tolist(), [-100] * len(ids), {}
        for position, word in enumerate(loop_words(ids)):
            places.setdefault(word, []).append(position)
        for positions in places.values():
            if chooser.random() < 0.15:
                fate = chooser.random()
                for p in positions:
                    labels[p] = inputs[p]
                    if fate < 0.8:
                        inputs[p] = MASK
                    elif fate < 0.9:
                        inputs[p] = chooser.randrange(262)
        all_inputs.append(inputs)
        all_labels.append(labels)
    return np.array(all_inputs), np.array(all_labels)


# ---------------------------------------------------------------------------------------------------------- preparation


def preparation(texts: list[str], tokenizer: str, folder: Path, loaders: dict[str, Loader]) -> list[dict]:
    """Both passes of the preparation on one core, against `datasets.map`; then reading what was prepared.

    What was prepared is left in a folder of its own, and its loader for a worker of clm-c4 is added to `loaders`.
    """
    loaded = load_tokenizer(tokenizer)
    few = texts if isinstance(loaded, ByteTokenizer) else texts[: max(1, len(texts) // 4)]
    path = folder / f"train-{loaded.vocab_size}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in few))
    size = sum(len(text.encode()) for text in few) / 1e6
    job = Job(
        kind="tokens", folder=f"{folder}/out-{loaded.vocab_size}", staging=f"{folder}/staging-{loaded.vocab_size}",
        columns=Columns(text="text", label=None),
        skip=False, val_fraction=0.05, row_length=1024, rows_per_block=256, blocks_per_shard=64, tokenizer=loaded,
        document_marks="eos",
    )  # fmt: skip
    files = resolve(DataConfig(source=str(path)), "tokens").files
    splits: dict[str, Split] = {}

    def ours() -> None:
        notes = [make_piece(job, i, piece) for i, piece in enumerate(cut_pieces(files))]
        for split in SPLITS:
            shards = [make_shard(job, planned) for planned in plan_shards(job, notes, split)]
            splits[split] = make_split(job, notes, shards, split)

    name = f"{loaded.fingerprint['name']} ({loaded.vocab_size:,})"
    times = best(ours, lambda: with_datasets(path, loaded, folder))
    train = splits["train"].tokens / 1e6
    tokens = train + splits["val"].tokens / 1e6
    reading = best(lambda: read(job.folder, splits["train"]))
    shards = worker_loader(job.folder, splits["train"])
    loaders |= {f"shards of {name}": shards, f"text to {name}": streaming_loader(shards, job, list(files))}
    return [
        row(f"preparation, {name} (other: datasets.map)", "MB/s", size, times),
        row(f"preparation, {name} (other: datasets.map)", "million tokens/s", tokens, times),
        row(f"reading shuffled rows, {name}", "million tokens/s", train, reading),
    ]  # fmt: skip


def with_datasets(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    length = 1024

    def pack(batch: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
        ids, lengths = tokenizer.encode_batch(batch["text"])
        stream = np.insert(ids, np.cumsum(lengths), tokenizer.eos_id)
        return {"tokens": list(stream[: len(stream) // length * length].reshape(-1, length))}

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        rows.map(pack, batched=True, remove_columns=["text"]).to_parquet(f"{cache}/out.parquet")


def read(folder: str, split: Split) -> None:
    """An epoch in a worker's order, read in this process."""
    order = Order(
        rows=split.rows,
        rows_per_block=split.rows_per_block,
        global_batch_size=32,
        window_blocks=16,
        max_lanes=8,
        seed=0,
    )
    for unit in plan(order, 0, 1, 0, order.steps_per_epoch):
        read_unit(folder, split, order, unit, lambda block, split, *_: block.slice(0, block.num_rows - split.lookahead), True)


# ------------------------------------------------------------------------------------------------------- input pipeline


def worker_loader(folder: str, split: Split) -> Loader:
    """What one of 8 workers of clm-c4 takes: 256 windows of a step."""
    experiment = PRESETS["clm-c4"]()
    experiment = replace(experiment, training=replace(experiment.training, global_batch_size=256))
    return make_loader(build_task(experiment), folder, split, True, data=experiment.data, training=experiment.training)


def streaming_loader(shards: Loader, job: Job, files: list[InputFile]) -> StreamLoader:
    """The same from text; says how much of it is in no row."""
    sizes = [measure(file) for file in files]
    total = sum(size.bytes for size in sizes)
    rate = shards.split.tokens / total / 0.95  # of which 5% are held out
    rows = chunk_rows(total, rate, job.row_length, 4096)
    described = {"rows": rows, "ids_per_byte": rate, "val_fraction": 0.05, "sizes": [[s.units, s.bytes] for s in sizes]}
    pieces, _ = chunks_of(files, described, job.row_length)
    chunks = Chunks(job=job, rows=rows, pieces=tuple(pieces))
    there = [len(chunk_ids(job, piece)) for piece in pieces]
    short = sum(max(rows * job.row_length - ids, 0) for ids in there)
    left = sum(max(ids - rows * job.row_length, 0) for ids in there)
    shares = f"{left / sum(there):.2%} of the ids dropped, {short / sum(there):.2%} taken twice"
    print(f"{len(pieces)} chunks of {rows} rows: {shares}")
    total_rows = rows * len(pieces)
    split = replace(shards.split, rows=total_rows, tokens=total_rows * job.row_length + 1, rows_per_block=rows, shards=())
    order = replace(shards.order, rows=total_rows, rows_per_block=rows, window_blocks=1)
    return StreamLoader(**{**vars(shards), "split": split, "order": order}, chunks=chunks)


def pipeline(
    loader: Loader, read_all: ReadAll, how: str, clock: Callable[[], float] = time.process_time, cores: int = 1, steps: int = 40
) -> dict:
    """Tokens a second of all `cores` that come out as batches: the best of three runs of `steps` steps."""
    rates = []
    for _ in range(REPEATS):
        start, tokens = clock(), 0
        for batches in loader.steps(read_all, 0, 1, 0, steps):
            tokens += sum(batch["ids"].numel() for batch in batches)
        rates.append(tokens / (clock() - start) / 1e6)
    return {"what": f"input pipeline, {how}", "unit": "million tokens/s", "ours": max(rates), "other": None, "cores": cores}


def pipelines_with_ray(loaders: dict[str, Loader]) -> list[dict]:
    from ray_jobs.ingest import read_with_ray
    from ray_jobs.ray_env import connect

    cores = os.cpu_count() or 1
    with connect(ParallelConfig()):
        return [pipeline(loader, read_with_ray, f"{how}, Ray Data", time.perf_counter, cores) for how, loader in loaders.items()]


def demand(pipelines: list[dict], gpus: int = 8, cores: int = 96) -> str:
    """What GPUs take, beside what a core of each pipeline gives, and all of a node."""
    model = PRESETS["clm-c4"]().model
    mean = 768
    flops = training_flops(model, seq_len=mean) / mean
    peak = DEVICES["a100-40gb"].bf16
    taken = gpus * 0.4 * peak / flops / 1e6
    lines = [
        f"clm-c4 at its mean length of {mean}: {flops / 1e9:.2f} GFLOP a token; {gpus} A100s at 40% of {peak / 1e12:.0f} "
        f"TFLOP/s take {taken:.2f} million tokens/s"
    ]
    for row in pipelines:
        times = row["ours"] / row["cores"] / taken
        lines.append(f"  {row['what']}: of one core {times:.1f} times that, of {cores} {cores * times:,.0f} times")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
