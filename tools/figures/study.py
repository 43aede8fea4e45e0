"""What was measured, whichever files it came from: runs, and those of a setting over its seeds."""
import dataclasses
import functools
import json
import pathlib
import re

import numpy

from figures.style import NAMES, method_name


class DataError(Exception):
    """A file is missing or not what it should be. The message is one line for the user."""


class Absent(Exception):
    """What a figure shows was not measured. The message says what is missing."""


@dataclasses.dataclass
class Run:
    name: str
    method: str
    role: str  # "dense": the model that the others continued from; else "compared"
    seed: int
    varied: dict  # key of the configuration -> value: what tells the settings apart
    config: str  # YAML
    code_version: str
    values: dict  # name -> number, as in results.h5, and sparsity
    tables: dict  # name -> array of float64, as in results.h5


class Setting:
    """The runs that differ in their seed alone, in the order of their seeds."""

    def __init__(self, runs):
        self.runs = sorted(runs, key=lambda run: run.seed)
        self.method, self.role, self.varied = runs[0].method, runs[0].role, runs[0].varied
        self.seeds = [run.seed for run in self.runs]
        self.label = ""  # what tells it from the method's other settings

    def has(self, name):
        """Whether every run has that value or table."""
        return all(name in run.values or name in run.tables for run in self.runs)

    def values(self, name):
        """[seeds]; NaN for a run that did not measure it or whose value is not finite."""
        values = numpy.array([run.values.get(name, numpy.nan) for run in self.runs])
        return numpy.where(numpy.isfinite(values), values, numpy.nan)

    def mean(self, name):
        return float(self.values(name).mean())

    def tables(self, name):
        """[seeds, rows, ...], cut to the rows that every seed has."""
        tables = [run.tables[name] for run in self.runs]
        rows = min(len(table) for table in tables)
        return numpy.stack([table[:rows] for table in tables])


class Study:
    def __init__(self, name, protocol, yaml, runs, unfinished=()):
        self.name = name
        self.protocol = protocol  # "continued", "scratch", or "" where runs were put side by side
        self.yaml = yaml  # of the study; "" where there is none
        self.runs = runs
        self.unfinished = list(unfinished)  # names of runs that left no result
        if not any(run.role == "compared" for run in runs):
            raise DataError(f"{name}: no finished run")
        groups = {}
        for run in runs:
            groups.setdefault((run.role, run.method, json.dumps(run.varied, sort_keys=True)),
                              []).append(run)
        self.all_settings = sorted(map(Setting, groups.values()), key=self._rank)
        self.settings = [s for s in self.all_settings if s.role == "compared"]
        self.dense = [s for s in self.all_settings if s.role == "dense"]
        for setting in self.all_settings:
            setting.label = self._label(setting)

    def _rank(self, setting):
        # What came before, then full attention, then each method from dense to sparse.
        methods = list(dict.fromkeys([*NAMES, *(run.method for run in self.runs)]))
        sparsity = setting.mean("sparsity")
        return (setting.role != "dense", setting.method != "full", methods.index(setting.method),
                numpy.inf if numpy.isnan(sparsity) else sparsity)

    def _label(self, setting):
        others = [s for s in self.all_settings
                  if (s.method, s.role) == (setting.method, setting.role)]
        told_apart = [key for key in setting.varied
                      if any(s.varied.get(key) != setting.varied[key] for s in others)]
        return ", ".join(f"{key.split('.')[-1]} {setting.varied[key]}" for key in told_apart)

    @property
    def full(self):
        """Full attention under the same conditions, or None."""
        return next((s for s in self.settings if s.method == "full"), None)

    @property
    def methods(self):
        """The methods held against full attention."""
        return list(dict.fromkeys(s.method for s in self.settings if s.method != "full"))

    def of(self, method):
        return [s for s in self.settings if s.method == method]

    @property
    def seeds(self):
        return sorted({seed for s in self.settings for seed in s.seeds})

    @property
    def code_versions(self):
        return sorted({run.code_version for run in self.runs} - {""})

    def notes(self):
        """What a reader must know of missing and failed runs, one sentence each."""
        holes = [f"{title(s)}, seed {seed}" for s in self.settings for seed in self.seeds
                 if self.protocol and seed not in s.seeds]
        lines = []
        if count := max(len(self.unfinished), len(holes)):  # an unfinished run leaves a hole too
            named = self.unfinished if len(self.unfinished) >= len(holes) else holes
            lines.append(f"{count} of {len(self.runs) + count} runs are missing: "
                         f"{'; '.join(named)}")
        fulls = self.of("full")
        if len(fulls) > 1:
            lines.append(f"full attention has {len(fulls)} settings: the figures show "
                         f"{fulls[0].label}")
        lines += [f"the loss of {run.name} is not finite: its setting has no point in the figures"
                  for run in self.runs
                  if "loss" in run.values and not numpy.isfinite(run.values["loss"])]
        return lines

    def describe(self):
        """Data, protocol, model, length and seeds in a line, as far as all runs share them."""
        data = self._shared("data.path")
        layers, width = self._shared("model.n_layer"), self._shared("model.d_model")
        length, steps = self._shared("data.seq_len"), self._shared("train.steps")
        parts = [
            data and pathlib.Path(data).stem,
            "continued from a dense model" if self.protocol == "continued" or self.dense else
            self.protocol and "trained from scratch",
            layers and width and f"{layers} layers of width {width}",
            length and f"sequences of {length} tokens",
            steps and f"{steps} steps",
            f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}",
        ]
        return ", ".join(part for part in parts if part)

    @functools.cached_property
    def _configs(self):
        return [config_values(run.config) for run in self.runs if run.role == "compared"]

    def _shared(self, key):
        values = {config.get(key) for config in self._configs}
        return values.pop() if len(values) == 1 else None


def title(setting):
    """The method and the setting, for a reader."""
    before = "before: " if setting.role == "dense" else ""
    return before + method_name(setting.method) + (f", {setting.label}" if setting.label else "")


def config_values(yaml):
    """Text by "section.key" of a configuration as `entrain` writes it: sections of one-line keys."""
    values, section = {}, ""
    for line in yaml.splitlines():
        if match := re.fullmatch(r"(\w+):\s*", line):
            section = match[1]
        elif match := re.fullmatch(r"\s+(\w+):\s*(.*?)\s*", line):
            values[f"{section}.{match[1]}"] = match[2].strip("\"'")
    return values
