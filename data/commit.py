"""The tensors of a commit: written as pieces by the ranks that own them, read by whoever wants whatever part.

A file `<attempt>/<group>-<rank>.safetensors` holds what one rank owned of one group: by parameter name a tensor's
one-dimensional slice, or the whole tensor if the rank owned all of it. The manifest says once per distinct layout where
each piece begins, so that a reader with any part in mind asks the store for the bytes that overlap it and no others.
Everything is float32.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import DamagedCommit, Manifest, step_folder
from data.object_store import Store, join

Array = NDArray[np.float32]
ITEM_BYTES = 4
HEADER_BYTES = 1 << 18  # asked for at once in the hope that the header is no longer
GAP_BYTES = 1 << 18  # read and thrown away rather than asking anew
RUN_BYTES = 64 << 20  # the most that one request brings
READ_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the elements of one tensor lie: the piece of `ranks[i]` goes from `starts[i]` to the next one's start."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    starts: tuple[int, ...]  # elements of the flattened tensor; ascending from 0

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yields (rank, first element, first element behind it)."""
        return zip(self.ranks, self.starts, (*self.starts[1:], self.numel), strict=True)

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"shape": self.shape, "pieces": list(zip(self.ranks, self.starts, strict=True))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Layout":
        """Raises ValueError, TypeError or KeyError for what is no layout."""
        layout = cls(
            shape=tuple(int(length) for length in value["shape"]),
            ranks=tuple(int(rank) for rank, _ in value["pieces"]),
            starts=tuple(int(start) for _, start in value["pieces"]),
        )
        bounds = [*layout.starts, layout.numel]
        if bounds[0] != 0 or any(left >= right for left, right in zip(bounds, bounds[1:], strict=False)):
            raise ValueError("pieces that do not cover the tensor")
        return layout


def file_key(attempt: str, group: str, rank: int) -> str:
    """The file that holds what a rank owned of a group, relative to the step's folder."""
    return f"{attempt}/{group}-{rank:05d}.safetensors"


def tensor_file_header(tensors: Sequence[tuple[str, Sequence[int]]]) -> bytes:
    """What stands before the bytes of float32 tensors (name, shape) that follow one another in a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + ITEM_BYTES * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Span:
    """Bytes of a file that belong into a buffer."""

    begin: int
    buffer: memoryview

    @property
    def end(self) -> int:
        return self.begin + len(self.buffer)


class Commit:
    """A step's tensors by group and name. Reads bytes only where asked to; verifying them is `data.manifest.verify`.

    Args:
        store: of the checkpoints folder.
        manifest: of the step.

    Raises:
        DamagedCommit: the manifest's layouts are none.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self.place = join(store.url, step_folder(manifest.step))
        self._headers: dict[str, dict[str, tuple[int, int]]] = {}  # by file: name to the bytes it has there
        try:
            layouts = [
                {name: Layout.from_json(value) for name, value in layout.items()} for layout in manifest.meta["layouts"]
            ]
            self._groups = {group: layouts[number] for group, number in manifest.meta["groups"].items()}
            if any(key not in manifest.files for group in self._groups for key in self.files(group)):
                raise ValueError("a piece without a file")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DamagedCommit(f"{self.place}: its manifest says of no tensor where it lies; restore it") from error

    @property
    def groups(self) -> list[str]:
        """Their names, in the order in which they were saved."""
        return list(self._groups)

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a group's tensors by name; empty if there is no such group."""
        return {name: layout.shape for name, layout in self._groups.get(group, {}).items()}

    def files(self, group: str) -> list[str]:
        """The keys of a group's files, relative to the step's folder."""
        ranks = {rank for layout in self._groups.get(group, {}).values() for rank in layout.ranks}
        return [file_key(self.manifest.attempt, group, rank) for rank in sorted(ranks)]

    def layout(self, group: str, name: str) -> Layout:
        """Where a tensor lies. Raises DataError if there is none of that name."""
        try:
            return self._groups[group][name]
        except KeyError:
            raise DataError(
                f"checkpoint {self.place} has no tensor {name!r} in group {group!r}; it was written for another "
                "model: use the recipe it was trained with, or another --run"
            ) from None

    def tensor(self, group: str, name: str) -> Array:
        """One whole tensor."""
        layout = self.layout(group, name)
        array = np.empty(layout.numel, np.float32)
        self.fill(group, {name: (0, array)})
        return array.reshape(layout.shape)

    def group(self, group: str) -> dict[str, Array]:
        """All tensors of a group, whole, by name."""
        arrays = {name: np.empty(prod(shape), np.float32) for name, shape in self.shapes(group).items()}
        self.fill(group, {name: (0, array) for name, array in arrays.items()})
        return {name: array.reshape(self._groups[group][name].shape) for name, array in arrays.items()}

    def fill(self, group: str, wanted: Mapping[str, tuple[int, Array]]) -> None:
        """Reads parts of tensors.

        Args:
            group: of the tensors.
            wanted: name to (first element of the flattened tensor, contiguous array (n,) that takes n from there on).

        Raises:
            DataError: a tensor or file is not there, or not what the manifest says.
        """
        overlaps: dict[str, list[tuple[str, int, int, memoryview]]] = {}
        for name, (start, array) in wanted.items():
            if not array.size:
                continue
            buffer = array.view(np.uint8).data
            for rank, begin, end in self.layout(group, name).pieces():
                low, high = max(begin, start), min(end, start + array.size)
                if low < high:
                    part = buffer[ITEM_BYTES * (low - start) : ITEM_BYTES * (high - start)]
                    key = file_key(self.manifest.attempt, group, rank)
                    overlaps.setdefault(key, []).append((name, end - begin, low - begin, part))

        with ThreadPoolExecutor(READ_THREADS) as pool:
            unknown = [key for key in overlaps if key not in self._headers]
            self._headers |= zip(unknown, pool.map(self._read_header, unknown), strict=True)
            runs = []
            for key, found in overlaps.items():
                spans = [
                    _Span(self._offset(key, name, length) + ITEM_BYTES * first, part)
                    for name, length, first, part in found
                ]
                runs += [(key, run) for run in _runs(spans)]
            for _ in pool.map(lambda run: self._read(*run), runs):
                pass

    def _offset(self, key: str, name: str, length: int) -> int:
        begin, end = self._headers[key].get(name, (0, 0))
        if end - begin != ITEM_BYTES * length:
            raise DataError(f"{self.place}/{key}: does not hold {name!r} as the manifest says; use another checkpoint")
        return begin

    def _read_header(self, key: str) -> dict[str, tuple[int, int]]:
        address = f"{step_folder(self.manifest.step)}/{key}"
        with self.store.open_range(address, 0, HEADER_BYTES) as file:
            head = file.read()
        start = 8 + int.from_bytes(head[:8], "little")
        if start > len(head):
            with self.store.open_range(address, 0, min(start, self.manifest.files[key].size_bytes)) as file:
                head = file.read()
        try:
            fields = json.loads(head[8:start])
            fields.pop("__metadata__", None)
            if any(field["dtype"] != "F32" for field in fields.values()):
                raise ValueError("not float32")
            offsets = {name: [int(at) for at in field["data_offsets"]] for name, field in fields.items()}
            return {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.place}/{key}: is no safetensors file of ours; use another checkpoint") from error

    def _read(self, key: str, run: list[_Span]) -> None:
        begin, end = run[0].begin, run[-1].end
        address = f"{step_folder(self.manifest.step)}/{key}"
        with self.store.open_range(address, begin, end - begin) as file:
            for span in run:
                file.read(span.begin - begin)
                begin = span.end
                if not _read_into(file, span.buffer):
                    raise DataError(f"{self.place}/{key}: ends early; use another checkpoint")


def _runs(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Spans that lie close together, to be read by one request; a long one is cut."""
    run: list[_Span] = []
    for span in sorted(_cut(spans), key=lambda span: span.begin):
        if run and (span.begin - run[-1].end > GAP_BYTES or span.end - run[0].begin > RUN_BYTES):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def _cut(spans: list[_Span]) -> Iterator[_Span]:
    for span in spans:
        for at in range(0, len(span.buffer), RUN_BYTES):
            yield _Span(span.begin + at, span.buffer[at : at + RUN_BYTES])


def _read_into(file: BinaryIO, buffer: memoryview) -> bool:
    readinto: Callable[[memoryview], int] = file.readinto  # type: ignore[attr-defined]
    done = 0
    while done < len(buffer):
        count = readinto(buffer[done:])
        if not count:
            return False
        done += count
    return True
