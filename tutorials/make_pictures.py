"""Makes the picture of the README: `python tutorials/make_pictures.py`, about 20 seconds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlusFlat
from crp.concepts import ChannelConcept
from crp.demo import Box, load_digits_data, train
from crp.image import imgify, overlay
from crp.visualization import FeatureVisualization

PATH = Path(__file__).parent / "pictures" / "overview.png"
LAYER = "relu2"
CORNER = Box(0, 0, 8, 8)
INK, MUTED, ACCENT = "#24292f", "#6e7781", "#b22222"
N_REFERENCES = 6


def draw(axes: Axes, picture: object, colour: str = "#d0d7de", width: float = 0.8) -> None:
    """Show a picture in a thin frame."""
    axes.imshow(picture)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width)


def main() -> None:
    """Train, attribute, mine, and draw what was found."""
    data = load_digits_data(seed=0)
    attribution = CondAttribution(train(data.train, seed=0, verbose=False))
    composite, concept = EpsilonPlusFlat(), ChannelConcept()
    digit = data.mark.digit
    sample = data.test.images[data.test.marked][3:4]

    whole = attribution(sample, [{"y": digit}], composite, record_layer=[LAYER])
    shares = concept.attribute(whole.relevances[LAYER])[0]
    parts = attribution(sample, [{"y": digit, LAYER: [c]} for c in range(len(shares))], composite).heatmap
    in_corner = CORNER.share(parts)
    on_mark = int((shares * in_corner).argmax())
    of_shape = (shares * (in_corner < 0.5)).argsort(descending=True)[:2].tolist()
    chosen = [on_mark, *of_shape]

    with tempfile.TemporaryDirectory() as folder:
        fv = FeatureVisualization(attribution, data.test, {LAYER: concept}, path=folder)
        fv.run(composite, 0, len(data.test), progress=False)
        references = fv.get_max_reference(chosen, LAYER, r_range=(0, N_REFERENCES), composite=composite, plot_fn=None)

    figure = plt.figure(figsize=(12.4, 4.9), facecolor="white")
    columns = [1.62, 0.34, 1, 1.15, *[1] * N_REFERENCES]
    grid = figure.add_gridspec(
        6, len(columns), width_ratios=columns, left=0.012, right=0.988, top=0.83, bottom=0.03, wspace=0.07, hspace=0.25
    )

    left = [figure.add_subplot(grid[:3, 0]), figure.add_subplot(grid[3:, 0])]
    draw(left[0], imgify(sample[0], cmap="gray"))
    draw(left[1], imgify(whole.heatmap[0], symmetric=True, level=2))
    rows = []
    for i, c in enumerate(chosen):
        axes = [figure.add_subplot(grid[2 * i : 2 * i + 2, j]) for j in (2, *range(4, len(columns)))]
        colour, width = (ACCENT, 2.0) if c == on_mark else ("#d0d7de", 0.8)
        draw(axes[0], imgify(parts[c], symmetric=True, level=2), colour, width)
        for panel, image, heatmap in zip(axes[1:], *references[c], strict=True):
            draw(panel, overlay(image, heatmap, resize=160), colour, width)
        rows.append(axes)

    figure.canvas.draw()
    for c, axes in zip(chosen, rows, strict=True):
        box, following = axes[0].get_position(), axes[1].get_position()
        x, y = (box.x1 + following.x0) / 2, (box.y0 + box.y1) / 2
        colour, sees = (ACCENT, "sees the mark") if c == on_mark else (INK, "")
        style = {"ha": "center", "va": "top", "color": colour}
        figure.text(x, y + 0.07, f"channel {c}", weight="bold", **style)
        figure.text(x, y + 0.02, f"{shares[c]:.0%} of the\nrelevance", size=9.5, linespacing=1.3, **style)
        figure.text(x, y - 0.07, sees, size=9.5, style="italic", **style)

    heads = [
        (left[0].get_position(), f"Why “{digit}”?", ""),
        (rows[0][0].get_position(), "Which concept?", "conditional heatmaps"),
        (rows[0][1].get_position(), "What does it stand for?", "the pictures in which it was most relevant"),
    ]
    for box, head, below in heads:
        figure.text(box.x0, 0.945, head, weight="bold", size=13, va="center")
        figure.text(box.x0, 0.88, below or "picture and heatmap", color=MUTED, size=10.5, va="center")
    x = (left[0].get_position().x1 + rows[0][0].get_position().x0) / 2
    figure.add_artist(Rectangle((x, 0.03), 0.0006, 0.8, color="#d0d7de", transform=figure.transFigure))

    PATH.parent.mkdir(exist_ok=True)
    figure.savefig(PATH, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 11, "text.color": INK}):
        main()
