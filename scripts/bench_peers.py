"""The PyTorch side of bench_attention.py: measures one repetition at a time, on request.

Runs in an environment of its own (Python 3.11; see docs/benchmarks.md) and needs torch and
native-sparse-attention-pytorch only. Every line on standard input is a JSON request, every
line on standard output its JSON answer::

    {"command": "prepare", "side": "sdpa" or "nsa_layer", "direction": "forward", "length": 4096,
     "threads": 1, "memory_limit_bytes": ..., and the sizes of the layer}
        -> {"start_rss_bytes": ..., "peak_rss_bytes": ...}
    {"command": "repeat"}
        -> {"seconds": ..., "cpu_seconds": ..., "peak_rss_bytes": ...}

A failure is answered with {"error": ...}; the process can go on.
"""

from __future__ import annotations

import json
import resource
import sys
import time


def peak_rss_bytes() -> int:
    """Of this process alone: getrusage would also count what its parent had before the exec."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return 1024 * int(status.read().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sdpa(torch, request):
    """Dense causal attention; grouped queries are served without repeating K and V."""
    length, heads, kv_heads = request["length"], request["query_heads"], request["kv_heads"]
    width = request["head_width"]
    backward = request["direction"] == "forward_backward"
    q = torch.randn(1, heads, length, width, requires_grad=backward)
    k = torch.randn(1, kv_heads, length, width, requires_grad=backward)
    v = torch.randn(1, kv_heads, length, width, requires_grad=backward)
    cotangent = torch.randn(1, heads, length, width)
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward():
        return attend(q, k, v, is_causal=True, enable_gqa=True)

    return step(torch, forward, cotangent, (q, k, v), backward)


def nsa_layer(torch, request):
    """The whole attention layer of native-sparse-attention-pytorch (norm, projections, NSA)."""
    from native_sparse_attention_pytorch import SparseAttention

    layer = SparseAttention(
        dim=request["model_width"],
        dim_head=request["head_width"],
        heads=request["query_heads"],
        kv_heads=request["kv_heads"],
        sliding_window_size=request["window"],
        compress_block_size=request["compression_block"],
        compress_block_sliding_stride=request["compression_stride"],
        selection_block_size=request["selection_block"],
        num_selected_blocks=request["selected_blocks"],
        causal=True,
    )
    backward = request["direction"] == "forward_backward"
    x = torch.randn(1, request["length"], request["model_width"], requires_grad=backward)
    cotangent = torch.randn(1, request["length"], request["model_width"])
    wanted = (x, *(weight for weight in layer.parameters() if weight.requires_grad))
    return step(torch, lambda: layer(x), cotangent, wanted, backward)


def step(torch, forward, cotangent, wanted, backward):
    if not backward:

        def run():
            with torch.no_grad():
                forward()

    else:

        def run():
            torch.autograd.grad(forward(), wanted, cotangent, allow_unused=True)

    return run


def main() -> None:
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["command"] == "prepare":
                limit = request["memory_limit_bytes"]
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                import torch

                torch.set_num_threads(request["threads"])
                torch.manual_seed(0)
                start = peak_rss_bytes()
                sides = {"sdpa": sdpa, "nsa_layer": nsa_layer}
                run = sides[request["side"]](torch, request)
                answer = {"start_rss_bytes": start, "peak_rss_bytes": peak_rss_bytes()}
            elif run is None:
                answer = {"error": "nothing was prepared"}
            else:
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                answer = {
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                    "peak_rss_bytes": peak_rss_bytes(),
                }
        except Exception as error:  # the parent records it as a row and goes on
            reason = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {reason[0] if reason else ''}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
