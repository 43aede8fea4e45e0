"""The table of results: a row a setting, means over its seeds."""
import dataclasses

import numpy

from figures.study import title


@dataclasses.dataclass
class Column:
    heading: str
    value: str  # its name in results.h5
    digits: int
    meaning: str
    unit: float = 1  # what a value is divided by
    spread: bool = False  # with the smallest and largest over the seeds
    sparse: bool = False  # left blank for full attention, where it has another unit


COLUMNS = [
    Column("density", "density", 3, "share of the tokens that a causal query could attend and did, "
           "over all layers, heads and queries of the validation text; sparsity is 1 - density"),
    Column("router density", "router_density", 3, "entries that the method read to choose "
           "(summaries, pooled windows), over the same denominator"),
    Column("active blocks", "active_blocks", 1, "blocks a query read; full attention chooses none",
           sparse=True),
    Column("perplexity", "perplexity", 3, "exp of the mean loss a token on the validation text, in "
           "brackets the smallest and largest over the seeds; smaller is better", spread=True),
    Column("loss", "loss", 4, "the same as nats a token"),
    Column("attention ms", "attention_ms", 2, "time in attention, forward and backward, for one "
           "sequence; median over the steps"),
    Column("train tokens/s", "train_tokens_per_second", 0, "tokens a second in training; median "
           "over the steps"),
    Column("eval tokens/s", "eval_tokens_per_second", 0, "tokens a second in evaluation"),
    Column("peak MiB", "peak_memory_bytes", 0, "the most memory that a run held", unit=2**20),
    Column("router entropy", "routing_entropy", 3, "entropy of the router's weights in nats: 0 "
           "where it is sure of one block"),
    Column("recall", "recall_accuracy", 3, "share of the questions about the context that were "
           "answered rightly", spread=True),
]


def table(study):
    """(the columns that anything was measured for, [(name, seeds, cells)])."""
    settings = [s for s in study.all_settings if any("loss" in run.values for run in s.runs)]
    columns = [c for c in COLUMNS if any(measured(s, c) for s in settings)]
    return columns, [(title(s), len(s.seeds), [cell(s, c) for c in columns]) for s in settings]


def measured(setting, column):
    return not (column.sparse and setting.method == "full") and \
        any(column.value in run.values for run in setting.runs)


def cell(setting, column):
    if not measured(setting, column):
        return ""
    values = setting.values(column.value) / column.unit
    text = f"{values.mean():.{column.digits}f}"
    if column.spread and len(values) > 1:
        text += f" [{values.min():.{column.digits}f}, {values.max():.{column.digits}f}]"
    return text


def text_table(study):
    columns, rows = table(study)
    lines = [["setting", "seeds"] + [column.heading for column in columns]]
    lines += [[name, str(seeds)] + cells for name, seeds, cells in rows]
    widths = numpy.array([[len(text) for text in line] for line in lines]).max(0)
    return "\n".join("  ".join([line[0].ljust(widths[0])] +
                               [text.rjust(width) for text, width in zip(line[1:], widths[1:])])
                     for line in lines)
