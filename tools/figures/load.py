"""Reads a study's results.h5, or run folders, into a Study."""
import contextlib
import json
import pathlib
import statistics

import h5py
import numpy

from figures.study import DataError, Run, Study, config_values

FORMAT = "entrain study 1"
SHAPES = {  # of the datasets in a run's group; 0 is any size
    "eval/loss_by_position": (0, 3), "eval/density": (0, 0), "eval/routing": (0, 5),
    "training/step": (0,), "training/loss": (0,), "training/density": (0,),
}
NOT_VARIED = ("train.seed", "attention.method", "run.dir", "train.init_from")  # told otherwise
TEXTS = ("method", "role", "varied", "config", "init_from", "code_version")


def load(paths):
    """A Study from one study (its folder or results.h5) or from any number of run folders."""
    runs = [path for path in paths if (path / "metrics.jsonl").is_file()]
    if len(runs) == len(paths):
        return load_runs(paths)
    if len(paths) > 1:
        other = next(path for path in paths if path not in runs)
        raise DataError(f"{other} is no run: it has no metrics.jsonl (a study is drawn alone)")
    path = paths[0] / "results.h5" if paths[0].is_dir() else paths[0]
    if not path.is_file():
        raise DataError(f"{paths[0]} is neither a study (results.h5) nor a run (metrics.jsonl)")
    with explained(path, "is no study's results"):
        return load_study(path)


def home(path):
    """The folder that belongs to a study or run given by `path`."""
    return path if path.is_dir() else path.parent


@contextlib.contextmanager
def explained(path, fault):
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path} {fault}: it lacks {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} {fault}: {' '.join(str(error).split())}") from error


def load_study(path):
    with h5py.File(path, "r") as file:
        if text(file.attrs.get("format", "")) != FORMAT:
            raise ValueError(f"its attribute `format` is not \"{FORMAT}\"")
        groups = file.get("runs", {})
        finished = [name for name in groups if "loss" in groups[name].attrs]
        folder = path.resolve().parent
        return Study(folder.name, text(file.attrs["protocol"]), text(file.attrs["study"]),
                     [study_run(name, groups[name]) for name in finished],
                     [name for name in groups if name not in finished])


def study_run(name, group):
    texts = {key: text(group.attrs[key]) for key in TEXTS}
    varied = {key: value for key, value in json.loads(texts["varied"]).items()
              if key not in NOT_VARIED}
    values = {key: float(value) for key, value in group.attrs.items() if key not in TEXTS}
    values["sparsity"] = 1 - values["density"]
    tables = {key: group[key][()].astype(numpy.float64) for key in SHAPES
              if key in group and group[key].size}
    check_shapes(name, tables)
    return Run(name, texts["method"], texts["role"], int(group.attrs["seed"]), varied,
               texts["config"], texts["code_version"], values, tables)


def check_shapes(name, tables):
    for key, table in tables.items():
        shape = SHAPES[key]
        if table.ndim != len(shape) or any(n and n != m for n, m in zip(shape, table.shape)):
            raise ValueError(f"{key} of {name} has the shape {table.shape}")
    if len({len(table) for key, table in tables.items() if key.startswith("training/")}) > 1:
        raise ValueError(f"the datasets under training/ of {name} differ in length")


def text(attribute):
    """Strings of fixed length come as bytes."""
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def load_runs(folders):
    runs = []
    for folder in folders:
        with explained(folder, "is no run"):
            runs.append(folder_run(folder))
    configs = [config_values(run.config) for run in runs]
    starts = [pathlib.Path(config.get("train.init_from", "")).name for config in configs]
    for run, config in zip(runs, configs):
        run.varied = {key: value for key, value in config.items() if key not in NOT_VARIED}
    same = [json.dumps([run.method, run.seed, run.varied], sort_keys=True) for run in runs]
    for run, identity, start in zip(runs, same, starts):
        if same.count(identity) > 1:
            run.varied["run"] = run.name
        if run.name in starts and run.name != start:
            run.role = "dense"
    return Study(", ".join(run.name for run in runs), "", "", runs)


def folder_run(folder):
    config = (folder / "config.yaml").read_text()
    keys = config_values(config)
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # a torn line has no newline
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    if not steps:
        raise ValueError("metrics.jsonl has no training step")
    tables = {f"training/{key}": column(steps, key) for key in ("step", "loss", "density")}
    values = {"train_tokens_per_second": statistics.median(column(steps, "tokens_per_second"))}
    version, ranks = newest_checkpoint(folder)
    if ranks:  # they work side by side, each on its share of the step's sequences
        values["attention_ms"] = 1000 * statistics.median(column(steps, "attention_seconds")) * \
            ranks / int(keys["train.global_batch"])
    evaluation, result = folder / "eval.json", folder / "result.json"
    if evaluation.exists():
        with explained(evaluation, "is no output of `entrain eval --json`"):
            add_evaluation(json.loads(evaluation.read_text()), values, tables)
    elif result.exists():
        with explained(result, "is no result of `entrain sweep`"):
            add_evaluation(json.loads(result.read_text())["eval"], values, tables)
    return Run(folder.resolve().name, keys.get("attention.method", "full"), "compared",
               int(keys.get("train.seed", 0)), {}, config, version, values, tables)


def column(steps, key):
    return numpy.array([line[key] for line in steps], float)


def add_evaluation(evaluation, values, tables):
    def rows(name):
        return numpy.array([list(row.values()) for row in evaluation[name]], float)

    for key, value in evaluation.items():
        if value is None or isinstance(value, (int, float)):
            values[key] = numpy.nan if value is None else float(value)
    values["eval_tokens_per_second"] = values.pop("tokens_per_second")
    values["sparsity"] = 1 - values["density"]
    tables["eval/density"] = numpy.array([[head["density"] for head in layer]
                                          for layer in evaluation["layers"]], float)
    if "loss_by_position" in evaluation:
        tables["eval/loss_by_position"] = rows("loss_by_position")
    if "routing" in evaluation:
        tables["eval/routing"] = rows("routing")
    check_shapes("the evaluation", tables)


def newest_checkpoint(folder):
    """(code version, ranks) of what trained the run; ("", 0) without a checkpoint."""
    checkpoints = sorted(folder.glob("checkpoints/step_*.h5"))
    if not checkpoints:
        return "", 0
    with h5py.File(checkpoints[-1], "r") as file:
        return text(file.attrs["code_version"]), int(file.attrs["ranks"])
