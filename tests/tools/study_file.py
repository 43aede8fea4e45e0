"""Makes up results as `entrain sweep` and `entrain train` leave them, with plausible curves."""
import json

import h5py
import numpy

STEPS, LAYERS, HEADS, LENGTH = 400, 4, 2, 1024
BEHIND = {"full": 0, "dash": 0.02, "nsa": 0.03, "infllmv2": 0.05}  # nats over full attention
SETTINGS = {
    "full": [{}],
    "dash": [{"attention.target_density": d} for d in (0.5, 0.25, 0.125)],
    "nsa": [{"attention.topk": k} for k in (16, 8, 4)],
    "infllmv2": [{"attention.topk": k} for k in (16, 8, 4)],
}
CONFIG = """model:
  n_layer: 4
  d_model: 128
data:
  path: data/store/python-docs.h5
  seq_len: 1024
attention:
  method: {method}
train:
  steps: 400
  global_batch: 8
  seed: {seed}
  init_from: "{start}"
"""


def numbers(method, setting, seed):
    """(attributes, datasets) of a run; `setting` 0 is the densest."""
    rng = numpy.random.default_rng([seed, setting, len(method)])
    density = 1.0 if method == "full" else 0.5 ** (setting + 1) + 0.01 * rng.random()
    loss = 3 + BEHIND[method] * (1 + 0.7 * setting) * (method != "full") + 0.01 * seed
    step = numpy.arange(1, STEPS + 1.0)
    noise = numpy.random.default_rng(seed).normal(0, 0.15, STEPS)  # of the batches, so of all alike
    edges = numpy.linspace(0, LENGTH, 17)
    middle = (edges[1:] + edges[:-1]) / 2
    attributes = dict(
        seq_len=LENGTH, steps=STEPS, train_tokens=STEPS * 8192, loss=loss, perplexity=numpy.exp(loss),
        density=density, router_density=0.06 * (method != "full"), active_blocks=64 * density,
        train_tokens_per_second=5000 / (0.5 + density), eval_tokens_per_second=15000.0,
        wall_seconds=100.0, peak_memory_bytes=3e8, attention_ms=4 + 20 * density + rng.random(),
        ranks=2)
    datasets = {
        "eval/loss_by_position": numpy.stack(
            [edges[:-1], edges[1:], loss + 2 * middle ** -0.3 - 0.3], 1),
        "eval/density": numpy.clip(density * (0.5 + rng.random((LAYERS, HEADS))), 0, 1),
        "eval/router_density": numpy.full((LAYERS, HEADS), 0.06),
        "eval/active_blocks": numpy.full((LAYERS, HEADS), 64 * density),
        "training/step": step,
        "training/loss": loss + 4 * numpy.exp(-step / 20) + noise,
        "training/density": density + (1 - density) * numpy.exp(-step / 30),
        "training/tokens_per_second": numpy.full(STEPS, 5000.0),
    }
    if method == "dash":
        count = middle / 16
        datasets["eval/routing"] = numpy.stack(
            [edges[:-1], edges[1:], count, 0.4 * numpy.log1p(count) * (1 - 0.1 * setting),
             0.9 * numpy.log(count)], 1)
        attributes["routing_entropy"] = 1.5
    return attributes, datasets


def add_run(file, name, method, setting, seed, role="compared", optional=True):
    attributes, datasets = numbers(method, setting, seed)
    if not optional:
        for key in ("attention_ms", "routing_entropy"):
            attributes.pop(key, None)
        datasets = {key: value for key, value in datasets.items() if key.startswith("training")}
    varied = {"attention.method": method, "train.seed": seed, **SETTINGS[method][setting]}
    start = "" if role == "dense" else "dense"
    group = file.create_group(f"runs/{name}")
    texts = dict(method=method, role=role, varied=json.dumps(varied), init_from=start,
                 config=CONFIG.format(method=method, seed=seed, start=start),
                 code_version="0.1 (abc)")
    for key, value in texts.items():  # strings of fixed length, as Entrain writes them
        group.attrs[key] = numpy.bytes_(value) if value else numpy.bytes_(b"\0")
    group.attrs["seed"] = seed
    for key, value in attributes.items():
        group.attrs[key] = value
    for key, value in datasets.items():
        group[key] = value


def write_study(path, methods=tuple(SETTINGS), settings=3, seeds=(1, 2), optional=True):
    """A study that continued from a dense model; the file stays open for more."""
    file = h5py.File(path, "w")
    file.attrs["format"] = numpy.bytes_("entrain study 1")
    file.attrs["protocol"] = numpy.bytes_("continued")
    file.attrs["code_version"] = numpy.bytes_("0.1 (abc)")
    file.attrs["study"] = "base: a.yaml\nnote: <b>& not a tag</b>\n"
    for seed in seeds:
        add_run(file, f"dense-{seed}", "full", 0, seed, "dense", optional)
        for method in methods:
            for setting in range(min(settings, len(SETTINGS[method]))):
                add_run(file, f"{method}-{setting}-seed{seed}", method, setting, seed,
                        optional=optional)
    return file


def write_run(folder, method, setting=0, seed=1, evaluated=True, start=""):
    """A run folder; its metrics end in a torn line, as those of a killed run may."""
    attributes, datasets = numbers(method, setting, seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        CONFIG.format(method=method, seed=seed, start=start) + f"run:\n  dir: {folder}\n" +
        "".join(f"attention:\n  {key.split('.')[1]}: {value}\n"
                for key, value in SETTINGS[method][setting].items()))
    training = zip(*(datasets[f"training/{key}"] for key in ("step", "loss", "density")))
    lines = [json.dumps({"step": int(step), "loss": loss, "density": density,
                         "tokens_per_second": 5000.0,
                         "attention_seconds": attributes["attention_ms"] / 1000 * 8 / 2})
             for step, loss, density in training]
    lines.append(json.dumps({"step": STEPS, "eval_loss": 3.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4')
    (folder / "checkpoints").mkdir()
    with h5py.File(folder / "checkpoints" / "step_00000400.h5", "w") as checkpoint:
        checkpoint.attrs["code_version"] = numpy.bytes_("0.1 (def)")
        checkpoint.attrs["ranks"] = 2
    if evaluated:
        kept = ("loss", "perplexity", "density", "router_density", "active_blocks")
        layers = [[{"density": d} for d in heads] for heads in datasets["eval/density"]]
        positions = [dict(zip(("begin", "end", "loss"), row))
                     for row in datasets["eval/loss_by_position"].tolist()]
        (folder / "eval.json").write_text(json.dumps(
            {"method": method, "step": STEPS, **{key: float(attributes[key]) for key in kept},
             "tokens": 65536, "tokens_per_second": 15000.0, "layers": layers,
             "loss_by_position": positions}))
    return folder
