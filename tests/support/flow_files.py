"""Small sets of frames with their flow, in the layouts of published ones."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from perceiver.data.flow_formats import write_flo
from perceiver.data.made_flow import moving_pair


def pair(seed: int, height: int = 32, width: int = 48):
    return moving_pair(np.random.default_rng([7, seed]), height, width)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def pfm(flow: np.ndarray, little: bool = True) -> bytes:
    height, width, _ = flow.shape
    three = np.concatenate([flow, np.zeros((height, width, 1), np.float32)], -1)[::-1]
    return f"PF\n{width} {height}\n{'-1.0' if little else '1.0'}\n".encode() + three.astype("<f4" if little else ">f4").tobytes()


def kitti_png(flow: np.ndarray, known: np.ndarray) -> bytes:
    """A PNG of three channels of 16 bits, written by hand: no library that is needed here writes one."""
    height, width, _ = flow.shape
    values = np.concatenate([np.round(flow * 64 + 2**15), known[..., None]], -1).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in values)

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")


def chairs(folder: Path, count: int, frame: str = ".ppm") -> None:
    for i in range(1, count + 1):
        made = pair(i)
        write_image(folder / f"{i:05d}_img1{frame}", made["first"])
        write_image(folder / f"{i:05d}_img2{frame}", made["second"])
        write(folder / f"{i:05d}_flow.flo", write_flo(made["flow"]))


def sintel(folder: Path, scenes: tuple[str, ...] = ("alley_1", "bamboo_2"), frames: int = 3) -> None:
    for s, scene in enumerate(scenes):
        for i in range(1, frames + 1):
            made = pair(100 * s + i)
            for which in ("clean", "final"):
                write_image(folder / "training" / which / scene / f"frame_{i:04d}.png", made["first"])
            if i < frames:
                write(folder / "training" / "flow" / scene / f"frame_{i:04d}.flo", write_flo(made["flow"]))
                write_image(folder / "training" / "occlusions" / scene / f"frame_{i:04d}.png", made["occluded"].astype(np.uint8) * 255)


def kitti(folder: Path, count: int) -> None:
    for i in range(count):
        made = pair(i)
        for number, name in ((10, "first"), (11, "second")):
            write_image(folder / "training" / "image_2" / f"{i:06d}_{number}.png", made[name])
        for which in ("flow_occ", "flow_noc"):
            write(folder / "training" / which / f"{i:06d}_10.png", kitti_png(made["flow"], np.arange(48)[None].repeat(32, 0) % 3 == 0))


def things(folder: Path) -> None:
    for number in ("0006", "0007"):
        made = pair(int(number))
        for which in ("clean", "final"):
            write_image(folder / f"frames_{which}pass" / "TRAIN" / "A" / "0000" / "left" / f"{number}.png", made["first"])
        for time in ("future", "past"):
            place = folder / "optical_flow" / "TRAIN" / "A" / "0000" / f"into_{time}" / "left"
            write(place / f"OpticalFlowInto{time.title()}_{number}_L.pfm", pfm(made["flow"]))
