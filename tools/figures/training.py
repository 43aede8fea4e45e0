"""Training curves: loss, what it has over full attention's, and the density the queries read."""
import numpy

from figures.panels import draw_panels, excess, method_columns
from figures.study import Absent

POINTS = 300  # a curve is drawn with, so that an SVG stays small


def draw_training(study):
    if not any(s.has("training/loss") for s in study.all_settings):
        raise Absent("no run has `training/loss`")
    loss, density = curves_of("training/loss"), curves_of("training/density")
    rows = [("training loss\n(nats a token)", shown(loss), cut_start)]
    if study.full and study.methods:
        rows += [("loss over that of\nfull attention (nats)", shown(excess(study, loss)),
                  cut_start)]
    if study.methods:
        rows += [("density read", lambda s: shown(density)(s) if s.role == "compared" else None,
                  lambda axes: axes.set_ylim(bottom=0))]
    before = [("full attention, before", study.dense)] if study.dense else []
    return draw_panels(study, "Training", rows, before + method_columns(study), "training step")


def curves_of(name):
    def curves(setting):
        if not (setting.has("training/step") and setting.has(name)):
            return None
        return setting.tables("training/step")[0], setting.tables(name)
    return curves


def shown(curves):
    """Means over the last fiftieth of the training, at POINTS steps."""
    def smoothed(setting):
        found = curves(setting)
        if found is None or not len(found[0]):
            return None
        x, y = found
        width = max(1, len(x) // 50)
        means = numpy.stack([numpy.convolve(row, numpy.full(width, 1 / width), "valid")
                             for row in y])
        stride = -(-len(x) // POINTS)
        return x[width - 1::stride], means[:, ::stride]
    return smoothed


def cut_start(axes):
    """Leaves the first twentieth out of the scale: the fall from the start would squeeze the rest."""
    kept = [line.get_ydata()[len(line.get_ydata()) // 20:] for line in axes.get_lines()]
    values = numpy.concatenate([y[numpy.isfinite(y)] for y in kept] or [[]])
    if len(values):
        margin = 0.05 * (values.max() - values.min()) or 0.1
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, values.min() - margin), min(high, values.max() + margin))
