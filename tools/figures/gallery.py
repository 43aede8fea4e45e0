"""The figures there are, in the order of the page, with what each says in a sentence or two."""
import dataclasses
import itertools

import matplotlib.figure
import matplotlib.pyplot as plt

from figures.area import CURVES, describe_areas
from figures.heads import draw_heads
from figures.position import draw_position
from figures.routing import draw_routing
from figures.study import Absent
from figures.tradeoff import draw_sparsity, draw_time
from figures.training import draw_training

FIGURES = {  # file name: (title, drawing, what it says)
    "sparsity": (
        "Perplexity against sparsity", draw_sparsity,
        "What is lost when less is read: the lower and the further right a curve, the better. The "
        "line is full attention under the same conditions."),
    "time": (
        "Perplexity against attention time", draw_time,
        "What is lost for the time that is saved: the lower and the further left, the better. The "
        "star is full attention."),
    "training": (
        "Training", draw_training,
        "Means over the last fiftieth of the training. The scales of the losses leave out the first "
        "twentieth. Runs with the same seed see the same batches, so that their difference shows "
        "more than the curves."),
    "heads": (
        "Density by layer and head", draw_heads,
        "The share of the causal context that each key-value head read. Full attention reads 1 "
        "everywhere and is not shown."),
    "position": (
        "Loss by position", draw_position,
        "A model that uses its context predicts later tokens better. A method that misses what is "
        "far away falls behind full attention at late positions."),
    "routing": (
        "Entropy of the router", draw_routing,
        "The more candidates, the closer a softmax comes to spreading its weight over all of them "
        "(the dotted ceiling). A router that does not disperse stays below and level."),
}


@dataclasses.dataclass
class Drawn:
    name: str
    title: str
    meaning: str
    figure: matplotlib.figure.Figure


def draw_all(study):
    """The figures whose data there are, and a sentence for each of the others."""
    drawn, absent = [], []
    for name, (title, draw, meaning) in FIGURES.items():
        try:
            drawn.append(Drawn(name, title, meaning, draw(study)))
        except Absent as reason:
            absent.append(f"no figure `{name}`: {reason}")
    plt.close("all")  # pyplot's own list of them
    return drawn, absent


def area_lines(study, drawn):
    """What describe_areas says of the figures drawn."""
    return list(itertools.chain.from_iterable(describe_areas(study, each.name) for each in drawn
                                              if each.name in CURVES))
