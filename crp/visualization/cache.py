"""Caches of reference pictures, so that a picture is computed once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from crp.compat.folders import replacing
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags
from crp.kinds import as_path
from crp.notices import kind_of
from crp.visualization.table.fingerprint import fingerprint_composite


class Cache:
    """Interface of a cache of references.

    `FeatureVisualization` asks it before it computes anything. ``plot_name`` ends in a digest of everything that the
    pictures depend on (model, table, data, plot function), so that it is enough for a cache to keep apart what has
    another name.

    Parameters
    ----------
    path : str or Path
        Folder of the cache.
    """

    def __init__(self, path: str | Path = "cache") -> None:
        self.path = as_path("path", path)
        if any(place.is_file() for place in (self.path, *self.path.parents)):
            raise InputError(f"{path} cannot be a folder, since it is, or is in, a file; give another path")

    def save(
        self,
        ref_c: Mapping[Any, Any],
        layer_name: str,
        mode: str,
        r_range: tuple[int, int],
        composite: Any,
        rf: bool,
        f_name: str,
        plot_name: str,
        **kwargs: Any,
    ) -> None:
        """Keep what `FeatureVisualization.get_max_reference` or `get_stats_reference` (``f_name``) returned.

        Parameters
        ----------
        ref_c : mapping of id to value
            Value for the ranks ``r_range``.
        layer_name : str
        mode : {"relevance", "activation"}
        r_range : (int, int)
            First rank, and the rank after the last.
        composite : zennit Composite
        rf : bool
        f_name, plot_name, **kwargs : str
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement Cache.save")

    def keeps(self, value: Any) -> bool:
        """Whether a value can be kept; others are computed whenever they are asked for."""
        return True

    def load(
        self, concept_ids: Any, layer_name: str, mode: str, r_range: tuple[int, int], composite: Any, rf: bool,
        f_name: str, plot_name: str, **kwargs: Any,
    ) -> tuple[dict[Any, Any], dict[Any, tuple[int, int]]]:  # fmt: skip
        """Return what is there.

        Parameters
        ----------
        concept_ids : id, or iterable of ids
            An id is an int, a str or a tuple. The other parameters are as in `save`.

        Returns
        -------
        found : dict of id to value
        missing : dict of id to (int, int)
            For each id that is not wholly there, the ranks that are missing.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement Cache.load")

    def extend_dict(self, ref_original: dict[Any, Any], rf_addition: Mapping[Any, Any]) -> dict[Any, Any]:
        """Append the values of ``rf_addition`` to those of ``ref_original``, which is returned."""
        raise NotImplementedError(f"{type(self).__name__} does not implement Cache.extend_dict")


class ImageCache(Cache):
    """Cache of PIL images: of lists of images, and of pairs of such lists. What holds none is not kept.

    Every image is a PNG file below ``path/<function>/<plot function>/<mode>_<composite>/<layer>/``. Names end in a
    digest of what they stand for, so that no name leaves the folder, equals another's, or is unknown to a file system.

    Parameters
    ----------
    path : str or Path
        Folder of the cache; made when something is saved.
    """

    def save(  # type: ignore[override]  # zennit-crp's names
        self,
        ref_dict: Mapping[Any, Sequence[Image.Image] | tuple[Sequence[Image.Image], Sequence[Image.Image]]],
        layer_name: str,
        mode: str,
        r_range: tuple[int, int],
        composite: Any,
        rf: bool,
        func_name: str,
        plot_name: str,
        **kwargs: Any,
    ) -> None:
        """Save images.

        Parameters
        ----------
        ref_dict : mapping of id to list of images, or to a pair of lists
            One image (of each list) for each rank in ``r_range``; fewer, if there are no more.
        layer_name, mode, r_range, composite, rf, func_name, plot_name, **kwargs
            As in `Cache.save`.

        Raises
        ------
        TypeError
            If a value holds anything but PIL images.
        """
        folder = self._folder(layer_name, mode, composite, rf, func_name, plot_name)
        for id_, value in ref_dict.items():
            lists = value if isinstance(value, tuple) else (value,)
            for image in (image for images in lists for image in images):
                if not isinstance(image, Image.Image):
                    raise InputTypeError(
                        f"ImageCache saves PIL images, but the value of {id_!r} holds {kind_of(image)}; "
                        "let plot_fn return a list of images, or a pair of such lists"
                    )
            if len(lists) > 2 or len({len(images) for images in lists}) > 1:
                raise InputTypeError(
                    f"ImageCache saves lists, or pairs of equally long lists; the value of {id_!r} is neither"
                )
            # The first list is written last: if its file exists, so does that of the second list.
            for part, images in reversed(list(enumerate(lists))):
                for rank, image in zip(range(*r_range), images, strict=False):
                    with replacing(folder / _file(id_, part, rank)) as file:
                        image.save(file, format="PNG")

    def keeps(self, value: Any) -> bool:
        """Whether a value holds any image."""
        lists = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Iterable)]
        return any(isinstance(image, Image.Image) for images in lists for image in images)

    def load(  # type: ignore[override]
        self, indices: Any, layer_name: str, mode: str, r_range: tuple[int, int], composite: Any, rf: bool,
        func_name: str, plot_name: str, **kwargs: Any,
    ) -> tuple[dict[Any, Any], dict[Any, tuple[int, int]]]:  # fmt: skip
        """Load images, up to the first rank that is missing; parameters and results as in `Cache.load`."""
        folder = self._folder(layer_name, mode, composite, rf, func_name, plot_name)
        found: dict[Any, Any] = {}
        missing: dict[Any, tuple[int, int]] = {}
        for id_ in [indices] if isinstance(indices, int | str | tuple) else indices:
            parts = 2 if (folder / _file(id_, 1, r_range[0])).exists() else 1
            lists: tuple[list[Any], ...] = tuple([] for _ in range(parts))
            for rank in range(*r_range):
                images = [_open(folder / _file(id_, part, rank)) for part in range(parts)]
                if any(image is None for image in images):
                    missing[id_] = (rank, r_range[1])
                    break
                for known, image in zip(lists, images, strict=True):
                    known.append(image)
            if lists[0]:
                found[id_] = lists if parts == 2 else lists[0]
        return found, missing

    def extend_dict(self, ref_original: dict[Any, Any], rf_addition: Mapping[Any, Any]) -> dict[Any, Any]:
        """Append the images of ``rf_addition`` to those of ``ref_original``, which is returned.

        Raises
        ------
        TypeError
            If the two values of an id are not both lists, or both pairs.
        """
        for id_, value in rf_addition.items():
            known = ref_original.setdefault(id_, type(value)([] for _ in value) if isinstance(value, tuple) else [])
            if type(known) is not type(value) or not isinstance(value, tuple | list):
                raise InputTypeError(
                    f"the values of {id_!r} cannot be joined: {type(known).__name__} and {type(value).__name__}; "
                    "both must be lists, or pairs of lists"
                )
            if isinstance(value, tuple):
                for images, more in zip(known, value, strict=True):
                    images.extend(more)
            else:
                known.extend(value)
        return ref_original

    def _folder(self, layer: str, mode: str, composite: Any, rf: bool, func_name: str, plot_name: str) -> Path:
        check_flags(rf=rf)
        method = f"{mode}_{type(composite).__name__}{'_rf' if rf else ''}-{fingerprint_composite(composite)[:8]}"
        return self.path / safe_name(func_name) / safe_name(plot_name) / method / safe_name(layer)


def from_cache(
    cache: Cache,
    ranks: Mapping[Any, tuple[int, int]],
    where: tuple[str, str, Any, bool, str, str],
    compute: Callable[[Sequence[Any], tuple[int, int]], Mapping[Any, Any]],
    overwrite: bool = False,
) -> dict[Any, Any]:
    """Take references from a cache; those that it lacks are computed, and kept in it.

    Parameters
    ----------
    cache : Cache
    ranks : dict of id to (int, int)
        Ranks that are asked for.
    where : tuple
        ``(layer_name, mode, composite, rf, f_name, plot_name)``, as for `Cache.save`.
    compute : callable
        ``(ids, ranks) -> {id: value}``
    overwrite : bool
        Whether all are computed.
    """
    layer, mode, *rest = where
    held: dict[Any, Any] = {}
    missing: dict[tuple[int, int], list[Any]] = {}
    for id_, wanted in ranks.items():
        known, absent = ({}, {id_: wanted}) if overwrite else cache.load([id_], layer, mode, wanted, *rest)
        held.update(known)
        for span in absent.values():
            missing.setdefault(span, []).append(id_)
    keeps = getattr(cache, "keeps", lambda value: True)
    for span, ids in missing.items():
        computed = compute(ids, span)
        kept = {id_: value for id_, value in computed.items() if keeps(value)}
        cache.save(kept, layer, mode, span, *rest)
        held = {**computed, **cache.extend_dict(held, kept)}
    return {id_: held[id_] for id_ in ranks}


def safe_name(text: str) -> str:
    """File name for any text: readable, with a digest, so that different texts have different names everywhere."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:60]
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _file(id_: object, part: int, rank: int) -> str:
    name = str(id_) if isinstance(id_, int) else safe_name(str(id_))
    return f"{name}_{part}_{rank}.png"


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            image.load()
            copy: Image.Image = image.copy()
            return copy
    except (OSError, SyntaxError):
        return None  # a broken file counts as missing and is computed again
