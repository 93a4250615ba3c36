"""Rates and lengths of a source's sounds, looked up before anything is prepared."""

from __future__ import annotations

from collections.abc import Iterator

from perceiver.config import UserError
from perceiver.data.files import InputFile
from perceiver.data.sounds import BadSound, SoundInfo, as_samples, sound_info
from perceiver.data.sources import Source
from perceiver.data.storage import open_folder

MOST_LOOKED_AT = 2000
"""Sounds whose heads are read, evenly drawn from all."""


def sound_infos(source: Source, skip: bool = False) -> Iterator[SoundInfo]:
    """What the heads of a source's sound files say, of at most MOST_LOOKED_AT of them.

    Args:
        skip: leave out those that cannot be read.

    Raises:
        UserError: a file that cannot be read.
    """
    files = source.files
    for file in files[:: max(1, -(-len(files) // MOST_LOOKED_AT))]:
        try:
            yield _info(file)
        except BadSound as error:
            if not skip:
                raise UserError(f"{file.name}: {error} (--data.on-error skip leaves out and counts such files)") from None


def _info(file: InputFile) -> SoundInfo:
    filesystem, path = open_folder(file.path)
    try:
        with filesystem.open_input_file(path) as stream:
            return sound_info(stream.read())
    except OSError as error:
        raise BadSound(f"it cannot be read ({str(error).splitlines()[0]})") from None


def longest_sound(source: Source, rate: int, skip: bool = False) -> float:
    """Seconds of a source's longest sound, of code those of its first example.

    Args:
        rate: of examples that do not say their own.

    Raises:
        UserError: none of the sounds can be read.
    """
    seconds = [info.seconds for info in sound_infos(source, skip)]
    for part in source.parts[:1]:
        for example in part.examples():
            try:
                seconds.append(len(as_samples(example["audio"])) / (example.get("sample_rate") or rate))
            except (BadSound, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{part.place}, example 0 must be a mapping with audio and label ({error})") from None
            break
    if not seconds:
        raise UserError("none of the sounds of data.source can be read")
    return max(seconds)
