"""What attention.py and decode.py share: shapes, PyTorch's backends of scaled_dot_product_attention,
time on the GPU."""
import argparse
import re
import statistics
import subprocess
import sys

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:  # said by require_gpu(): --help needs no PyTorch
    torch, why_no_torch = None, error

SDPA = ("cudnn", "flash")
WARMUPS = 3


def shape(form):
    """Reads "B1,Hq32,Hkv2", with the names that `form` has, as a dict."""
    def read(text):
        sizes = dict(re.findall(r"([A-Za-z]+)([1-9]\d*)(?:,|$)", text))
        if ",".join(f"{name}{size}" for name, size in sizes.items()) != text or \
                sizes.keys() != dict(re.findall(r"([A-Za-z]+)(\d+)", form)).keys():
            raise argparse.ArgumentTypeError(f"{form} is the form, not {text}")
        return {name: int(size) for name, size in sizes.items()}
    return read


def require_gpu(program):
    if torch is None:
        sys.exit(f"{program}: {sys.executable} has no PyTorch ({why_no_torch}); install it "
                 "(https://pytorch.org) or use a Python that has it")
    if not torch.cuda.is_available():
        sys.exit(f"{program}: PyTorch {torch.__version__} sees no NVIDIA GPU; does nvidia-smi?")


def backend(name):
    """Attention inside the context goes to this backend or fails."""
    return sdpa_kernel({"cudnn": SDPBackend.CUDNN_ATTENTION,
                        "flash": SDPBackend.FLASH_ATTENTION}[name])


def milliseconds(work, repeats, calls):
    """A call of `work`, the median of repeats of so many calls each."""
    for _ in range(WARMUPS):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


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
