"""A method's curve as one number.

The curve is the logarithm of the validation perplexity (the loss in nats a token) over x, sparsity
or attention time, straight between the settings of a seed in the order of x. The number is the area between it and the
loss of full attention with the same seed (the mean, where that seed lacks it), over the range of x
that all curves of all methods share: smaller is better, 0 is full attention. Divided by the width of
the range it is the mean excess loss at equal x.
"""
import numpy

from figures.style import method_name

CURVES = {  # figure: (the value that x is, its name, its unit)
    "sparsity": ("sparsity", "sparsity", ""),
    "time": ("attention_ms", "attention time", " ms"),
}


def areas(study, x):
    """The range (low, high) of the value named `x` that the curves share, None without curves; and,
    by method, the areas [seeds] over it, empty where the range is. A method without two settings
    for any seed has no curve and is left out."""
    curves = {method: found for method in study.methods if (found := seed_curves(study, method, x))}
    everything = [xs for found in curves.values() for xs, _ in found]
    if not everything:
        return None, {}
    low, high = max(xs[0] for xs in everything), min(xs[-1] for xs in everything)
    if not low < high:
        return (low, high), {}
    return (low, high), {method: numpy.array([area(*curve, low, high) for curve in found])
                         for method, found in curves.items()}


def seed_curves(study, method, x):
    """(x ascending, excess loss) for each seed with two settings or more."""
    full = dict(zip(study.full.seeds, study.full.values("loss")))
    curves = []
    for seed in study.seeds:
        points = []
        for setting in study.of(method):
            for run_seed, at, loss in zip(setting.seeds, setting.values(x),
                                          setting.values("loss")):
                excess = loss - full.get(seed, study.full.mean("loss"))
                if run_seed == seed and numpy.isfinite([at, excess]).all():
                    points.append((at, excess))
        xs, excess = numpy.array(sorted(points)).reshape(-1, 2).T
        if len(set(xs)) > 1:
            curves.append((xs, excess))
    return curves


def area(xs, excess, low, high):
    knots = numpy.concatenate([[low], xs[(xs > low) & (xs < high)], [high]])
    heights = numpy.interp(knots, xs, excess)
    return float(((heights[1:] + heights[:-1]) / 2 * numpy.diff(knots)).sum())


def describe_areas(study, figure):
    """Lines about the curves of a figure in CURVES: what was computed, and the methods' areas."""
    x, name, unit = CURVES[figure]
    if study.full is None:
        return ["No area: there is no full attention to hold the curves against."]
    between, found = areas(study, x)
    without = [method_name(method) for method in study.methods if method not in found]
    if between is None:
        return ["No area: a curve takes two finished settings of a method with the same seed, and "
                "full attention."]
    if not found:
        return [f"No area: the curves of {', '.join(without)} share no range of {name}."]
    low, high = between
    lines = [f"Area between log perplexity and that of full attention, over {name} {low:.3g} to "
             f"{high:.3g}{unit}; in parentheses divided by that width, the mean excess in nats a "
             "token. Smaller is better."]
    for method, values in found.items():
        line = f"{method_name(method)}: {values.mean():.4g} ({values.mean() / (high - low):.4f})"
        if len(values) > 1:
            line += f", {values.min():.4g} to {values.max():.4g} over {len(values)} seeds"
        lines.append(line)
    if without:
        lines.append(f"No area, since no seed has two settings: {', '.join(without)}.")
    return lines
