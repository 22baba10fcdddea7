"""From a folder of images and a JSONL of captions to a data set. The images' bytes are copied, never encoded anew."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.captions import choose_caption
from data.decode import BadImage, check_picture
from data.errors import DataError
from data.object_store import join, open_store
from data.shards import INDEX, write_shards
from data.tar_scan import IMAGE_EXTENSIONS

SKIPPED = "skipped.jsonl"
log = logging.getLogger(__name__)


def pack(
    images_dir: str, captions_jsonl: str, out: str, samples_per_shard: int = 4096, min_shards: int = 16
) -> dict[str, Any]:
    """Packs captioned images into shards with their index.

    A line of the JSONL is {"file": "a.jpg", "caption": "…"} or {…, "captions": ["…", "…"]}; other fields are kept in
    the sample's JSON. An image that is missing or cannot be decoded, and a line without caption, is skipped and listed
    with its reason in `out`/skipped.jsonl.

    Args:
        images_dir: local folder that "file" is relative to.
        captions_jsonl: local file.
        out: the data set to make, local or s3.
        samples_per_shard: at most so many samples in a shard.
        min_shards: at least so many shards (or one per sample, if there are fewer), so that every stream has its own.

    Returns:
        {"url", "fingerprint", "samples", "shards", "skipped": {reason: count}}.

    Raises:
        DataError: folder or file missing, a line that is no such object, `out` taken, or no usable sample.
    """
    folder, captions = Path(images_dir), Path(captions_jsonl)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the images")
    if not captions.is_file():
        raise DataError(f'{captions}: no such file; give a JSONL with {{"file": …, "caption": …}} per line')
    if samples_per_shard < 1 or min_shards < 1:
        raise DataError(f"samples_per_shard={samples_per_shard}, min_shards={min_shards}: must be at least 1")
    store = open_store(out)
    if store.exists(SKIPPED) and not store.exists(INDEX):  # the list of something else
        raise DataError(f"{join(out, SKIPPED)}: exists already; choose another place or remove it")
    usable, skipped = _sort_out(folder, captions)
    if not usable:
        first = skipped[0]["reason"] if skipped else "the file is empty"
        raise DataError(f"{captions}: no line can be used (first: {first}); correct it")
    per_shard = max(1, min(samples_per_shard, len(usable) // min_shards))
    index = write_shards(_samples(folder, usable), out, "shard", per_shard)
    if skipped:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in skipped)
        store.put_bytes(lines.encode(), SKIPPED)
        log.warning("%d of %d samples skipped: see %s", len(skipped), len(skipped) + len(usable), join(out, SKIPPED))
    return {
        "url": index.url,
        "fingerprint": index.fingerprint,
        "samples": index.num_samples,
        "shards": len(index.shards),
        "skipped": dict(Counter(record["reason"].partition(":")[0] for record in skipped)),
    }


def _entries(captions: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of the JSONL."""
    files: set[str] = set()
    with captions.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{captions}, line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place}: no JSON in UTF-8; correct the line") from error
            if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
                raise DataError(f'{place}: has no "file"; write {{"file": "a.jpg", "caption": "…"}}')
            if entry["file"] in files:
                raise DataError(f'{place}: {entry["file"]!r} is there twice; put its captions into one "captions" list')
            files.add(entry["file"])
            yield number, entry


def _sort_out(folder: Path, captions: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[dict[str, Any]]]:
    """Looks at every sample; returns the usable ones as (line number, object), and a record of each other."""
    usable, skipped = [], []
    for line, entry in _entries(captions):
        try:
            if not choose_caption(None, entry):
                raise BadImage("empty caption")
            check_picture(_read_image(folder, entry["file"]))
            usable.append((line, entry))
        except BadImage as error:
            skipped.append({"line": line, "file": entry["file"], "reason": str(error)})
    return usable, skipped


def _samples(folder: Path, entries: list[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for line, entry in entries:
        image = _read_image(folder, entry["file"])
        caption = choose_caption(None, entry)
        yield {"__key__": f"{line:09d}", _extension(entry["file"]): image, "txt": caption, "json": entry}


def _extension(name: str) -> str:
    return Path(name).suffix.lower().removeprefix(".")


def _read_image(folder: Path, name: str) -> bytes:
    if _extension(name) not in IMAGE_EXTENSIONS:
        raise BadImage(f"extension not one of {', '.join(IMAGE_EXTENSIONS)}")
    if "\0" in name:
        raise BadImage("no file name")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadImage("outside the images' folder")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
