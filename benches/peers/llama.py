"""A Llama of the same shape in PyTorch: dense, static KV cache, one CUDA graph per decode step.

Random weights from the same config.json; attention is SDPA with cuDNN or FlashAttention-2, whichever is
faster for the shape at hand. Run it in the same command as `moa bench`, which takes the same options, and
quote ratios from that one run:

    python3 llama.py --config shapes/llama-3-8b/config.json --prompts 6144 --new-tokens 2048 --batches 1,8,max

Projections are joined, RMSNorm and SwiGLU are compiled by torch.compile: the baseline is to be strong.
Decode attends to a static cache cut to a multiple of 256 keys, so a step reads no more than it must; its
graph is captured anew when the cut moves, outside of the time that is measured.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
WARM_UP = 5
STEPS_PER_CUT = 256


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--prompts", default="1024")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, help="time so many steps, in the middle of the new tokens")
    parser.add_argument("--prefill-chunk", type=int, help="for moa bench alone: here a prompt is one chunk")
    parser.add_argument("--plan", help="for moa bench alone")
    parser.add_argument("--weights", help="for moa bench alone")
    parser.add_argument("--uniform", help="for moa bench alone")
    parser.add_argument("--no-dense", action="store_true", help="for moa bench alone")
    parser.add_argument("--cache-dtype", default="bf16", choices=["bf16", "f16"])
    parser.add_argument("--json")
    return parser.parse_args()


@torch.compile(dynamic=True)
def rms_norm(x, weight, eps):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


@torch.compile(dynamic=True)
def swiglu(both):
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.compile(dynamic=True)
def rotate(x, cos, sin):
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


class Llama:
    def __init__(self, config, dtype):
        self.c, self.dtype = config, dtype
        self.hidden, self.inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or self.hidden // self.heads
        self.layers = [self.layer() for _ in range(config["num_hidden_layers"])]
        self.embedding = self.weight(config["vocab_size"], self.hidden)
        self.head = self.embedding if config["tie_word_embeddings"] else self.weight(config["vocab_size"], self.hidden)
        self.norm = torch.ones(self.hidden, device="cuda", dtype=dtype)
        frequency = config["rope_theta"] ** (-torch.arange(0, self.dim, 2, device="cuda") / self.dim)
        angles = torch.outer(torch.arange(config["max_position_embeddings"], device="cuda"), frequency)
        self.cos, self.sin = angles.cos(), angles.sin()

    def weight(self, out, inputs):
        return torch.empty(out, inputs, device="cuda", dtype=self.dtype).uniform_(-1, 1) * (3 / inputs) ** 0.5

    def layer(self):
        ones = torch.ones(self.hidden, device="cuda", dtype=self.dtype)
        qkv = (self.heads + 2 * self.kv_heads) * self.dim
        return {
            "norm1": ones,
            "qkv": self.weight(qkv, self.hidden),
            "o": self.weight(self.hidden, self.heads * self.dim),
            "norm2": ones,
            "gate_up": self.weight(2 * self.inner, self.hidden),
            "down": self.weight(self.hidden, self.inner),
        }

    def open(self, batch, context):
        """[layers, K and V, batch, KV heads, context, head dim]"""
        shape = (len(self.layers), 2, batch, self.kv_heads, context, self.dim)
        return torch.zeros(shape, device="cuda", dtype=self.dtype)

    def forward(self, ids, positions, cache, cut):
        """ids [batch, tokens]; one chunk of a prompt, or one token with mask None at `positions`."""
        batch, tokens = ids.shape
        eps = self.c["rms_norm_eps"]
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        for weights, (keys, values) in zip(self.layers, cache):
            h = rms_norm(x, weights["norm1"], eps)
            qkv = F.linear(h, weights["qkv"]).view(batch, tokens, -1, self.dim)
            q = rotate(qkv[:, :, : self.heads], cos, sin).transpose(1, 2)
            k = rotate(qkv[:, :, self.heads : self.heads + self.kv_heads], cos, sin).transpose(1, 2)
            v = qkv[:, :, self.heads + self.kv_heads :].transpose(1, 2)
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            grouped = self.heads > self.kv_heads
            if tokens > 1:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            else:
                out = F.scaled_dot_product_attention(q, keys[:, :, :cut], values[:, :, :cut], enable_gqa=grouped)
            x = x + F.linear(out.transpose(1, 2).reshape(batch, tokens, -1), weights["o"])
            h = rms_norm(x, weights["norm2"], eps)
            x = x + F.linear(swiglu(F.linear(h, weights["gate_up"])), weights["down"])
        return F.linear(rms_norm(x[:, -1], self.norm, eps), self.head)


def prefill(model, prompt):
    cache = model.open(1, prompt)
    ids = torch.randint(model.c["vocab_size"], (1, prompt), device="cuda")
    positions = torch.arange(prompt, device="cuda")
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.forward(ids, positions, cache, prompt).argmax(-1).tolist()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def decode(model, prompt, new_tokens, timed, batch):
    context = prompt + new_tokens
    cache = model.open(batch, context)
    ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    run = min(timed + WARM_UP, new_tokens) if timed else new_tokens
    done = (new_tokens - run) // 2
    end = done + run
    position = torch.full((1,), prompt + done, dtype=torch.long, device="cuda")
    times = []
    while done < end:
        steps = min(STEPS_PER_CUT, end - done)
        cut = prompt + done + steps

        def step():
            ids.copy_(model.forward(ids, position, cache, cut).argmax(-1, keepdim=True))
            position.add_(1)

        at = position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        position.copy_(at)
        for _ in range(steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            graph.replay()
            ids.tolist()
            times.append(time.perf_counter() - begin)
        done += steps
        del graph
    times = times[WARM_UP:]
    return batch * len(times) / sum(times), statistics.median(times)


def best(measure):
    """The result of the faster backend, by the first of its numbers, and its name."""
    results = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                results[name] = measure()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            results[name] = None
            print(f"{name}: {str(error).splitlines()[0]}")
    return {name: result for name, result in results.items() if result is not None}


def largest(model, prompt, new_tokens):
    each = 2 * len(model.layers) * model.kv_heads * (prompt + new_tokens) * model.dim * 2
    free, _ = torch.cuda.mem_get_info()
    return max(1, int((free - (1 << 30)) // each))


def copy_rate():
    """Bytes read and written per second by a copy on the device: the roofline of decode steps."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times)


@torch.inference_mode()
def main():
    args = parse()
    copied = copy_rate()
    torch.cuda.empty_cache()
    print(f"copy on the device: {copied / 1e9:.0f} GB/s, read and written")
    with open(args.config) as file:
        config = json.load(file)
    model = Llama(config, {"bf16": torch.bfloat16, "f16": torch.float16}[args.cache_dtype])
    measurements = []
    for prompt in map(int, args.prompts.split(",")):
        first = best(lambda: prefill(model, prompt))
        seconds = min(first.values())
        for batch in args.batches.split(","):
            torch.cuda.empty_cache()
            count = largest(model, prompt, args.new_tokens) if batch == "max" else int(batch)
            while True:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    found = best(lambda: decode(model, prompt, args.new_tokens, args.steps, count))
                    break
                except torch.cuda.OutOfMemoryError:
                    if count == 1:
                        raise
                    count -= -(-count // 50)
            name = max(found, key=lambda name: found[name][0])
            rate, step = found[name]
            measurements.append(
                {
                    "prompt": prompt,
                    "batch": count,
                    "context": prompt + args.new_tokens,
                    "first_token_seconds": seconds,
                    "prefill_backend": min(first, key=first.get),
                    "decode_tokens_per_second": rate,
                    "step_seconds": step,
                    "decode_backend": name,
                    "peak_bytes": torch.cuda.max_memory_allocated(),
                }
            )
            print(
                f"torch {prompt} + {args.new_tokens}, batch {count}: first token {seconds:.3f} s, "
                f"{rate:.1f} tok/s, {step * 1e3:.3f} ms/step ({name})",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            json.dump({**device, "copy_bytes_per_second": copied, "measurements": measurements}, file)


main()
