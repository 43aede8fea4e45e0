"""Validation perplexity against what a method saves: tokens not read, or time in attention."""
import math

from figures.area import describe_areas
from figures.style import FULL, foot_note, method_look, method_name, new_figure, spread_note
from figures.study import Absent


def draw_sparsity(study):
    require_losses(study, "sparsity")
    figure, axes = new_figure(study, "Validation perplexity against sparsity", size=(6.4, 5.2))
    axes = axes[0, 0]
    draw_points(axes, study, "sparsity")
    axes.set_xlabel("sparsity: share of the causal context that was not read (1 - measured density)")
    foot_note(figure, notes(study, "sparsity"))
    return figure


def draw_time(study):
    require_losses(study, "attention_ms")
    figure, axes = new_figure(study, "Validation perplexity against attention time",
                              size=(6.4, 5.2))
    axes = axes[0, 0]
    draw_points(axes, study, "attention_ms")
    if study.full and has_point(study.full, "attention_ms"):
        axes.plot(study.full.mean("attention_ms"), study.full.mean("perplexity"), "k*", markersize=9)
        draw_bars(axes, study.full, "attention_ms", "black")
    axes.set_xlim(left=0)
    axes.set_xlabel("time in attention, forward and backward (ms a sequence)")
    # Of runs put side by side it is not known what ran beside them.
    alone = ", runs one after another" if study.protocol else ""
    taken = ("Time: median over the training steps, forward plus backward of one sequence on one "
             f"rank{alone}. Curves join the settings from dense to sparse.")
    foot_note(figure, [taken] + notes(study, "time"))
    return figure


def require_losses(study, x):
    if not study.methods:
        raise Absent("there is full attention alone")
    if not any(has_point(s, x) for method in study.methods for s in study.of(method)):
        raise Absent(f"no setting has `perplexity` and `{x}`")


def has_point(setting, x):
    """Whether all its runs measured both, and none diverged."""
    return math.isfinite(setting.mean(x)) and math.isfinite(setting.mean("perplexity"))


def draw_points(axes, study, x):
    if study.full and has_point(study.full, "sparsity"):
        level = study.full.values("perplexity")
        axes.axhline(level.mean(), label=method_name("full"), **FULL)
        axes.axhspan(level.min(), level.max(), color="0.85", zorder=0)
    for method in study.methods:
        # From dense to sparse, as the study has them: measured times need not fall with what is read.
        settings = [s for s in study.of(method) if has_point(s, x)]
        look = method_look(method, study.methods)
        axes.plot([s.mean(x) for s in settings], [s.mean("perplexity") for s in settings],
                  label=method_name(method), **look)
        for setting in settings:
            draw_bars(axes, setting, x, look["color"])
    axes.set_ylabel("validation perplexity (a token)")
    axes.margins(y=0.15)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=4)


def draw_bars(axes, setting, x, color):
    def around(name):
        values = setting.values(name)
        below, above = values.mean() - values.min(), values.max() - values.mean()
        return [[max(0, below)], [max(0, above)]]  # equal values may round to less than 0

    if len(setting.seeds) > 1:
        axes.errorbar(setting.mean(x), setting.mean("perplexity"), xerr=around(x),
                      yerr=around("perplexity"), capsize=3, linewidth=1, color=color)


def notes(study, figure):
    return spread_note(study) + describe_areas(study, figure)
