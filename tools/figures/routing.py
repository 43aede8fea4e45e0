"""Entropy of DashAttention's router against the length of the context: does it disperse as a softmax
over the same scores does, or stay concentrated as the candidates grow in number?"""
import numpy

from figures.study import Absent, title
from figures.style import (COLORS, draw_spread, foot_note, new_figure, position_axis, same_scale,
                           spread_note)

TABLE = "eval/routing"
COLUMNS = 3


def draw_routing(study):
    settings = [s for s in study.settings if s.has(TABLE)]
    if not settings:
        raise Absent(f"no run has `{TABLE}`")
    columns = min(COLUMNS, len(settings))
    rows = -(-len(settings) // columns)
    figure, axes = new_figure(study, "Entropy of the router by position", rows, columns,
                              (max(6.4, 3.3 * columns), 1.2 + 2.6 * rows))
    for cell in axes.flat[len(settings):]:
        cell.set_axis_off()
    for cell, setting in zip(axes.flat, settings):
        draw_entropies(cell, setting.tables(TABLE))
        cell.set_title(title(setting))
        position_axis(cell)
        cell.set_xlabel("position in the sequence (tokens)")
    same_scale(axes.flat[:len(settings)])
    for cell in axes[:, 0]:
        cell.set_ylabel("entropy (nats)")
    axes[0, 0].legend(loc="upper left")
    foot_note(figure, spread_note(study))
    return figure


def draw_entropies(axes, tables):
    """tables: [seeds, bins, 5]. Bins where most queries have no choice are left out."""
    tables = tables[:, (tables[:, :, 2] > 1).all(0)]
    at = tables[0, :, :2].mean(1)
    draw_spread(axes, at, numpy.log(tables[:, :, 2]), label="log(number of candidates)",
                color="black", linestyle=":")
    draw_spread(axes, at, tables[:, :, 4], label="softmax of the same scores", color=COLORS[1],
                linestyle="--", marker="s")
    draw_spread(axes, at, tables[:, :, 3], label="the router", color=COLORS[0],
                linestyle="-", marker="o")
