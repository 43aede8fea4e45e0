#!/usr/bin/env python3
"""Times attention of one new token over a long context in PyTorch on one GPU: the yardstick of
`entrain bench decode`. Prints a line of JSON for each batch.

    tools/baselines/decode.py --shape Hq32,Hkv2,D128 --context 98304 --batch 1 8 64

bfloat16, scaled_dot_product_attention, launched as a CUDA graph. The fastest counts of cuDNN's backend
and FlashAttention's, given a group's heads either as heads (enable_gqa) or as queries of one head,
which is the same where all see every key.
"""
import argparse
import itertools
import json
import math
import sys

from sdpa import SDPA, backend, machine, milliseconds, require_gpu, shape, torch

FORM = "Hq32,Hkv2,D128"
BEYOND_CACHES = 256e6  # bytes that a step reads at least: layers take turns


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape(FORM), default=FORM, metavar="SHAPE",
                        help=f"heads and head_dim (default {FORM})")
    parser.add_argument("--context", type=int, default=98304, metavar="N",
                        help="tokens of a sequence (default 98304)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="B",
                        help="numbers of sequences (default 1 8 64)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N",
                        help="timings of a few steps each; the median counts (default 7)")
    return parser.parse_args()


def graph_of(sdpa, grouped, query, layers, kv_heads):
    """One step through all layers."""
    if grouped:
        query = query.view(query.shape[0], kv_heads, -1, query.shape[-1])

    def step():
        for k, v in layers:
            torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=not grouped)

    with backend(sdpa), torch.no_grad():
        step()  # makes what is made once, or refuses
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph


def measure(sizes, context, batch, repeats):
    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    keys = batch, sizes["Hkv"], context, sizes["D"]
    layer_bytes = 2 * 2 * math.prod(keys)
    layers = [(random(*keys), random(*keys))
              for _ in range(math.ceil(BEYOND_CACHES / layer_bytes))]
    query = random(batch, sizes["Hq"], 1, sizes["D"])
    times = {}
    for sdpa, grouped in itertools.product(SDPA, (False, True)):
        name = f"{sdpa}, {'heads as queries' if grouped else 'enable_gqa'}"
        try:
            graph = graph_of(sdpa, grouped, query, layers, sizes["Hkv"])
        except RuntimeError as error:  # a backend may refuse the shape or the GPU
            print(f"decode.py: {name} does not run: {error}", file=sys.stderr)
        else:
            times[name] = milliseconds(graph.replay, repeats, calls=10) / len(layers)
    if not times:
        sys.exit("decode.py: no backend runs this shape; the reasons are above")
    best = min(times, key=times.get)
    return {"batch": batch, "ms": times[best], "sdpa": best, "ms_of_all": times,
            "gigabytes_per_second": layer_bytes / times[best] / 1e6}


def main():
    options = arguments()
    require_gpu("decode.py")
    torch.manual_seed(1)
    named = ",".join(f"{name}{size}" for name, size in options.shape.items())
    for batch in options.batch:
        print(json.dumps({"shape": named, "context": options.context} |
                         measure(options.shape, options.context, batch, options.repeats) |
                         machine()), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
