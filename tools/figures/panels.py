"""Curves of all settings: a column a method, with full attention in each; a row a quantity."""
import numpy

from figures.style import (FULL, draw_spread, foot_note, method_name, new_figure, nth, same_scale,
                           spread_note)


def draw_panels(study, title, rows, columns, x_name):
    """A row is (name of its y axis, curves, dress): curves(setting) gives x [points] and y [seeds,
    points], or None where there is nothing to draw; dress(axes) is called for every panel that has
    something. A column is (title, settings)."""
    size = (max(6.4, 3.3 * len(columns)), 1.3 + 2.2 * len(rows))
    figure, axes = new_figure(study, title, len(rows), len(columns), size)
    for cells, (y_name, curves, dress) in zip(axes, rows):
        for cell, (_, settings) in zip(cells, columns):
            draw_panel(cell, study, settings, curves)
        drawn = [cell for cell in cells if cell.has_data()]
        for cell in drawn:
            dress(cell)
        if drawn:
            drawn[0].set_ylabel(y_name)
        # What came before is another stage: its own scale.
        compared = [cell for cell, (_, settings) in zip(cells, columns)
                    if cell.has_data() and settings[0].role == "compared"]
        if compared:
            same_scale(compared)
    for i, (heading, _) in enumerate(columns):
        drawn = [cell for cell in axes[:, i] if cell.has_data()]
        for cell in set(axes[:, i]) - set(drawn):
            cell.remove()
        if len(drawn) == 1:
            drawn[0].set_subplotspec(drawn[0].get_gridspec()[:, i])
        if drawn:
            drawn[0].set_title(heading)
            drawn[-1].set_xlabel(x_name)
            height = drawn[-1].get_position().height * figure.get_figheight()
            drawn[-1].legend(*drawn[0].get_legend_handles_labels(), loc="upper center",
                             bbox_to_anchor=(0.5, -0.45 / height))  # inches: under the name of x
    foot_note(figure, spread_note(study))
    return figure


def draw_panel(axes, study, settings, curves):
    if settings[0].role == "compared" and study.full and study.full not in settings:
        draw_setting(axes, study.full, curves, method_name("full"), FULL)
    for i, setting in enumerate(settings):
        look = FULL if setting.method == "full" else nth(i)
        draw_setting(axes, setting, curves, setting.label or method_name(setting.method), look)


def draw_setting(axes, setting, curves, label, look):
    found = curves(setting)
    if found is not None and len(found[0]):
        draw_spread(axes, *found, label=label, **look)


def method_columns(study):
    """A column for each method; full attention alone, where there is no other."""
    columns = [(method_name(method), study.of(method)) for method in study.methods]
    return columns or [(method_name("full"), study.of("full"))]


def excess(study, curves):
    """The same curves minus full attention's, with the same seed where it has that seed."""
    def over_full(setting):
        if study.full is None or setting is study.full or setting.role == "dense":
            return None
        mine, full = curves(setting), curves(study.full)
        if mine is None or full is None:
            return None
        x, at, full_at = numpy.intersect1d(mine[0], full[0], return_indices=True)
        by_seed = dict(zip(study.full.seeds, full[1][:, full_at]))
        mean = full[1][:, full_at].mean(0)
        return x, numpy.stack([y[at] - by_seed.get(seed, mean)
                               for seed, y in zip(setting.seeds, mine[1])])
    return over_full
