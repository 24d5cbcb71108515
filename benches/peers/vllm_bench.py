"""vLLM on a Llama of random weights: tokens per second of decode at the largest batch that its cache holds, of 1,024 sequences at
most.

Takes rows of prompt + new tokens, and is measured as `moa bench --steps N --batches max` is, in the middle of the new
tokens, where the bytes of a step are their average:

    python3 vllm_bench.py --config shapes/llama-3-8b/config.json --rows 3072+1024,6144+2048,12288+4096
    python3 vllm_bench.py --config shapes/llama-3-8b/config.json --rows 12288+4096 --cache-dtype fp8

The engine runs in this process, with its CUDA graphs and FlashAttention 3. It reads prompts in chunks beside the decode of
those that are read already, so that the first sequences of a batch are ahead of the last ones: prompts are shorter by half
of that. Counted are steps in which all sequences decode and none ends. Needs vLLM: `vllm_bundle.py`.
"""

import argparse
import json
import os
import random
import statistics
import time

# The engine in this process, nothing from the network, no sampler that is compiled at first use.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
import vllm
from vllm import LLM, SamplingParams

MOST_SEQUENCES = 1024
CHUNK = 8192
WARM_UP = 8


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rows", default="3072+1024", help="prompt + new tokens, several with commas between them")
    parser.add_argument("--steps", type=int, default=64, help="time so many steps, in the middle of the new tokens")
    parser.add_argument("--cache-dtype", default="auto", choices=["auto", "fp8"], help="auto: bf16, as the model")
    parser.add_argument("--memory", type=float, default=0.95, help="share of the GPU's memory")
    parser.add_argument("--json")
    return parser.parse_args()


def row(text):
    prompt, new = map(int, text.split("+"))
    return prompt, new


def decode(engine, vocabulary, prompt, new_tokens, batch, steps):
    """Seconds of each step in which the whole batch decodes, and the tokens of a prompt."""
    middle = prompt + new_tokens // 2
    # Steps from the first token of the first sequence to that of the last one.
    filling = -(-batch * middle // CHUNK)
    run = filling + WARM_UP + steps
    length = middle - filling // 2 - WARM_UP - steps // 2
    sampling = SamplingParams(temperature=0, max_tokens=run + WARM_UP, ignore_eos=True, detokenize=False)
    for number in range(batch):
        ids = [random.randrange(10, vocabulary - 10) for _ in range(length)]
        engine.add_request(f"{prompt}+{new_tokens}, {number}", {"prompt_token_ids": ids}, sampling)
    times = []
    last = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if len(outputs) == batch and not any(output.finished for output in outputs):
            times.append(now - last)
        last = now
    return times[WARM_UP:][:steps], length


def main():
    args = parse()
    random.seed(0)
    rows = [row(text) for text in args.rows.split(",")]
    with open(args.config) as file:
        vocabulary = json.load(file)["vocab_size"]
    llm = LLM(
        model=os.path.dirname(os.path.abspath(args.config)),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        kv_cache_dtype=args.cache_dtype,
        max_model_len=max(map(sum, rows)) + 16,
        gpu_memory_utilization=args.memory,
        enable_prefix_caching=False,
        max_num_seqs=MOST_SEQUENCES,
        max_num_batched_tokens=CHUNK,
        disable_log_stats=True,
    )
    cache = llm.llm_engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    print(f"vLLM {vllm.__version__}, {args.cache_dtype} cache of {tokens} tokens", flush=True)
    measurements = []
    for prompt, new_tokens in rows:
        batch = min(MOST_SEQUENCES, tokens // (prompt + new_tokens))
        times, length = decode(llm.llm_engine, vocabulary, prompt, new_tokens, batch, args.steps)
        if not times:
            print(f"vLLM {prompt} + {new_tokens}, batch {batch}: the whole batch never decoded at once", flush=True)
            continue
        rate, step = batch * len(times) / sum(times), statistics.median(times)
        measurements.append(
            {
                "prompt": prompt,
                "batch": batch,
                "context": prompt + new_tokens,
                "read": length,
                "steps": len(times),
                "decode_tokens_per_second": rate,
                "step_seconds": step,
            }
        )
        print(
            f"vLLM {prompt} + {new_tokens}, batch {batch}: {rate:.1f} tok/s, {step * 1e3:.3f} ms/step, {len(times)} steps",
            flush=True,
        )
    if args.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "cache": args.cache_dtype,
            "cache_tokens": tokens,
            "measurements": measurements,
        }
        with open(args.json, "w") as file:
            json.dump(report, file)


main()
