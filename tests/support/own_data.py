"""Small data of a user's, a form each, in which something can be learned: `python -m tests.support.own_data FOLDER`."""

import csv
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

GOOD, BAD = ("excellent", "wonderful", "superb", "delicious"), ("terrible", "awful", "rude", "disgusting")
FILL = "the food was and we went there on a tuesday evening with my family near the station".split()


def pictures(folder: Path, number: int = 60) -> None:
    """Class folders of pictures of several sizes, in colour and grey: circles, squares, stripes; and new ones without a class."""
    rng = np.random.default_rng(0)
    for place in [*(f"pictures/{name}" for name in ("circle", "square", "stripes")), "new_pictures"]:
        (folder / place).mkdir(parents=True)
        for i in range(12 if place == "new_pictures" else number):
            what = ("circle", "square", "stripes")[i % 3] if place == "new_pictures" else place.partition("/")[2]
            side = int(rng.integers(32, 49))
            y, x = np.mgrid[:side, :side] - side / 2 + rng.uniform(-4, 4, (2, 1, 1))
            size = rng.uniform(8, 12)
            shape = {"circle": x**2 + y**2 < size**2, "square": np.maximum(abs(x), abs(y)) < size, "stripes": x % 8 < 4}[what]
            pixels = np.where(shape[..., None], rng.uniform(150, 255, 3), rng.uniform(0, 90, 3)) + rng.normal(0, 8, (side, side, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            name = f"{what}-{i:03d}.png" if place == "new_pictures" else f"{i:03d}.png"
            (image.convert("L") if i % 7 == 0 else image).save(folder / place / name)


def review(rng: random.Random) -> tuple[str, bool]:
    """A review, and whether it is a good one."""
    good = rng.random() < 0.5
    words = [rng.choice(FILL) for _ in range(rng.randint(6, 25))]
    words.insert(rng.randrange(len(words)), rng.choice(GOOD if good else BAD))
    return " ".join(words), good


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def reviews(folder: Path, number: int = 1500) -> None:
    """A .csv of reviews with their sentiment, and new ones."""
    rng = random.Random(1)
    found = [review(rng) for _ in range(number + 20)]
    rows: list[dict[str, object]] = [{"review": text, "sentiment": "good" if good else "bad"} for text, good in found]
    write_csv(folder / "reviews.csv", rows[20:])
    write_csv(folder / "new_reviews.csv", [{"id": f"n{i}", "review": row["review"]} for i, row in enumerate(rows[:20])])


def texts(folder: Path, number: int = 60) -> None:
    """A folder of .txt files."""
    rng = random.Random(2)
    (folder / "texts").mkdir(parents=True)
    for i in range(number):
        (folder / "texts" / f"{i:03d}.txt").write_text("".join(f"{review(rng)[0].capitalize()}. " for _ in range(40)), encoding="utf-8")
    (folder / "prompts.txt").write_text("The food was\nWe went there\n")


def houses(folder: Path, number: int = 1200) -> None:
    """A table of numbers, some missing, and a district; and new houses without their prices."""
    rng = random.Random(3)
    rows: list[dict[str, object]] = []
    for i in range(number + 20):
        area, rooms, age = rng.uniform(30, 200), rng.randint(1, 6), rng.randint(0, 90)
        district = rng.choice(["north", "south", "east", "west"])
        price = 2.2 * area + 15 * rooms - 0.8 * age + {"north": 60, "south": 0, "east": 20, "west": -20}[district] + rng.gauss(0, 8)
        rows.append(
            {"area": "" if i % 50 == 0 else round(area, 1), "rooms": rooms, "age": age, "district": district, "price": round(price, 2)}
        )
    write_csv(folder / "houses.csv", rows[20:])
    write_csv(folder / "new_houses.csv", [{name: value for name, value in row.items() if name != "price"} for row in rows[:20]])


def restaurants(folder: Path, number: int = 1500) -> None:
    """A table of numbers, a category and a free text, which decides; and new rows."""
    rng = random.Random(4)
    rows: list[dict[str, object]] = []
    for i in range(number + 20):
        text, good = review(rng)
        city = rng.choice(["Bonn", "Ulm", "Kiel", "Jena"])
        rows.append(
            {"id": f"r{i:05d}", "city": city, "price": round(rng.gauss(20, 5), 2), "review": text, "liked": "yes" if good else "no"}
        )
    write_csv(folder / "restaurants.csv", rows[20:])
    write_csv(folder / "new_restaurants.csv", [{name: value for name, value in row.items() if name != "liked"} for row in rows[:20]])


def sounds(folder: Path, number: int = 40) -> None:
    """Class folders of sounds: tones, noise and clicks; and new ones."""
    import soundfile

    rng, time = np.random.default_rng(5), np.arange(8000) / 8000
    for place in [*(f"sounds/{name}" for name in ("tone", "noise", "clicks")), "new_sounds"]:
        (folder / place).mkdir(parents=True)
        for i in range(9 if place == "new_sounds" else number):
            what = ("tone", "noise", "clicks")[i % 3] if place == "new_sounds" else place.partition("/")[2]
            clicks = (np.arange(8000) % int(rng.integers(600, 900)) < 20) * 0.8
            made = {"tone": 0.4 * np.sin(2 * np.pi * rng.uniform(200, 900) * time), "noise": rng.normal(0, 0.15, 8000), "clicks": clicks}[
                what
            ]
            name = f"{what}-{i}.wav" if place == "new_sounds" else f"{i:03d}.wav"
            soundfile.write(folder / place / name, made + rng.normal(0, 0.01, 8000), 8000)


def music(folder: Path, number: int = 30) -> None:
    """A folder of MIDI files: scales up and down."""
    from perceiver.data.midi import Note, encode, write_midi

    rng = random.Random(6)
    for place in ("midi", "new_midi"):
        (folder / place).mkdir(parents=True)
        for i in range(2 if place == "new_midi" else number):
            start, way = rng.randint(50, 62), rng.choice((1, -1))
            notes = [Note(80, start + way * (n % 12), n * 0.25, n * 0.25 + 0.2) for n in range(80)]
            (folder / place / f"{i:03d}.mid").write_bytes(write_midi(encode(notes, [])))


def frames(folder: Path, number: int = 40) -> None:
    """Pairs of frames with their optical flow, as Flying Chairs has them; and new pairs without."""
    from perceiver.data.flow_formats import write_flo
    from perceiver.data.made_flow import moving_pair

    for place in ("frames", "new_frames"):
        (folder / place).mkdir(parents=True)
        for i in range(1, (3 if place == "new_frames" else number) + 1):
            made = moving_pair(np.random.default_rng([place == "frames", i]), 64, 96)
            for which in ("first", "second"):
                Image.fromarray(made[which]).save(folder / place / f"{i:05d}_img{1 if which == 'first' else 2}.ppm")
            if place == "frames":
                (folder / place / f"{i:05d}_flow.flo").write_bytes(write_flo(made["flow"]))


FORMS = {each.__name__: each for each in (pictures, reviews, texts, houses, restaurants, sounds, music, frames)}
"""What writes data of a form, by its name."""


if __name__ == "__main__":
    for make in FORMS.values():
        make(Path(sys.argv[1]))
