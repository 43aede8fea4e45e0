"""How figures look: told apart without colour, colours of Okabe and Ito that colour-blind eyes
separate, the same for a method everywhere; and how they are saved."""
import functools
import io
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker

NAMES = {"full": "full attention", "dash": "DashAttention", "nsa": "NSA", "infllmv2": "InfLLM-V2"}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LINES = ["--", "-.", ":", (0, (6, 1, 1, 1, 1, 1))]  # solid is full attention
MARKERS = ["o", "s", "^", "D", "v", "P"]
FULL = {"color": "black", "linestyle": "-", "linewidth": 1}

plt.rcParams.update({
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "lines.markersize": 4.5, "lines.linewidth": 1.3, "svg.hashsalt": "entrain",
})


def method_name(method):
    return NAMES.get(method, method)


def nth(index):
    """Look of the index-th method of a figure, or setting of a panel."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index % len(LINES)],
            "marker": MARKERS[index % len(MARKERS)]}


def method_look(method, methods):
    """Known methods look the same in every figure; others follow in their order among `methods`,
    those of the study."""
    known = [name for name in NAMES if name != "full"]
    return nth([*known, *(name for name in methods if name not in known)].index(method))


def new_figure(study, title, rows=1, columns=1, size=(6.4, 4.4)):
    """A figure and its axes [rows, columns]. The title says what a reader without the text needs."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    width = int(size[0] * 13)
    lines = textwrap.wrap(f"{title}: {study.name}", width) + balanced(study.describe(), width)
    figure.suptitle("\n".join(lines), fontsize=10)
    return figure, axes


def balanced(text, width):
    """Lines of much the same length, as few as the width allows, broken after commas alone."""
    space = "\N{NO-BREAK SPACE}"
    text = text.replace(" ", space).replace("," + space, ", ")
    wrap = functools.partial(textwrap.wrap, text, break_long_words=False, break_on_hyphens=False)
    count = len(wrap(width))
    return wrap(next(w for w in range(1, width + 1) if len(wrap(w)) == count))


def foot_note(figure, lines):
    """Lines under the axes, where they overlap nothing."""
    width = int(figure.get_figwidth() * 16)
    wrapped = [part for line in lines
               for part in textwrap.wrap(line, width, subsequent_indent="  ")]
    if wrapped:
        figure.supxlabel("\n".join(wrapped), x=0.02, ha="left", fontsize=8)


def spread_note(study):
    """A foot note on how seeds are shown, where there are several."""
    if len(study.seeds) == 1:
        return []
    return ["Points and lines are means over the seeds; bars and bands reach from the smallest to "
            "the largest."]


def draw_spread(axes, x, curves, label=None, **look):
    """The mean of curves [seeds, points], and what lies between the smallest and the largest."""
    axes.plot(x, curves.mean(0), label=label, markevery=max(1, len(x) // 8), **look)
    if len(curves) > 1:
        axes.fill_between(x, curves.min(0), curves.max(0), color=look["color"], alpha=0.2,
                          linewidth=0)


def position_axis(axes):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())


def same_scale(cells):
    """Gives all axes a y range that holds what each shows."""
    limits = [cell.get_ylim() for cell in cells]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    margin = 0.03 * (high - low)
    for cell in cells:
        cell.set_ylim(low - margin, high + margin)


def image(figure, kind):
    """The bytes of a figure as "png" or "svg", the same for the same data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150,
                   metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
