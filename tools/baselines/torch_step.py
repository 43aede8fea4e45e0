#!/usr/bin/env python3
"""Times the training step of a Llama-shaped decoder in PyTorch on one GPU: the yardstick of
`entrain bench train`, which takes the same shape. Prints one line of JSON.

    tools/baselines/torch_step.py --n-layer 12 --d-model 768 --n-head 12 --n-kv-head 4 --head-dim 64 \\
        --d-ff 2048 --vocab 32768 --batch 16 --tokens 2048

Float32 parameters under bfloat16 autocast, torch.compile over the whole model and loss, fused AdamW,
gradients clipped to norm 1. Needs PyTorch 2.5 or newer, built for CUDA.
"""
import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys

try:
    import torch

    from trainer import Trainer
except ImportError as error:  # said in main: --help needs no PyTorch
    torch, why_no_torch = None, error

SHAPE = ("n-layer", "d-model", "n-head", "n-kv-head", "head-dim", "d-ff", "vocab", "batch", "tokens")
SDPA = ("cudnn", "flash")
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
AUTO_MODES = ("default", "max-autotune")


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SHAPE:
        parser.add_argument(f"--{name}", type=positive, required=True, metavar="N")
    parser.add_argument("--sdpa", choices=[*SDPA, "auto"], default="auto",
                        help="backend of scaled_dot_product_attention; auto (default): the faster, "
                        "measured")
    parser.add_argument("--mode", choices=[*MODES, "auto"], default="default",
                        help=f"of torch.compile; auto: the faster of {' and '.join(AUTO_MODES)}, "
                        "measured")
    parser.add_argument("--residual", choices=["float32", "bfloat16"], default="float32",
                        help="type of the residual stream; autocast leaves it float32 (default)")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N",
                        help="timings of a few steps each; the median counts (default 7)")
    parser.add_argument("--wait", action="store_true",
                        help="measure once for each line of standard input: tools/baselines/compare "
                        "lets another program run in between")
    options = parser.parse_args()
    if options.n_head % options.n_kv_head:
        parser.error("--n-head must be a multiple of --n-kv-head")
    if options.head_dim % 2:
        parser.error("--head-dim must be even")
    return options


def release():
    """Frees what is not needed between measurements, for the program that runs meanwhile."""
    gc.collect()
    torch.cuda.empty_cache()


def fastest(options):
    """With the backend and mode that were asked for, or the fastest of those that run."""
    candidates = list(itertools.product(SDPA if options.sdpa == "auto" else [options.sdpa],
                                        AUTO_MODES if options.mode == "auto" else [options.mode]))
    if len(candidates) == 1:
        return Trainer(options, options.residual, *candidates[0])
    best, best_ms = None, math.inf
    for sdpa, mode in candidates:
        try:
            trainer = Trainer(options, options.residual, sdpa, mode)
            ms = statistics.median(trainer.times(repeats=3))
        except RuntimeError as error:  # a backend may refuse the shape or the GPU
            print(f"torch_step.py: {sdpa}, {mode} does not run: {error}", file=sys.stderr)
        else:
            print(f"torch_step.py: {sdpa}, {mode}: {ms:.2f} ms a step", file=sys.stderr)
            if ms < best_ms:
                best, best_ms = trainer, ms
        trainer = None
        release()
    if best is None:
        sys.exit("torch_step.py: no backend runs this shape; the reasons are above")
    return best


def machine():
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                            capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main():
    options = arguments()
    if torch is None:
        sys.exit(f"torch_step.py: {sys.executable} has no PyTorch ({why_no_torch}); install it "
                 "(https://pytorch.org) or use a Python that has it")
    if not torch.cuda.is_available():
        sys.exit(f"torch_step.py: PyTorch {torch.__version__} sees no NVIDIA GPU; does nvidia-smi?")
    torch.set_float32_matmul_precision("high")  # TF32 wherever float32 products remain
    trainer = None
    for _ in sys.stdin if options.wait else [""]:
        trainer = trainer or fastest(options)
        print(json.dumps(trainer.measure(options.repeats) | machine()), flush=True)
        release()


if __name__ == "__main__":
    main()
