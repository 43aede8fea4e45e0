"""Density of each layer and key-value head: where a method reads much and where little."""
import numpy

from figures.study import Absent, title
from figures.style import new_figure

TABLE = "eval/density"
NUMBERED = 64  # cells that a panel may have for the numbers to be legible


def draw_heads(study):
    found = [[s for s in study.of(method) if s.has(TABLE)] for method in study.methods]
    found = [settings for settings in found if settings]
    if not found:
        raise Absent(f"no sparse run has `{TABLE}`")
    maps = {s: s.tables(TABLE).mean(0) for settings in found for s in settings}
    columns = max(map(len, found))
    layers = max(len(values) for values in maps.values())
    figure, axes = new_figure(study, "Density read by each layer and key-value head", len(found),
                              columns, (max(6.4, 2.3 * columns),
                                        0.9 + max(2.1, 0.9 + 0.22 * layers) * len(found)))
    for cell in axes.flat:
        cell.set_axis_off()
    top = max(numpy.nanmax(values) for values in maps.values())
    for row, settings in zip(axes, found):
        for cell, setting in zip(row, settings):
            image = draw_map(cell, maps[setting], top)
            cell.set_title(title(setting).replace(", ", "\n", 1))
        row[0].set_ylabel("layer")
    for cell in axes[-1]:
        cell.set_xlabel("key-value head")
    figure.colorbar(image, ax=axes, label="density (mean over seeds)", shrink=0.8)
    return figure


def draw_map(axes, values, top):
    axes.set_axis_on()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(0, values.shape[0], -(-values.shape[0] // 16)))
    if values.size <= NUMBERED:
        for (layer, head), value in numpy.ndenumerate(values):
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7,
                      color="black" if value > top / 2 else "white")
    return image
