"""Which files of a source are a pair of frames and its optical flow. Reads none.

Known layouts (the folders above them may have any names):

    Flying Chairs     data/00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo; also -img0, -img1, -gt
    MPI Sintel        clean/SCENE/frame_0001.png, final/SCENE/frame_0001.png, flow/SCENE/frame_0001.flo, occlusions/SCENE/frame_0001.png
    KITTI             image_2/000000_10.png, 000000_11.png, flow_occ/000000_10.png (2012: image_0, colored_0), flow_noc/...
    HD1K              hd1k_input/image_2/000000_0010.png, hd1k_flow_gt/flow_occ/000000_0010.png
    FlyingThings3D    frames_cleanpass/TRAIN/A/0000/left/0006.png, optical_flow/TRAIN/A/0000/into_future/left/..._0006_L.pfm
    any other         frames and .flo or .pfm files of the same names in one folder: the flow is from its frame to the next one
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from perceiver.config import UserError
from perceiver.data.files import Found, InputFile, format_of, mark_of

Listed = list[tuple[str, str, int]]
"""(path, path inside the source, bytes) of files."""

_FIRST = re.compile(r"^(.*?)([-_]?)(img|im|frame)_?([01])$", re.IGNORECASE)
"""The first frame of a pair by its name: img0 before img1, or img1 before img2."""
_KITTI = re.compile(r"^(.*/)?flow_(occ|noc)/(.*)_(10|\d{4})\.png$")
_KITTI_FRAMES = ("image_2", "colored_0", "image_0")
_THINGS = re.compile(r"^(.*/)?optical_flow/(.*)/into_(future|past)/(left|right)/[^/]*?(\d+)_[LR]\.pfm$")
_PASSES = ("clean", "final")
_NUMBER = re.compile(r"^(.*?)(\d+)$")
_CHAIRS_SPLIT = ("flyingchairs_train_val.txt", "chairs_split.txt")


@dataclass(frozen=True)
class Pair:
    """Two frames and what is known of them, as paths inside the source."""

    first: str
    second: str
    flow: str
    scene: str = ""
    """The scene that it is from, whose pairs are much alike; "": each pair stands for itself."""
    occluded: str = ""
    """A picture that is white where a pixel of the first frame is not seen in the second; "": there is none."""


def flow_files(listed: Listed, label: str, what: str) -> list[Found]:
    """The pairs among listed files, each as the file of its flow with its frames beside it.

    Args:
        label: what messages and the manifest call the source.
        what: how the source was given.

    Raises:
        UserError: there is no flow, or none whose frames are there; a table of splits that does not fit.
    """
    places = {inner: (path, size) for path, inner, size in listed}
    flows = [inner for inner in places if inner.lower().endswith((".flo", ".pfm")) or _KITTI.match(inner)]
    if not flows:
        raise UserError(f"{what} has no optical flow: .flo files, .pfm files, or 16-bit .png files in a folder flow_occ or flow_noc")
    pairs = [pair for flow in sorted(flows) for pair in pairs_of(flow, places)]
    if not pairs:
        raise UserError(
            f"{what} has optical flow whose frames are missing, such as {flows[0]}: the first frame has its name and lies beside it, or as "
            "Flying Chairs, MPI Sintel, KITTI or FlyingThings3D have them"
        )
    marks = _table_of_splits(places, pairs, what)
    found = []
    for pair in pairs:
        path, size = places[pair.flow]
        beside = [pair.first, pair.second, *([pair.occluded] if pair.occluded else [])]
        # By the first frame: the passes of a scene share their flow.
        file = InputFile(
            path=path, name=f"{label}/{pair.first}", format="flow", size=size + sum(places[inner][1] for inner in beside),
            beside=tuple(places[inner][0] for inner in beside), group=pair.scene or None,
        )  # fmt: skip
        found.append(Found(file, marks.get(pair.flow) if marks else mark_of(pair.flow)))
    return found


def pairs_of(flow: str, there: Mapping[str, object]) -> list[Pair]:
    """The pairs that a file of flow belongs to, of which all frames are there; none where it is not known which they are."""
    folder, _, name = flow.rpartition("/")
    if match := _KITTI.match(flow):
        top, which, stem, number = match[1] or "", match[2], match[3], match[4]
        if which == "noc" and f"{top}flow_occ/{stem}_{number}.png" in there:
            return []  # the same with less of it
        following = f"{int(number) + 1:0{len(number)}d}"
        tops = (top, top.replace("hd1k_flow_gt", "hd1k_input"))
        found = [(f"{t}{frames}/{stem}_{number}", f"{t}{frames}/{stem}_{following}") for t in tops for frames in _KITTI_FRAMES]
        return _there(found, flow, there)[:1]
    if match := _THINGS.match(flow):
        top, scene, time, side, number = match[1] or "", match[2], match[3], match[4], match[5]
        other = f"{int(number) + (1 if time == 'future' else -1):0{len(number)}d}"
        found = [
            (f"{top}frames_{p}pass/{scene}/{side}/{number}", f"{top}frames_{p}pass/{scene}/{side}/{other}") for p in ("clean", "final")
        ]
        return _there(found, flow, there, f"{top}{scene}")
    stem = name.rpartition(".")[0]
    parts = folder.split("/")
    after = _next(stem)
    if "flow" in parts and after:
        at = len(parts) - 1 - parts[::-1].index("flow")

        def inside(name: str) -> str:
            return "/".join([*parts[:at], name, *parts[at + 1 :]])

        occluded = f"{inside('occlusions')}/{stem}.png"
        found = [(f"{inside(p)}/{stem}", f"{inside(p)}/{after}") for p in _PASSES]
        if pairs := _there(found, flow, there, folder, occluded if occluded in there else ""):
            return pairs
    prefix = f"{folder}/" if folder else ""
    if match := re.match(r"^(.*?)([-_])(?:flow|gt)$", stem):
        found = [(f"{prefix}{match[1]}{match[2]}img{i}", f"{prefix}{match[1]}{match[2]}img{i + 1}") for i in (1, 0)]
        return _there(found, flow, there)[:1]
    return _there([(prefix + stem, prefix + after)], flow, there) if after else []


def consecutive(names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs among frames without a flow: img1 and img2 of a name, else frames of the same name with neighbouring numbers."""
    there = {name.rpartition(".")[0]: name for name in names}
    found = []
    for stem in sorted(there):
        match = _FIRST.match(stem.rpartition("/")[2])
        if match is not None and match[3].lower() != "frame":
            start = stem[: len(stem) - 1]
            first = int(match[4])
            if f"{start}{first + 1}" in there and not (first == 1 and f"{start}0" in there):
                found.append((there[stem], there[f"{start}{first + 1}"]))
        elif re.search(r"img_?2$", stem) and f"{stem[:-1]}1" in there:
            continue  # the second of a pair
        elif (after := _next(stem)) and after in there:
            found.append((there[stem], there[after]))
    return found


def _next(stem: str) -> str | None:
    """The name with the next number, of as many digits."""
    match = _NUMBER.match(stem)
    return match and f"{match[1]}{int(match[2]) + 1:0{len(match[2])}d}"


def _there(stems: list[tuple[str, str]], flow: str, there: Mapping[str, object], scene: str = "", occluded: str = "") -> list[Pair]:
    """Those pairs whose two frames are pictures that are there."""
    found = []
    for first, second in stems:
        for ending in (".png", ".ppm", ".jpg", ".jpeg", ".webp", ".bmp"):
            if first + ending in there and second + ending in there and format_of(first + ending) == "picture":
                found.append(Pair(first + ending, second + ending, flow, scene, occluded))
                break
    return found


def _table_of_splits(places: Mapping[str, tuple[str, int]], pairs: list[Pair], what: str) -> dict[str, str]:
    """The splits that Flying Chairs' list has (a 1 for training or a 2 for validation a line, in the order of the flows), by flow.

    Raises:
        UserError: it has not a line for each flow.
    """
    from perceiver.data.storage import open_folder

    inner = next((inner for inner in places if inner.rpartition("/")[2].lower() in _CHAIRS_SPLIT), None)
    if inner is None:
        return {}
    filesystem, path = open_folder(places[inner][0])
    with filesystem.open_input_stream(path) as source:
        lines = source.read().decode("utf-8", "replace").split()
    if len(lines) != len(pairs) or set(lines) - {"1", "2"}:
        raise UserError(f"{what} has {inner} with {len(lines):,} lines for {len(pairs):,} pairs: it must have a 1 or a 2 for each")
    return {pair.flow: "train" if line == "1" else "val" for pair, line in zip(pairs, lines, strict=True)}
