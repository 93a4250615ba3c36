"""The page of predictions: what was said stands beside the inputs, and inputs are text, never markup."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from perceiver.inference.part import Part
from perceiver.inference.rows import Row
from ray_jobs.predict_page import SHOWN, write_page


def page_of(folder, rows, said) -> str:
    """The page of inputs in parts of three rows, and what was said of them."""
    parts, given = [], {}
    for number, first in enumerate(range(0, len(rows), 3)):
        name = f"part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(said[first : first + 3]), folder / name)
        parts.append((name, Part(number=number, paths=("x",), names=("x",), rows=len(rows[first : first + 3]))))
        given[number] = rows[first : first + 3]
    write_page(str(folder / "page.html"), "out.csv", ["what was done"], str(folder), parts, lambda part: given[part.number])
    return (folder / "page.html").read_text()


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_pictures_have_what_was_said_below_them(tmp_path):
    rows = [Row(f"new/{i}.png", png(i)) for i in range(4)] + [Row("new/bad.png", None, "it is damaged")]
    said = [{"id": row.id, "label": "cat" if i % 2 else "dog", "probability": 0.75, "error": None} for i, row in enumerate(rows)]
    said[4] |= {"label": None, "probability": None, "error": "it is damaged"}
    page = page_of(tmp_path, rows, said)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == ["dog 75%: 0.png", "cat 75%: 1.png", "dog 75%: 2.png", "cat 75%: 3.png"]
    assert "it is damaged" in page and '"y": [2, 2]' in page.replace('"y":[2,2]', '"y": [2, 2]')


def test_texts_are_shown_as_they_are_and_only_the_first_ones(tmp_path):
    rows = [Row(f"a.csv:{i}", f"<b>text {i}</b>" + "!" * 400) for i in range(SHOWN + 10)]
    said = [{"id": row.id, "label": "good", "probability": 0.5, "probabilities": [0.5, 0.5], "error": None} for row in rows]
    page = page_of(tmp_path, rows, said)
    assert "&lt;b&gt;text 0&lt;/b&gt;" in page and "<b>text" not in page and "(415 characters)" in page
    assert f"a.csv:{SHOWN - 1}<" in page and f"a.csv:{SHOWN}<" not in page
