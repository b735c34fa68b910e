"""``crp mine``: one pass over a dataset, in one process or many."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from crp.commands.errors import CommandError
from crp.commands.group import _saying_on_interrupt, in_a_line
from crp.commands.loading import _find_layers, _has_random_weights, _load, _picture_options, _weight_options
from crp.commands.processes import _client, _device, _part
from crp.commands.values import _plain, _read_settings, split_names
from crp.wording import counted, first_few

if TYPE_CHECKING:
    from crp.visualization.models import Loaded
    from crp.visualization.table.store import Table

#: Options that are those of `crp.visualization.mine`, under the same names.
_AS_THEY_ARE = ("storage", "start", "stop", "batch_size", "shard_size", "on_error", "retry_skipped", "mixed_shapes")
#: Options that a table remembers, for a run that is given the folder alone.
_REMEMBERED = (
    "model", "weights", "checkpoint", "data", "fields", "layers", "rules", "settings", "targets", "multi_label",
    "modes", "kinds", "mixed_shapes", "batch_size", "shard_size", "size", "mean", "std", "classes", "storage",
    "tokenizer", "position", "output", "decode",
)  # fmt: skip
#: Words before the colon of models that are not the user's own.
_LIBRARIES = ("timm", "hf", "torchvision")


@click.command("mine")
@click.option("--model", help="Name in torchvision, timm:NAME, hf:NAME, or package.module:factory.")
@_weight_options
@click.option("--data", help="Folder of pictures, or package.module:factory of a dataset.")
@click.option("--fields", default="", help="Keys or places of data and label in an item, such as image,label.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the table.")
@click.option("--layers", multiple=True, callback=split_names, help="Name, pattern or type; or auto. See below.")
@click.option("--tokenizer", help="Of texts: a folder or name for Hugging Face, or package.module:factory.")
@click.option("--position", help="Of a language model: each, or a number; -1 explains what follows the last token.")
@click.option("--output", help="What is explained of what the model returns; segmentation, for example. See below.")
@click.option("--composite", "rules", default="epsilon_plus_flat", show_default=True, help="Its name, or none.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of the composite; may be given again.")
@click.option("--targets", default="label", show_default=True, help="label, prediction, top-5, all, or 3,7,12.")
@click.option(
    "--multi-label", type=click.Choice(["list", "hot"]), help="A label is a list of classes, or has a number for each."
)
@click.option("--modes", default="relevance,activation", show_default=True, help="What is recorded.")
@click.option("--kinds", default="sum,max", show_default=True, help="What is recorded over positions.")
@click.option("--mixed-shapes", is_flag=True, help="Samples may differ in shape.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Samples at once.")
@click.option("--shard-size", type=click.IntRange(1), help="Samples in a file; 64 batches by default.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read the data.")
@click.option("--device", help="Such as cuda:1; a GPU if there is one.")
@click.option(
    "--decode",
    type=click.Choice(["host", "device"]),
    default="host",
    show_default=True,
    help="Where JPEGs of a folder are decoded; device is that of the model, by torchcodec or torchvision.",
)
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Of a sample.")
@click.option("--retry-skipped", is_flag=True, help="Mine shards with skipped samples again.")
@click.option("--start", type=click.IntRange(0), default=0, help="First sample.")
@click.option("--stop", type=click.IntRange(1), help="Sample after the last one.")
@click.option("--shard", "share", metavar="I/N", help="Only the shards of process I of N, counted from 0.")
@click.option("--dask", "address", help="Address of a Dask scheduler whose workers mine.")
@_picture_options
@click.option(
    "--storage",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of values; float16 takes little more than half of the space, and keeps three digits.",
)
@click.option("--overwrite", is_flag=True, help="Discard what the folder holds.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="For machines: what crp status --json tells, in the end.")
def mine_command(
    out: Path, overwrite: bool, quiet: bool, share: str | None, address: str | None, as_json: bool, **given: Any
) -> None:
    """Record how relevant and active each concept is in a dataset.

        crp mine --model resnet18 --checkpoint mine.pth --data photos/ --layers auto --out atlas/

    Each folder in photos/ is a class. Afterwards, crp report atlas/ writes pages.

    The same command goes on after an interruption, and so does --out alone: the table says how it was made. Under
    torchrun, every process takes its share of the shards:

        torchrun --nproc-per-node 4 -m crp mine ...

    --layers may be given again, or have commas between. Concepts are channels. Of transformers,
    "blocks.*.attn.proj.input:heads=3" has 3 heads for concepts, as they are in the input of the output projection, and
    "blocks.5:axis=1" tokens, along axis 1.

    --output takes the scores of classes from what a model returns: segmentation (:where=all, :key=NAME) or detection
    (:box=0, :score=log-odds), as in crp.outputs; entry:key=NAME, of a dict; or package.module:function.

        crp mine --model torchvision:fcos_resnet50_fpn --output detection --targets prediction ...
    """
    part = _part(share, os.environ)
    if part is not None and (overwrite or address):
        raise CommandError(f"{'--overwrite' if overwrite else '--dask'} does not go with several processes")
    hidden = quiet or (part is not None and part[0] > 0)
    again = "the same command without --overwrite" if overwrite else "the same command"
    kept = f"All whole shards are kept in {out}; {again} goes on from there."
    with _saying_on_interrupt(kept):
        given = given if overwrite else _with_earlier(out, given)
        if missing := [f"--{name}" for name in ("model", "data", "layers") if not given[name]]:
            hint = "; --layers auto chooses some" if "--layers" in missing else ""
            raise CommandError(f"{', '.join(missing)} must be given: {out} holds no table that says it{hint}")
        table = _run(out, part, address, given, overwrite=overwrite, progress=not hidden)
    from crp.commands.table import _describe, _facts

    done = "" if part is None else f"part {part[0]}/{part[1]} is done; "
    click.echo(json.dumps(_facts(table)) if as_json else f"{done}{_describe(table)}")
    coverage = table.coverage()
    if part is None and coverage.skipped and not any(shard.rows for shard in table.shards):
        reason = next(iter(coverage.skipped.values()))
        raise CommandError(f"nothing was mined: {counted(len(coverage.skipped), 'sample')} skipped ({reason})")


def _run(out: Path, part: tuple[int, int] | None, address: str | None, given: dict[str, Any], **settings: Any) -> Table:
    from crp.attribution import CondAttribution
    from crp.commands.concepts import concepts_of_layers, first_sample
    from crp.commands.texts import concepts_of_texts
    from crp.visualization.mining.run import mine
    from crp.visualization.mining.targets import parse_targets
    from crp.visualization.models import check_repeatable
    from crp.visualization.sources import MULTI_LABEL, load_source, load_texts

    named = given["targets"].strip()
    targets = parse_targets([int(t) for t in named.split(",")] if re.fullmatch(r"\d+(,\d+)*", named) else named)
    if _has_random_weights(given["model"], given["weights"], given["checkpoint"]):
        raise CommandError(
            f"{given['model']} has random weights, of which nothing can be mined; give --weights or --checkpoint"
        )
    source = _open_data(given["data"], given["decode"])
    loading = ("output", "weights", "checkpoint", "size", "mean", "std", "classes")
    loaded = _load(given["model"], **{name: given[name] for name in loading})
    if ":" in given["model"] and not given["checkpoint"] and given["model"].partition(":")[0] not in _LIBRARIES:
        check_repeatable(given["model"], loaded.model)
    dataset: Any = load_texts(source, given["tokenizer"], given["position"], given["fields"], given["model"])
    preprocess = labels = outputs = None
    composite = _make_composite(given["rules"], given["settings"])
    if dataset is None:
        words = {word: _find_layers(loaded, [word.partition(":")[0]]) for word in given["layers"]}
        fields = [field for field in given["fields"].split(",") if field]
        dataset, preprocess = load_source(source, fields, loaded, by_label=targets == "label", decode=given["decode"])
        pictures_given = _takes_pictures(dataset, given)
        sample = first_sample(dataset, preprocess)
        outputs = _count_outputs(loaded, sample)
        concepts = concepts_of_layers(loaded.model, words, sample)
        labels = getattr(dataset.dataset, "labels", None) if isinstance(source, Path) else None
    else:
        pictures_given = _takes_pictures(dataset, given)
        concepts = concepts_of_texts(loaded, given["layers"])
    _check_outside(out, given["data"])
    if outputs is not None:
        _check_outputs(loaded, outputs, targets, labels or {}, source)
    if settings["progress"]:
        _describe_run(list(concepts), len(dataset), pictures_given, loaded, labels)
    with _client(address) as client:
        return mine(
            CondAttribution(loaded.model.to(_device(given["device"])), output=loaded.output),
            dataset,
            concepts,
            composite,
            out,
            preprocess=preprocess,
            single_targets=MULTI_LABEL.get(given["multi_label"]),
            modes=given["modes"].split(","),
            kinds=given["kinds"].split(","),
            num_workers=given["workers"],
            targets=targets,
            recipe=_recipe(given, loaded, labels, outputs),
            part=part,
            client=client,
            **{name: given[name] for name in _AS_THEY_ARE},
            **settings,
        )


def _open_data(data: str, decode: str) -> Any:
    from crp.visualization.sources import open_source

    source = open_source(data)
    if decode == "device" and not isinstance(source, Path):
        raise CommandError(
            f"--decode device is for a folder of pictures, and --data {data} gives {type(source).__name__}; a "
            "dataset of files may be a crp.visualization.Decoded, without this option"
        )
    return source


def _check_outside(out: Path, data: str) -> None:
    """Refuse to write into the folder of the data, whose pictures and class folders are read from then on."""
    if not Path(data).is_dir() or not out.resolve().is_relative_to(Path(data).resolve()):
        return
    inside = out.resolve().relative_to(Path(data).resolve()).parts
    if not any(part.startswith(".") for part in inside):  # (hidden folders are no data)
        raise CommandError(f"--out {out} is in the folder of the data, {data}, and would be read as data; name another")


def _takes_pictures(dataset: Any, given: dict[str, Any]) -> bool:
    """Whether samples are pictures; options about them are refused where there are none."""
    from crp.visualization.decoding import Decoded
    from crp.visualization.mining.datasets import Pairs
    from crp.visualization.sources import gives_pictures

    found = isinstance(dataset, Pairs | Decoded) and gives_pictures(dataset)
    unused = [f"--{option}" for option in ("size", "mean") if given[option]]
    if unused and not found:
        raise CommandError(
            f"{', '.join(unused)}: this dataset gives tensors, which are taken as they are; pictures alone are prepared"
        )
    return found


def _with_earlier(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Options, and where they are left out those with which the table in the folder was made."""
    from crp.visualization.table.store import Table

    if not Table.exists(out):
        return given
    earlier = Table.open(out).header.recipe.get("command")
    context = click.get_current_context()
    typed = {name for name in given if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if not isinstance(earlier, dict) or typed & {"model", "data", "layers"} == {"model", "data", "layers"}:
        return given
    as_typed = {parameter.name: parameter for parameter in context.command.params}
    found = {name: earlier[name] for name in _REMEMBERED if name in earlier and name not in typed}
    return given | {name: as_typed[name].process_value(context, value) for name, value in found.items()}


def _describe_run(
    layers: Sequence[str], n: int, pictures: bool, loaded: Loaded, labels: Mapping[str, int] | None
) -> None:
    """Say what was decided for the user: layers, how pictures are prepared, and which class a folder is."""
    click.echo(_plain(f"layers     {first_few(layers, 20)}"))
    if pictures:
        prepared = loaded.normalized or "not normalised, in 0..1 (--mean and --std do it, where the training did)"
        click.echo(f"pictures   {n}, {prepared}")
    if labels is not None:
        folders = [f"{name} {labels[name]}" for name in sorted(labels, key=lambda one: labels[one])]
        click.echo(_plain(f"classes    {first_few(folders, 20)}"))


def _recipe(
    given: dict[str, Any], loaded: Loaded, labels: Mapping[str, int] | None, outputs: int | None
) -> dict[str, Any]:
    """What the command line says of a table; places of files are written out, so that they hold from any folder."""
    command: dict[str, Any] = {name: given[name] for name in _REMEMBERED}
    for name in ("checkpoint", "classes", "data", "tokenizer"):
        if given[name] and Path(given[name]).exists():
            command[name] = str(Path(given[name]).resolve())
    model = {"named": given["model"], "weights": given["weights"], "outputs": outputs}
    if given["checkpoint"]:
        content = Path(given["checkpoint"]).read_bytes()
        model |= {"checkpoint": command["checkpoint"], "sha256": hashlib.sha256(content).hexdigest()}
    names = list(loaded.classes)
    if not names and labels is not None:
        names = sorted(labels, key=lambda name: labels[name])
    output = {} if given["output"] is None else {"output": {"named": given["output"]}}
    return {
        "model": model,
        "dataset": {"named": command["data"]},
        "class_names": names or None,
        "command": command,
        **output,
    }


def _count_outputs(loaded: Loaded, sample: Any) -> int | None:
    """Number of the model's outputs, told by the first sample that can be read; None where they are no classes."""
    import torch

    from crp.errors import OutOfRangeError
    from crp.visualization.models import select_scores

    if sample is None:
        return None  # mining will tell why
    output = loaded.run(sample)
    if loaded.output is not None:
        with suppress(OutOfRangeError):  # (of a picture in which a detector finds nothing)
            output = select_scores(output, loaded.output)
    return output.shape[1] if isinstance(output, torch.Tensor) and output.dim() == 2 else None


def _check_outputs(
    loaded: Loaded, n: int, targets: str | tuple[int, ...], labels: Mapping[str, int], data: Path
) -> None:
    """Refuse targets that the model has not, and names or folders of other classes than those that it has."""
    loaded.check_names(n)
    if not isinstance(targets, str) and targets[-1] >= n:
        raise CommandError(f"--targets {targets[-1]}: the model has {counted(n, 'output')}, 0 to {n - 1}")
    if labels and loaded.classes and len(loaded.classes) != n:
        raise CommandError(
            f"the model names {counted(len(loaded.classes), 'class', 'classes')} and has {counted(n, 'output')}: name "
            "these by --classes, or give --targets prediction"
        )
    if labels and not loaded.classes and len(labels) != n:
        raise CommandError(
            f"--data {data} has {counted(len(labels), 'class folder')} and the model {counted(n, 'output')}: say by "
            "--classes which they are (a file with the name of each output in a line), or give --targets prediction"
        )


def _make_composite(name: str, settings: Sequence[str]) -> Any:
    """Composite of a name of the registry, or of ``"none"``, with settings such as ``"epsilon=1e-6"``."""
    from crp.composites import get

    keywords = _read_settings(settings, "--set", "KEY=VALUE, such as epsilon=1e-6")
    if name == "none":
        if settings:
            raise CommandError("--set is for a composite, and --composite is none")
        return None
    try:
        return get(name, **keywords)
    except KeyError as error:
        raise CommandError(str(error)) from error
    except Exception as error:  # (of any kind, as a setting may be of any)
        raise CommandError(f"--composite {name}: {in_a_line(error)}; --set KEY=VALUE gives it") from error
