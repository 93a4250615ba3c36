"""What `perceiver data` says of pictures and sounds."""

from __future__ import annotations

from collections import Counter

from perceiver.config import DataConfig, UserError
from perceiver.data.files import InputFile
from perceiver.data.labels import picture_sizes, unreadable_pictures
from perceiver.data.read_images import image_shape
from perceiver.data.sound_lengths import MOST_LOOKED_AT, sound_infos
from perceiver.data.sources import resolve
from perceiver.terminal import number_of
from ray_jobs.data_found import SHOWN, Found, class_counts, class_lines
from ray_jobs.data_page import Facts

MOST_PAIRS = 200
"""Pairs of frames whose sizes are looked up, evenly drawn from all."""
_FAULTS = 3
"""Pictures that cannot be read which are named, at most."""


def pictures_found(lines: list[str], source: str, label: str) -> Found:
    """Sizes and classes of pictures, and which cannot be read."""
    found = resolve(DataConfig(source=source, label_column=label, val_fraction=0.1), "images")
    sizes = picture_sizes(found, skip=True)
    sides = sorted({shape[:2] for shape in sizes}, key=lambda side: side[0] * side[1])
    size = f"{sides[0][0]} x {sides[0][1]}" + (f" to {sides[-1][0]} x {sides[-1][1]}, {len(sides):,} sizes" if len(sides) > 1 else "")
    grey = sum(count for shape, count in sizes.items() if shape[2] == 1)
    lines = [*lines, f"pictures: {size}; {grey:,} grey, {sum(sizes.values()) - grey:,} in colour"]
    if bad := unreadable_pictures(found):
        shown = ", ".join(f"{name} ({reason})" for name, reason in bad[:_FAULTS]) + (", ..." if len(bad) > _FAULTS else "")
        lines.append(f"{len(bad):,} cannot be read: {shown}")
    classes = class_counts(found, label)
    lines = [*lines, *class_lines(classes)]
    words = ["--data.source", source, *(["--data.label-column", label] if label != "label" else [])]
    words += ["--data.on-error", "skip"] if bad else []
    return Found(lines, "img-clf", words, facts=Facts(classes=dict(classes), pictures=found, label=label))


def flows_found(lines: list[str], source: str) -> Found:
    """Pairs of frames with their optical flow: how many, of which sizes and scenes."""
    found = resolve(DataConfig(source=source, val_fraction=0.1), "flow")
    sizes: Counter[tuple[int, int]] = Counter()
    for file in found.files[:: max(1, -(-len(found.files) // MOST_PAIRS))]:
        frame = InputFile(path=file.beside[0], name=file.name, format="picture", size=0)
        sizes[image_shape(frame)[:2]] += 1
    scenes = {file.group for file in found.files if file.group}
    shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:SHOWN])
    lines = [*lines, f"{number_of(len(found.files), 'pair')} of frames with their optical flow, of {shown}"]
    if scenes:
        lines.append(f"{number_of(len(scenes), 'scene')}: pairs of a scene are all for training or all for validation")
    return Found(lines, "optical-flow-small", ["--data.source", source])


def sounds_found(lines: list[str], source: str, label: str | None) -> Found:
    """Rates, lengths, channels and classes of sounds. In a table whose classes stand under another name, that of ESC-50 is tried, too."""
    given = [label] if label else ["label", "category", "class"]
    for column in given:
        try:
            found = resolve(DataConfig(source=source, label_column=column, val_fraction=0.1), "sounds")
            break
        except UserError:
            if column == given[-1]:
                raise
    infos = list(sound_infos(found, skip=True))
    if not infos:
        raise UserError(f"{source} has no sound that can be read, such as {found.files[0].name}")
    seconds = sorted(info.seconds for info in infos)
    rates = ", ".join(f"{rate:,} Hz ({count:,})" for rate, count in Counter(info.rate for info in infos).most_common(SHOWN))
    channels = ", ".join(f"{number} ({count:,})" for number, count in Counter(info.channels for info in infos).most_common())
    classes = class_counts(found, column)
    lines += [
        f"sounds: {len(found.files):,}, {seconds[0]:.2f} to {seconds[-1]:.2f} s, half of them at most {seconds[len(seconds) // 2]:.2f} s",
        f"rates: {rates}; channels: {channels}",
        *class_lines(classes),
    ]
    if unread := len(found.files[:: max(1, -(-len(found.files) // MOST_LOOKED_AT))]) - len(infos):
        lines.append(f"{unread:,} of them cannot be read: --data.on-error skip leaves them out")
    words = ["--data.source", source, *(["--data.label-column", column] if column != "label" else [])]
    return Found(lines, "audio-clf-small", words, facts=Facts(classes=dict(classes)))
