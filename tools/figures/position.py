"""Loss by position: whether a method makes use of a long context."""
from figures.panels import draw_panels, excess, method_columns
from figures.study import Absent
from figures.style import position_axis

TABLE = "eval/loss_by_position"


def draw_position(study):
    if not any(s.has(TABLE) for s in study.settings):
        raise Absent(f"no run has `{TABLE}`")
    rows = [("validation loss\n(nats a token)", curves, position_axis)]
    if study.full and study.full.has(TABLE) and study.methods:
        rows += [("loss over that of\nfull attention (nats)", excess(study, curves),
                  position_axis)]
    return draw_panels(study, "Validation loss by position", rows, method_columns(study),
                       "position in the sequence (tokens)")


def curves(setting):
    if not setting.has(TABLE):
        return None
    tables = setting.tables(TABLE)
    return tables[0, :, :2].mean(1), tables[:, :, 2]
