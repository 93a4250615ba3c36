"""Rows that all workers read for each row that they need, counted with the reading plan; nothing is read, and no device is needed.

    python -m benchmarks.reads [--rows 16000000] [--batch 2048] [--steps 1500] [--workers 1 8 64 512] [--mixture 0.7 0.3]

A worker reads whole windows. Where several share a lane they all read its windows; so the number of lanes decides (docs/data.md).
With many workers eight of them stand for all. With --mixture the rows are those of each source.
"""

import argparse

from perceiver.data.mixture import Mixture
from perceiver.data.order import Order, lanes_and_window
from perceiver.data.reading import read_ratio

BLOCK, ROW_BYTES = 256, 2_056


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_000_000)
    parser.add_argument("--batch", type=int, default=2_048, help="global batch")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--mixture", type=float, nargs="+", help="shares of the sources")
    args = parser.parse_args()
    print("lanes x window" + "".join(f"{workers:>9}" for workers in args.workers) + "   workers")
    chosen = lanes_and_window(-(-args.rows // BLOCK), BLOCK * ROW_BYTES, args.batch)
    for lanes, window in dict.fromkeys([(8, 16), (64, 2), chosen]):
        if args.mixture:
            each = tuple(order(args.rows, lanes, lanes, window) for _ in args.mixture)
            made: Order | Mixture = Mixture(orders=each, shares=tuple(args.mixture), global_batch_size=args.batch)
        else:
            made = order(args.rows, args.batch, lanes, window)
        figures = [read_ratio(made, workers, args.steps) for workers in args.workers]
        mark = "   (what a training takes)" if (lanes, window) == chosen else ""
        print(f"{lanes:>5} x {window:<6}" + "".join(f"{figure:>9.2f}" for figure in figures) + mark, flush=True)


def order(rows: int, batch: int, lanes: int, window: int) -> Order:
    return Order(rows=rows, rows_per_block=BLOCK, global_batch_size=batch, window_blocks=window, max_lanes=lanes, seed=0)


if __name__ == "__main__":
    main()
