"""How rows of images are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from perceiver.data.columns import fixed_column
from perceiver.data.preparation import PieceWriter, Preparation, ShardParts, content_hashes, strata
from perceiver.data.read_images import read_images
from perceiver.data.rows import ImageRows, TaggedImageRows
from perceiver.data.spans import Problems, Span


class ImagePreparation(Preparation):
    """Pixels and labels."""

    kind = ImageRows.kind

    def keyed(self, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images in read_images(span, self.job.columns, problems):
            yield content_hashes(images.groups or [image.tobytes() for image in images.pixels]), strata(images.labels)

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        for images in read_images(span, self.job.columns, problems):
            pixels = np.ascontiguousarray(images.pixels)
            contents = [image.tobytes() for image in pixels]
            for split, chosen in self.splits(span.file, contents, images.groups):
                values = pixels[chosen].reshape(-1)
                num = int(np.count_nonzero(chosen))
                counts = {"rows": num, "bytes": values.nbytes, "documents": num}
                alone = span.file.split == "hash" and images.groups is None  # equal ones are of one split
                hashes = None if alone else content_hashes([contents[i] for i in np.flatnonzero(chosen)])
                writers[split].add(values, counts, images.labels[chosen], None, hashes)

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        pixels = shard.read("values", np.uint8, first, first + num, width=self.job.row_length)
        return pa.table({"image": fixed_column(pixels.reshape(num, -1)), **shard.labels(first, num)})


class TaggedImagePreparation(ImagePreparation):
    """The same with any number of classes each."""

    kind = TaggedImageRows.kind
