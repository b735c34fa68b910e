"""Drawer of pictures: files of heatmaps side by side, and each picture once."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crp.image.colours import as_picture
from crp.visualization.report.addresses import HEATMAPS, Addresses
from crp.visualization.report.drawing import Drawer, Drawn, HeatmapFile, Row
from crp.visualization.report.maps import as_steps, encode_maps, encode_steps, read_facts, square_map
from crp.visualization.report.picture_rows import SMALL, PictureRows
from crp.visualization.report.suspects import Suspect, _spaces_of, find_suspects
from crp.visualization.report.tiles import WHOLE, Shown
from crp.visualization.report.unfinished import Cell, Unfinished
from crp.visualization.table.store import Table
from crp.wording import counted

#: Samples that are kept in memory.
_KEPT = 256
#: Files are drawn together until samples have so many rows each, on average, or so many rows are there, of 4 KB each.
_SHARED_BY, _MOST = 64, 1 << 16
#: What files of heatmaps hold; those of another version are drawn again.
_VERSION = 3


class PictureDrawer(Drawer):
    """Drawer of a dataset of pictures."""

    about_suspects = (
        "A concept of the depicted thing is on every picture of its class and moves with it. A mark, a watermark or a "
        "tag is on some of them, always in one place, where little else is looked at. The figure is the product of the "
        "concept's share in the class, of how much better its place is known than that of all else in its layer (in "
        "nats), and of the share of samples without it. It is a reason to look, not a proof."
    )
    suspects_in_short = "Concepts whose relevance stays in one place, on some samples of a class: look at these first."

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._smallest_side = 1 << 30
        self._known: dict[str, list[Drawn]] = {}
        self._data: OrderedDict[int, Tensor] = OrderedDict()
        self._pictures: dict[int, str] = {}

    def files(self, wanted: Mapping[str, list[Row]], part: tuple[int, int]) -> list[HeatmapFile]:
        """A file for each address. Part i of n draws the rows of its samples, as those of one share what they need."""
        self._rows |= wanted
        jobs = [self.job(address, rows) for address, rows in wanted.items()]
        if part[1] == 1:
            return jobs
        own = _share_of(Counter(row.sample for job in jobs for row in job.rows), *part)
        jobs = [job._replace(places=[i for i, row in enumerate(job.rows) if row.sample in own]) for job in jobs]
        return [job for job in jobs if job.places]

    def is_drawn(self, job: HeatmapFile) -> bool:
        """Whether the file is there, of the same content, and with it the picture that it names."""
        facts = read_facts(self.folder / job.address) or {}
        if facts.get("key") != job.key:
            return False
        if "picture" not in facts:
            return True
        if not self.holds(facts["picture"]):
            return False
        self._keep(job, facts)
        return True

    def draw(self, jobs: Sequence[HeatmapFile]) -> Iterator[int]:
        """Draw what is missing, and yield now and then how many more heatmaps are there."""
        waiting = []
        for job in jobs:
            if self.is_drawn(job):
                yield len(job.places)
            else:
                waiting.append(job)
        for together in _groups(waiting):
            yield from self._draw_together(together)

    def _draw_together(self, jobs: Sequence[HeatmapFile]) -> Iterator[int]:
        """Draw some jobs; rows of a sample are computed together, and each once, whosever they are."""
        found: list[dict[int, Cell]] = [{} for _ in jobs]
        shared = any(len(job.places) < len(job.rows) for job in jobs)
        with Unfinished(self.folder / HEATMAPS, jobs, shared) as unfinished:
            for (number, place), cell in unfinished.read().items():
                found[number][place] = cell
            places: dict[Row, list[tuple[int, int]]] = {}
            for number, job in enumerate(jobs):
                missing = [place for place in job.places if place not in found[number]]
                for place in missing:
                    places.setdefault(job.rows[place], []).append((number, place))
                yield len(job.places) - len(missing)
                self._write_if_complete(job, found[number])
            for rows, drawn in PictureRows(self, self.data).draw(list(places)):
                for row, (shares, facts) in zip(rows, drawn, strict=True):
                    steps = as_steps(square_map(shares, self.options.map_size))
                    for number, place in places[row]:
                        job = jobs[number]
                        found[number][place] = Cell(shares if job.of_sample else steps, facts)
                        if not job.of_sample:  # (which is complete as soon as its sample is drawn)
                            unfinished.add(number, place, found[number][place])
                        self._write_if_complete(job, found[number])
                yield sum(len(places[row]) for row in rows)

    def draw_mean(self, target: int, samples: Sequence[int]) -> None:
        """Draw the mean of a class: of the images, and of the heatmaps, which all have the same weight."""
        job = self.job(Addresses.label_maps(target), [Row(sample, target) for sample in samples])
        if self.is_drawn(job):
            return
        fv, image, heat = self.fv, None, None
        for start in range(0, len(samples), self.options.batch_size):
            data = [self.data(sample) for sample in samples[start : start + self.options.batch_size]]
            if len({one.shape for one in data}) > 1 or (image is not None and image.shape[1:] != data[0].shape[1:]):
                return  # pictures of several sizes have no mean
            stacked = fv._prepare_each(torch.stack(data).to(fv.device)).detach()
            found = fv.attribution(stacked, [{fv.attribution.MODEL_OUTPUT_NAME: [target]}], self.composite).heatmap
            found = found.detach().cpu().double()
            total = found.abs().flatten(1).sum(1).clamp(min=torch.finfo(found.dtype).tiny)
            part = (found / total.reshape(-1, *[1] * (found.dim() - 1))).sum(0)
            heat = part if heat is None else heat + part
            shown = torch.stack([torch.from_numpy(as_picture(one)).permute(2, 0, 1) for one in data]).sum(0)
            image = shown if image is None else image + shown
        if image is None or heat is None:
            return
        picture = picture_file((image / len(samples)).clamp(0, 1), self.options.picture_size)
        facts = {"key": job.key, "picture": self.store(*picture), "n": len(job.rows)}
        self._write_file(job, encode_maps([square_map(heat.numpy(), self.options.map_size)], facts))

    # --- what pages show

    def known(self, address: str) -> list[Drawn]:
        """What is known of the rows of a file; nothing where it is not drawn."""
        if address not in self._rows:
            return []
        if address not in self._known:
            facts = read_facts(self.folder / address) or {}
            self._known[address] = [Drawn(*row) for row in facts.get("rows", [])]
        return self._known[address]

    def tile(self, address: str, place: int, alt: str, at: int | None = None) -> Shown:
        """Picture with the heatmap of a row."""
        known, rows = self.known(address), self._rows[address]
        # (the file of a sample holds the whole heatmap, those of its concepts, and what sets each apart)
        cells = len(known) + (len(known) - 1 if rows[0].layer is None else 0)
        return Shown(self.picture(rows[place].sample), address, place, cells, "", "", [], alt, known[place].crop)

    def apart(self, address: str, place: int, alt: str) -> Shown:
        """What sets a concept apart, in the picture."""
        one = self.tile(address, place, alt)
        return one._replace(cell=place + len(self.known(address)) - 1, crop=WHOLE)

    def mean(self, target: int, alt: str) -> Shown | None:
        """Mean of a class, with the number of its samples."""
        address = Addresses.label_maps(target)
        facts = read_facts(self.folder / address)
        if facts is None:
            return None
        lines = [(f"mean over {counted(facts['n'], 'sample')}", "")]
        return Shown(facts["picture"], address, 0, 1, "", "", lines, alt, WHOLE)

    @property
    def pixelated(self) -> bool:
        """Whether pictures are smaller than on the screen."""
        return self._smallest_side <= SMALL

    def find_suspects(self, table: Table, targets: Sequence[int]) -> list[Suspect]:
        """Concepts whose relevance stays in one place."""
        return find_suspects(table, _spaces_of(self.fv, self.layers, int(table.rows().sample[0])), targets)

    # --- pictures

    def picture(self, sample: int) -> str:
        """Address of a sample's picture, which is written if it is not there."""
        if sample not in self._pictures:
            self._pictures[sample] = self.store(*picture_file(self.data(sample), self.options.picture_size))
        return self._pictures[sample]

    def data(self, sample: int) -> Tensor:
        """Sample as it is shown."""
        if sample in self._data:
            self._data.move_to_end(sample)
            return self._data[sample]
        data, _ = self.fv.get_data_sample(sample, preprocessing=False)
        self._data[sample] = data[0].detach().cpu()
        if len(self._data) > _KEPT:
            self._data.popitem(last=False)
        return self._data[sample]

    def _keep(self, job: HeatmapFile, facts: Mapping[str, Any]) -> None:
        """Remember the picture that a file of heatmaps names: that of its sample, or of a class."""
        self.used.add(facts["picture"])
        self._smallest_side = min(self._smallest_side, facts.get("side", self._smallest_side))
        if "side" in facts:
            self._pictures[job.rows[0].sample] = facts["picture"]

    def _write_if_complete(self, job: HeatmapFile, found: dict[int, Cell]) -> None:
        """Write a file when all its heatmaps are there, and let go of them."""
        if len(found) < len(job.rows):
            return
        cells = [found[place] for place in range(len(found))]
        found.clear()
        facts: dict[str, Any] = {"key": job.key, "rows": [cell.facts for cell in cells]}
        values = [cell.values for cell in cells]
        if job.of_sample:
            sample = job.rows[0].sample
            facts |= {"picture": self.picture(sample), "side": max(self.data(sample).shape[-2:])}
            self._keep(job, facts)
            # What sets a concept apart, h_k / Σ|h_k| - h / Σ|h|: where a larger part of its relevance lies than of all
            # relevance. Heatmaps of one layer's concepts often look alike, and this is in what they differ.
            values += [one - values[0] for one in values[1:]]
            values = [as_steps(square_map(one, self.options.map_size)) for one in values]
        self._write_file(job, encode_steps(values, facts))

    def _settings(self) -> list[Any]:
        return [_VERSION, self.identity, self.options.map_size, self.options.picture_size]


def _groups(jobs: Sequence[HeatmapFile]) -> Iterator[list[HeatmapFile]]:
    """Neighbours, so many that each sample has many rows, or that they fill much memory.

    The file of a sample stands with the first of them that show it, so that it shares their pass.
    """
    of_samples = defaultdict[int, list[HeatmapFile]](list)
    for job in jobs:
        if job.of_sample:
            of_samples[job.rows[0].sample].append(job)
    group: list[HeatmapFile] = []
    n_rows, samples = 0, set[int]()
    for job in jobs:
        if job.of_sample:
            continue
        group.append(job)
        n_rows += len(job.places)
        samples |= {job.rows[place].sample for place in job.places}
        if n_rows >= _MOST or n_rows >= _SHARED_BY * len(samples):
            yield [*group, *chain.from_iterable(of_samples.pop(sample) for sample in samples & of_samples.keys())]
            group, n_rows, samples = [], 0, set()
    if group or of_samples:
        yield [*group, *chain.from_iterable(of_samples.values())]


def _share_of(rows: Mapping[int, int], part: int, n_parts: int) -> set[int]:
    """Samples of one of n parts, by the number of rows of each: those with most first, to the part with the least."""
    loads, own = [0] * n_parts, set()
    for sample, n_rows in sorted(rows.items(), key=lambda one: (-one[1], one[0])):
        least = loads.index(min(loads))
        loads[least] += n_rows
        if least == part:
            own.add(sample)
    return own


def picture_file(sample: Tensor, size: int) -> tuple[bytes, str]:
    """Content of a picture's file, and its suffix: small ones without loss, others as WebP."""
    picture = Image.fromarray((as_picture(sample) * 255).round().astype(np.uint8))
    if max(picture.size) > size:
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    grey = np.asarray(picture)
    if (grey == grey[..., :1]).all():
        picture = picture.convert("L")
    buffer = io.BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(buffer, "PNG")
        return buffer.getvalue(), "png"
    picture.convert("RGB").save(buffer, "WEBP", quality=82, method=4)
    return buffer.getvalue(), "webp"
