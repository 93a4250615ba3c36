"""Which folder holds prepared data: named by source, kind and settings; other content of the same name has one of its own."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.fs as pafs

from perceiver.config import DataConfig, UserError, digest
from perceiver.data.chunks import fingerprint as stream_fingerprint
from perceiver.data.manifest import MANIFEST, Manifest
from perceiver.data.source_hashes import CHECKED_BYTES, changed, is_here, source_fingerprint
from perceiver.data.sources import Source, is_path, mixture_sources, resolve
from perceiver.data.storage import list_folder, open_folder
from perceiver.data_settings import DataSpec, task_kind

Fingerprint = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data."""

    folder: str
    manifest: Manifest | None
    """None: damaged, or of another version's format."""


def slug(settings: dict[str, Any]) -> str:
    """What the folders of a source and kind begin with, whatever the other settings."""
    name = (settings["source"] or settings["val_source"] or "mixture").removeprefix("files:").removeprefix("hub:").removeprefix("code:")
    name = re.sub(r"\.(gz|bz2|zst|txt|raw|tokens|jsonl|json|csv|tsv|arrow|parquet)\b", "", name)
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or 'data'}-{settings['kind']}"


def plain_folder(data: DataConfig, settings: dict[str, Any]) -> str:
    """The folder's name where no other content of the same settings has it."""
    return f"{data.root_path.rstrip('/')}/{slug(settings)}-{digest(settings, 8)}"


def prepared(data: DataConfig, settings: dict[str, Any], others: bool = False) -> list[Prepared]:
    """Data prepared with the given settings, the folder without a mark of its content first.

    Args:
        others: those of the same source and kind with any settings.
    """
    root = data.root_path.rstrip("/")
    filesystem, place = open_folder(root)
    infos = filesystem.get_file_info(pafs.FileSelector(place, allow_not_found=True))
    hashed = "[0-9a-f]{8}" if others else digest(settings, 8)
    pattern = re.compile(f"{re.escape(slug(settings))}-{hashed}(-[0-9a-f]{{8}})?")
    names = sorted(info.base_name for info in infos if pattern.fullmatch(info.base_name))
    return [Prepared(folder, _manifest(folder)) for folder in (f"{root}/{name}" for name in names) if MANIFEST in list_folder(folder)]


def _manifest(folder: str) -> Manifest | None:
    try:
        return Manifest.load(folder)
    except UserError:
        return None


def find_folder(spec: DataSpec, settings: dict[str, Any], digest_of_data: str | None = None) -> str | None:
    """The folder whose data was prepared from what the source is now, as far as its files, or its code, are on this machine.

    Args:
        settings: the spec's (`prepare_settings`).
        digest_of_data: of data that is meant whatever the source is now, such as that which a run began with. Streamed text has none: it is
            read from the source.

    Returns:
        None: there is none.

    Raises:
        UserError: the source is not on this machine, and several were prepared that have its name.
    """
    there = prepared(spec.data, settings)
    if digest_of_data is not None and spec.data.prepare != "stream":
        for each in there:
            if each.manifest is not None and each.manifest.digest == digest_of_data:
                return each.folder
    if not there:
        return None
    now = _now(spec, CHECKED_BYTES)
    fitting = [each.folder for each in there if each.manifest is not None and not _differing(each, now)]
    if len(fitting) > 1:  # names and sizes do not decide: all is read, and what lies in an object store is looked up
        now = _now(spec, math.inf, stores=True)
        fitting = [each.folder for each in there if each.manifest is not None and not _differing(each, now)]
    if len(fitting) > 1 and (away := [each.source for each in now.values() if each.fingerprint is None]):
        raise UserError(
            f"data.source {away[0]} is not on this machine, and data was prepared from {len(fitting)} sources of that name "
            f"({', '.join(fitting)}): put it there, or move the others to another --data.root"
        )
    plain = plain_folder(spec.data, settings)
    unreadable = [each.folder for each in there if each.manifest is None and each.folder == plain]
    return next(iter(fitting + unreadable), None)


def folder_for(spec: DataSpec, settings: dict[str, Any], fingerprint: Fingerprint) -> str:
    """The folder for data of a source with a given fingerprint: the one that there is, else a new name.

    Of data whose settings have a folder already, with data of another content, the name ends with a hash of the source's content.
    """
    now = {"": _Now(spec.data.source, fingerprint)}
    fitting = [each.folder for each in prepared(spec.data, settings) if each.manifest is not None and not _differing(each, now)]
    return fitting[0] if fitting else new_folder(spec.data, settings, fingerprint)


def new_folder(data: DataConfig, settings: dict[str, Any], content: Any) -> str:
    """The folder for data whose content no prepared data has; what is damaged is prepared again where it lies.

    Args:
        content: JSON-ready, what tells it from others of the same settings.
    """
    plain = plain_folder(data, settings)
    there = {each.folder: each.manifest for each in prepared(data, settings)}
    return f"{plain}-{digest(content, 8)}" if there.get(plain) is not None else plain


def others_of_the_name(spec: DataSpec, settings: dict[str, Any]) -> list[str]:
    """For people: data with the spec's settings that was prepared from something else than what its source is now."""
    there = prepared(spec.data, settings)
    now = _now(spec, CHECKED_BYTES) if there else {}
    return [
        f"{each.folder} was prepared from other content: {_listed(names)}{_of_code(now)}"
        for each in there
        if (names := _differing(each, now))
    ]


def what_changed(spec: DataSpec, folder: str, manifest: Manifest) -> str | None:
    """A sentence of what the source is not any more that data was prepared from; None: it is the same, or not on this machine."""
    now = _now(spec, CHECKED_BYTES)
    names = _differing(Prepared(folder, manifest), now)
    source = " ".join(spec.data.mixture) or spec.data.source or spec.data.val_source
    return f"data.source {source} is not what {folder} was prepared from ({_listed(names)}){_of_code(now)}" if names else None


def _of_code(now: dict[str, _Now]) -> str:
    """A hint where the content of code is its source file's."""
    entries = [entry for each in now.values() for entry in (each.fingerprint or {}).get("examples", ())]
    if not any(entry["content"].startswith("code:") for entry in entries):
        return ""
    return " (of code without a method fingerprint() the source file counts, with all that it imports from beside it)"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@dataclass(frozen=True)
class _Now:
    """A source as it is now."""

    source: str
    fingerprint: Fingerprint | None
    """None: it is not on this machine."""


def _now(spec: DataSpec, most: float, stores: bool = False) -> dict[str, _Now]:
    """The sources of a spec, by the names of a mixture's parts; "" where it is one alone.

    Args:
        most: see `source_fingerprint`.
        stores: those in an object store, too.
    """
    data = spec.data
    parts = {"": data}
    if data.mixture:
        parts = {part.name: replace(data, source=part.source, mixture=()) for part in mixture_sources(data)}
    found = {}
    for name, part in parts.items():
        sources = [source for source in (part.source, part.val_source) if source]
        known = all(is_here(source) or (stores and is_path(source) and "://" in source) for source in sources)
        fingerprint = fingerprint_of(part, resolve(part, task_kind(spec)), most) if known else None
        found[name] = _Now(sources[0], fingerprint)
    return found


def fingerprint_of(data: DataConfig, source: Source, most: float = math.inf) -> Fingerprint:
    """What a source is, as the manifest of data prepared from it has it (`source_fingerprint`); of streamed text names and sizes."""
    return stream_fingerprint(source) if data.prepare == "stream" else source_fingerprint(data, source, most)


def _differing(each: Prepared, now: dict[str, _Now]) -> list[str]:
    """Names of the files that are not what prepared data was made from; of a mixture those of all its parts."""
    if each.manifest is None:
        return []
    manifests: dict[str, Manifest | None] = {"": each.manifest}
    if each.manifest.mixture:
        root = each.folder.rpartition("/")[0]
        manifests = {part["name"]: _manifest(f"{root}/{part['folder']}") for part in each.manifest.mixture}
    names = []
    for name, manifest in manifests.items():
        fingerprint = now[name].fingerprint
        if manifest is None:
            names.append(name)
        elif fingerprint is not None:
            names += changed(manifest.source, fingerprint)
    return names
