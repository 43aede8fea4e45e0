#!/usr/bin/env python3
"""Times causal attention in PyTorch on one GPU, forward and backward: the yardstick of `entrain bench
attention`, which takes the same shape. Prints one JSON object, which that command reads:

    tools/baselines/attention.py --shape B1,Hq32,Hkv2,D128,N16384 > pytorch.json
    entrain bench attention --shape B1,Hq32,Hkv2,D128,N16384 --against pytorch.json

bfloat16, scaled_dot_product_attention with grouped queries. Its gradients need not be the same twice.
"""
import argparse
import json

from sdpa import SDPA, backend, machine, milliseconds, require_gpu, shape, torch

FORM = "B1,Hq32,Hkv2,D128,N16384"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape(FORM), default=FORM, metavar="SHAPE",
                        help=f"sequences, heads, head_dim and tokens (default {FORM})")
    parser.add_argument("--sdpa", choices=SDPA, default="cudnn",
                        help="backend of scaled_dot_product_attention (default cudnn)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N",
                        help="timings of a few calls each; the median counts (default 7)")
    return parser.parse_args()


def measure(sizes, sdpa, repeats):
    def rows(heads):  # tokens outermost, as a projection writes them
        x = torch.randn(sizes["B"], sizes["N"], heads, sizes["D"], device="cuda",
                        dtype=torch.bfloat16)
        return x.transpose(1, 2)

    inputs = [rows(heads).requires_grad_() for heads in (sizes["Hq"], sizes["Hkv"], sizes["Hkv"])]
    dout = rows(sizes["Hq"])

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True,
                                                                enable_gqa=True)

    with backend(sdpa):
        out = forward()
        return {
            "forward_ms": milliseconds(forward, repeats, calls=5),
            "backward_ms": milliseconds(
                lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), repeats,
                calls=5),
        }


def main():
    options = arguments()
    require_gpu("attention.py")
    torch.manual_seed(1)
    named = ",".join(f"{name}{size}" for name, size in options.shape.items())
    print(json.dumps({"shape": named, "sdpa": options.sdpa} |
                     measure(options.shape, options.sdpa, options.repeats) | machine()))


if __name__ == "__main__":
    main()
