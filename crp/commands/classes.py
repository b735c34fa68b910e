"""``crp prototypes``, ``crp audit`` and ``crp clusters``: how a model predicts classes, told from a mined table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crp.commands.errors import CommandError
from crp.commands.group import in_a_line
from crp.commands.loading import FOLDER
from crp.commands.values import _plain
from crp.wording import counted, first_few, percent

if TYPE_CHECKING:
    import torch

    from crp.audit import AuditedSample, Clusters, Prototypes
    from crp.visualization.table.store import Table

_JSON = click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
_KEEP = click.option(
    "--keep/--no-keep", default=True, show_default=True, help="In FOLDER, for the pages of crp report."
)
_SEED = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
#: Samples and concepts that are listed of each cluster and prototype.
_LISTED = 8


@click.command("prototypes")
@click.argument("folder", type=FOLDER)
@click.argument("layer")
@click.argument("classes", nargs=-1)
@click.option(
    "--n", type=click.IntRange(1), help="Prototypes of each class; that of the least BIC, up to 6, by default."
)
@click.option("--covariance", type=click.Choice(["diag", "full"]), default="diag", show_default=True)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File (.safetensors) for Python, where crp.audit.Prototypes.load(FILE) reads it.",
)
@_SEED
@_KEEP
@_JSON
def prototypes_command(
    folder: Path,
    layer: str,
    classes: tuple[str, ...],
    n: int | None,
    covariance: Any,
    save: Path | None,
    seed: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Tell in which ways CLASSES, all by default, are predicted. These are their prototypes.

    Each comes with the sample that shows it and its concepts. They are kept in FOLDER, for crp audit and crp report.

        crp prototypes atlas/ layer4 ship
    """
    from crp.audit import prototypes
    from crp.visualization.models import find_class
    from crp.visualization.table.store import Table

    table = Table.open(folder)
    chosen = [find_class(name, table.header.class_names) for name in classes] or None
    found = prototypes(table, layer, range(1, 7) if n is None else n, classes=chosen, covariance=covariance, seed=seed)
    if save is not None:
        found.save(save)
    describe, rows = _describe(table, layer), list[dict[str, Any]]()
    for of_class, mixture in found.classes.items():
        for i, mean in enumerate(mixture.means):
            top = (-mean).argsort(kind="stable")[:_LISTED].tolist()
            rows.append(
                {
                    "class": of_class,
                    "name": _class_name(table, of_class),
                    "prototype": i,
                    "weight": float(mixture.weights[i]),
                    "sample": int(mixture.sample[i]),
                    "concepts": [{"concept": c, "name": describe(c), "share": float(mean[c])} for c in top],
                }
            )
    with _keeping(keep, partial(found.save, table)):
        if as_json:
            click.echo(json.dumps({"layer": layer, "covariance": covariance, "seed": seed, "prototypes": rows}))
        for row in [] if as_json else rows:
            concepts = ", ".join(f"{one['concept']} ({one['share']:+.3f})" for one in row["concepts"])
            click.echo(
                _plain(
                    f"{row['name']}, prototype {row['prototype']}  {percent(row['weight'])} of samples, as in "
                    f"{row['sample']}; concepts {concepts}"
                )
            )


@click.command("audit")
@click.argument("folder", type=FOLDER)
@click.argument("layer")
@click.option("--sample", "samples", type=click.IntRange(0), multiple=True, help="Of the table; may be given again.")
@click.option("--data", help="Other samples: a folder of pictures, or package.module:factory.")
@click.option("--concepts", "k", type=click.IntRange(1), default=5, show_default=True, help="Listed of each sample.")
@click.option(
    "--least", type=click.IntRange(1), default=10, show_default=True, help="Samples listed, least usual first."
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Of --data, at once.")
@_KEEP
@_JSON
def audit_command(
    folder: Path,
    layer: str,
    samples: tuple[int, ...],
    data: str | None,
    k: int,
    least: int,
    batch_size: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Compare samples with prototypes of their class. It tells which are unusual, and in which concepts.

    crp prototypes comes first. Without --data, the samples of the table are compared, and neither model nor data are
    needed; their audit is kept in FOLDER for crp report. With --data, the model is loaded as for crp mine.

        crp audit atlas/ layer4 --data new-photos/
    """
    from crp.audit import Prototypes, audit_table, save_audit
    from crp.visualization.table.store import Table

    if samples and data is not None:
        raise CommandError("--sample is for samples of the table, and --data for others; give one of them")
    table = Table.open(folder)
    found = Prototypes.load(table, layer)
    left_out: list[str] = []
    if data is not None:
        audited, left_out = _audit_data(table, found, data, k, batch_size)
    else:
        chosen = list(samples) or None
        columns = table.samples()
        sources = dict(zip(columns.sample.tolist(), columns.source, strict=True))
        rows = audit_table(table, found, chosen, k=k, describe=_describe(table, layer))
        audited = [(sources[one.sample] or f"sample {one.sample}", one) for one in rows]
    compared = [one for _, one in audited]
    with _keeping(keep and not samples and data is None, partial(save_audit, table, found, compared)):
        _tell_audit(table, layer, audited, least, as_json)
    if left_out:
        n = counted(len(audited) + len(left_out), "sample")
        raise CommandError(f"{len(left_out)} of {n} left out: {first_few(left_out, _LISTED)}")


@click.command("clusters")
@click.argument("folder", type=FOLDER)
@click.argument("layer")
@click.argument("of_class", metavar="CLASS")
@click.option(
    "--what",
    type=click.Choice(["relevance", "activation", "heatmap"]),
    default="relevance",
    show_default=True,
    help="By which samples are compared; heatmaps are those that crp.audit.keep_heatmaps has kept.",
)
@click.option("--n", type=click.IntRange(min=1), help="Number of clusters; that of the largest gap by default.")
@click.option("--neighbours", type=click.IntRange(1), default=10, show_default=True, help="Each sample is joined with.")
@click.option("--export", type=click.Path(dir_okay=False, path_type=Path), help="New HDF5 file for ViRelAy.")
@_SEED
@_KEEP
@_JSON
def clusters_command(
    folder: Path,
    layer: str,
    of_class: str,
    what: str,
    n: int | None,
    neighbours: int,
    export: Path | None,
    seed: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Cluster the explanations of CLASS (SpRAy). One in several clusters is predicted for several reasons.

    They are kept in FOLDER for crp report.

        crp clusters atlas/ layer4 ship
    """
    from crp.audit import clusters, export_corelay, save_clusters, with_concepts
    from crp.visualization.models import find_class
    from crp.visualization.table.store import Table

    table = Table.open(folder)
    target = find_class(of_class, table.header.class_names)
    found = clusters(table, layer, target, what=what, n=n, n_neighbours=neighbours, seed=seed)
    if export is not None:
        try:
            export_corelay(export, found, name=f"class {target}")
        except ImportError:
            raise CommandError("--export needs h5py: pip install concept-relevance[corelay]") from None
    named = with_concepts(table, found, layer, target) if what == "heatmap" else found
    with _keeping(keep, partial(save_clusters, table, found, layer, target, what=what)):
        _tell_clusters(table, layer, target, named, as_json)


@contextmanager
def _keeping(keep: bool, save: Callable[[], object]) -> Iterator[None]:
    """Keep a result beside its table; where that cannot be written, it is told first what was found."""
    problem = None
    try:
        if keep:
            save()
    except OSError as error:
        problem = error
    yield
    if problem is not None:
        raise CommandError(f"{in_a_line(problem)}; it is not kept (--no-keep says that it need not be)") from problem


def _tell_clusters(table: Table, layer: str, target: int, found: Clusters, as_json: bool) -> None:
    describe = _describe(table, layer)
    rows = [
        {
            "cluster": i,
            "size": size,
            "samples": found.members(i).tolist(),
            "concepts": [{"concept": c, "name": describe(c), "more": d} for c, d in found.strongest(i, _LISTED)],
        }
        for i, size in enumerate(found.sizes)
    ]
    if as_json:
        facts = {"layer": layer, "class": target, "name": _class_name(table, target), "separation": found.separation}
        facts |= {"eigenvalues": found.eigenvalues.tolist(), "seed": found.seed}
        click.echo(json.dumps(facts | {"clusters": rows}))
        return
    sizes = f"{counted(len(found.label), 'sample')} in {counted(len(rows), 'cluster')}"
    named = f"{_class_name(table, target)}, layer {layer!r}"
    click.echo(_plain(f"{named}: {sizes}, separation {found.separation:.2f}"))
    for row in rows:
        concepts = ", ".join(f"{one['concept']} ({one['more']:+.3f})" for one in row["concepts"])
        such = ", ".join(map(str, row["samples"][:_LISTED]))
        click.echo(
            f"cluster {row['cluster']}  {counted(row['size'], 'sample')}, such as {such}; "
            f"{'more of ' * (len(rows) > 1)}concepts {concepts or 'none'}"
        )


def _tell_audit(
    table: Table, layer: str, audited: Sequence[tuple[str, AuditedSample]], least: int, as_json: bool
) -> None:
    shown = audited[:least]
    if as_json:
        rows = [
            {
                "name": name,
                "sample": one.sample,
                "class": one.predicted,
                "class_name": _class_name(table, one.predicted),
                "percentile": one.percentile,
                "prototype": one.prototype,
                "nearest": one.nearest,
                "over": [use._asdict() for use in one.over],
                "under": [use._asdict() for use in one.under],
            }
            for name, one in shown
        ]
        click.echo(json.dumps({"layer": layer, "n_samples": len(audited), "samples": rows}))
        return
    more = f", of which the {len(shown)} least usual are listed" if len(shown) < len(audited) else ""
    click.echo(_plain(f"layer {layer!r}: {counted(len(audited), 'sample')}{more}"))
    for name, one in shown:
        usual = str(one).replace(f"class {one.predicted}", _class_name(table, one.predicted), 1)
        click.echo(_plain(f"{name}  {usual}"))


def _audit_data(
    table: Table, found: Prototypes, data: str, k: int, batch_size: int
) -> tuple[list[tuple[str, AuditedSample]], list[str]]:
    """Names and audit of samples that are not in the table, by the model of its recipe, and what is left out."""
    import torch

    from crp.attribution import CondAttribution
    from crp.audit import audit
    from crp.audit.asked import predicted_by
    from crp.commands.mine import _make_composite
    from crp.visualization.decoding import Decoded, decoder_mark
    from crp.visualization.mining.text_batches import Asked
    from crp.visualization.opening import open_recipe
    from crp.visualization.table.fingerprint import fingerprint, fingerprint_model

    opened, command = open_recipe(table.header.recipe, data=data), table.header.recipe["command"]
    marks = {"model": fingerprint_model(opened.model)}
    if opened.output is not None:
        marks["output"] = fingerprint(opened.output)
    if isinstance(opened.dataset, Decoded):
        marks["decoder"] = decoder_mark(table.fingerprints, opened.dataset) or "none"
    table.check(**marks)
    composite = _make_composite(command["rules"], command["settings"])
    attribution, concept = CondAttribution(opened.model, output=opened.output), opened.layer_map[found.layer]
    dataset, left_out = opened.dataset, list[str]()
    audited: list[tuple[str, AuditedSample]] = []
    for begin in range(0, len(dataset), batch_size):
        drawn = list(_readable(dataset, range(begin, min(begin + batch_size, len(dataset))), data, left_out))
        alike = len({one.shape for _, one in drawn}) == 1
        for together in [drawn] if alike else [[one] for one in drawn]:
            batch = torch.stack([one for _, one in together])
            prepared = batch if opened.preprocess is None else opened.preprocess(batch)
            classes = predicted_by(attribution, Asked.of(prepared, None))
            rows = [row for row, of_class in enumerate(classes) if of_class in found.classes]
            without = [(together[row][0], classes[row]) for row in range(len(classes)) if row not in rows]
            left_out += [f"{name}: no prototypes of {_class_name(table, of_class)}" for name, of_class in without]
            if rows:
                targets = [classes[row] for row in rows]
                compared = audit(
                    attribution, prepared[rows], composite, found, concept, k=k, targets=targets, table=table
                )
                audited += zip([together[row][0] for row in rows], compared, strict=True)
    return sorted(audited, key=lambda pair: pair[1].percentile), left_out


def _readable(
    dataset: Any, numbers: Sequence[int], data: str, left_out: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of samples that can be read; the others are added to ``left_out``, each with its reason."""
    from crp.visualization.mining.datasets import read
    from crp.visualization.mining.marks import source_of

    for i in numbers:
        sample, name = read(dataset, i), getattr(source_of(dataset, i), "name", "") or f"{data} {i}"
        if sample.problem is not None:
            reason = sample.problem.reason
            left_out.append(reason if name in reason else f"{name}: {reason}")
        elif not sample.data.is_floating_point():
            raise CommandError(f"--data {data} holds texts, or no numbers; crp audit compares texts of the table alone")
        elif not sample.data.isfinite().all():
            left_out.append(f"{name}: its data is not finite")
        else:
            yield name, sample.data


def _describe(table: Table, layer: str) -> Callable[[int], str]:
    """Names of a layer's concepts, as far as its recipe tells what they are."""
    from crp.errors import LoadingError
    from crp.visualization.opening import make_layer_map

    try:
        return make_layer_map(table.header.recipe)[layer].describe
    except (LoadingError, KeyError):
        return "concept {}".format


def _class_name(table: Table, of_class: int) -> str:
    names = table.header.class_names
    return names[of_class] if 0 <= of_class < len(names) else f"class {of_class}"
