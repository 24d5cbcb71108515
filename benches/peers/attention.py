"""Peers' attention on the GPU at hand: FlashAttention-2 and cuDNN (dense) and FlexAttention (the same mask), through PyTorch.

Run it in the same command as `cuda_extend`, which takes the same options, and quote ratios from that one run:

    python3 attention.py --plan plans/MODEL/moa_alpha_beta.json --layer 5 --heads 32 --kv-heads 8 --json peers.json

A plan has a line per query head; a KV head keeps the largest span of its query group, and so does the mask here:
ceil(max(min(alpha + beta * N, N), 128) / 64) * 64 keys, 64 sinks among them.
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

SINK = 64


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", help="published plan; without it 1/8, 1/4, 1/2 and all of the tokens in turn")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--prefill", default="4096,8192,16384,32768")
    parser.add_argument("--decode", default="1x16384,8x16384,32x8192,1x65536")
    parser.add_argument("--history", help="for cuda_extend alone")
    parser.add_argument("--chunks", help="for cuda_extend alone")
    parser.add_argument("--influence", help="for cuda_extend alone")
    parser.add_argument("--json")
    return parser.parse_args()


def milliseconds(run):
    return do_bench(run, warmup=50, rep=200, return_mode="median")


class Peers:
    def __init__(self, args):
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.group = args.heads // args.kv_heads
        if args.plan:
            with open(args.plan) as file:
                plan = json.load(file)
            self.lines = list(zip(plan["alphas"][args.layer], plan["betas"][args.layer]))
        else:
            parts = [0.125, 0.25, 0.5, 1.0]
            self.lines = [(0.0, parts[head // self.group % 4]) for head in range(args.heads)]
        self.flex = torch.compile(flex_attention, dynamic=False)
        self.block_mask = torch.compile(create_block_mask)

    def spans(self, tokens):
        """Keys of each KV head."""
        each = [math.ceil(max(min(a + b * tokens, tokens), 128) / 64) * 64 for a, b in self.lines]
        return [max(each[i : i + self.group]) for i in range(0, len(each), self.group)]

    def random(self, *shape):
        return torch.randn(*shape, device="cuda", dtype=self.dtype)

    def dense(self, backend, q, k, v, causal):
        def run():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=self.group > 1)

        return milliseconds(run)

    def prefill(self, tokens):
        args = self.args
        q = self.random(1, args.heads, tokens, args.head_dim)
        k, v = (self.random(1, args.kv_heads, tokens, args.head_dim) for _ in range(2))
        spans = self.spans(tokens)
        pairs = sum(min(i + 1, span) for span in spans for i in range(tokens)) * self.group
        row = {
            "fa2_ms": self.dense(SDPBackend.FLASH_ATTENTION, q, k, v, True),
            "cudnn_ms": self.dense(SDPBackend.CUDNN_ATTENTION, q, k, v, True),
            "density": pairs / args.heads / (tokens * (tokens + 1) / 2),
        }
        group = self.group
        window = torch.tensor([span - SINK for span in spans], device="cuda")

        def attends(_batch, head, query, key):
            return (query >= key) & ((key < SINK) | (query - key < window[head // group]))

        mask = self.block_mask(attends, 1, args.heads, tokens, tokens, device="cuda", BLOCK_SIZE=128)
        row["flex_ms"] = milliseconds(lambda: self.flex(q, k, v, block_mask=mask, enable_gqa=group > 1))
        row["flex_TFLOP_s"] = 4 * args.head_dim * pairs / row["flex_ms"] / 1e9
        return row

    def decode(self, batch, tokens):
        args = self.args
        q = self.random(batch, args.heads, 1, args.head_dim)
        k, v = (self.random(batch, args.kv_heads, tokens, args.head_dim) for _ in range(2))
        key_bytes = 2 * batch * args.head_dim * q.element_size()
        return {
            "fa2_us": 1e3 * self.dense(SDPBackend.FLASH_ATTENTION, q, k, v, False),
            "cudnn_us": 1e3 * self.dense(SDPBackend.CUDNN_ATTENTION, q, k, v, False),
            "dense_MB": key_bytes * args.kv_heads * tokens / 1e6,
            "sparse_MB": key_bytes * sum(min(span, tokens) for span in self.spans(tokens)) / 1e6,
        }


def ceilings(dtype):
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    return {
        "device": torch.cuda.get_device_name(),
        "copy_TB_s": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9,
        "gemm_TFLOP_s": 2 * 8192**3 / milliseconds(lambda: square @ square) / 1e9,
    }


def main():
    args = parse()
    peers = Peers(args)
    out = ceilings(peers.dtype)
    print(out, flush=True)
    jobs = [(f"prefill {n}", lambda n=int(n): peers.prefill(n)) for n in args.prefill.split(",")]
    for item in args.decode.split(","):
        batch, tokens = map(int, item.split("x"))
        jobs.append((f"decode {item}", lambda b=batch, n=tokens: peers.decode(b, n)))
    for name, job in jobs:
        out[name] = job()
        print(name, out[name], flush=True)
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(out, file, indent=1)


if __name__ == "__main__":
    main()
