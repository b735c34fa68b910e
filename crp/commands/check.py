"""``crp check``: what a careful user would check of a method on a model, in one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from crp.commands.loading import EXISTING, _load, _picture_options, _weight_options
from crp.commands.values import _plain


@click.command("check")
@click.argument("model")
@click.option("--image", type=EXISTING, required=True, help="Picture that is explained.")
@click.option("--composite", "rules", default="epsilon_plus_flat", show_default=True, help="Its name, or none.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of the composite; may be given again.")
@click.option("--target", help="Class to explain, by name or number; by default, the predicted one.")
@click.option("--output", help="What is explained of what the model returns, as in crp attribute --help.")
@_weight_options
@_picture_options
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def check_command(
    model: str,
    image: Path,
    rules: str,
    settings: tuple[str, ...],
    target: str | None,
    output: str | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Check an explanation of one picture by MODEL. It is a name, or package.module:factory.

    Whether the model predicts the same under the composite, relevance adds up layer by layer, values are finite, the
    same call gives the same heatmap, and shuffled weights another one; and which rule reached how many operations. The
    exit status is 1 where something does not hold.
    """
    from crp.attribution import CondAttribution
    from crp.commands.mine import _make_composite
    from crp.visualization.models import find_class

    composite = _make_composite(rules, settings)
    loaded = _load(model, output, **loading)
    _, data = loaded.read(image)
    attribution = CondAttribution(loaded.model, output=loaded.output)
    y = int(loaded.scores(data)[0].argmax()) if target is None else find_class(target, loaded.classes, "--target")
    checked = attribution.check(data, [{attribution.MODEL_OUTPUT_NAME: y}], composite)
    told = "\n".join(_plain(line) for line in str(checked).replace("\N{MINUS SIGN}", "-").splitlines())
    click.echo(json.dumps(checked.to_dict()) if as_json else told)
    if not checked.holds:
        raise SystemExit(1)
