"""transformers' own `generate` on a Llama of random weights: DynamicCache, SDPA restricted to FlashAttention-2.

What the paper calls "FlashAttention2". Takes the options of `moa bench`:

    python3 generate.py --config shapes/vicuna-7b/config.json --prompts 3072 --new-tokens 1024 --steps 32 --batches max

One prompt is read and its cache repeated to the whole batch, so that memory for the prefill of a large batch
does not limit it. Times are those between tokens, as a stopping criterion sees them.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StoppingCriteria, StoppingCriteriaList

WARM_UP = 5


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


class Clock(StoppingCriteria):
    def __init__(self):
        self.times = []

    def __call__(self, ids, scores, **kwargs):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def decode(model, prompt, new_tokens, timed, batch):
    run = min(timed + WARM_UP, new_tokens) if timed else new_tokens
    length = prompt + (new_tokens - run) // 2
    ids = torch.randint(1, model.config.vocab_size, (1, length), device="cuda")
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    clock = Clock()
    ids = ids.repeat(batch, 1)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=run,
        min_new_tokens=run,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    times = [after - before for before, after in zip(clock.times, clock.times[1:])][WARM_UP - 1 :]
    return batch * len(times) / sum(times), statistics.median(times)


def largest(model, context):
    c = model.config
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    each = 2 * c.num_hidden_layers * c.num_key_value_heads * context * dim * 2
    free, _ = torch.cuda.mem_get_info()
    return max(1, int((free - (2 << 30)) // each))


@torch.inference_mode()
def main():
    args = parse()
    torch.set_default_dtype({"bf16": torch.bfloat16, "f16": torch.float16}[args.cache_dtype])
    with open(args.config) as file:
        config = LlamaConfig(**json.load(file))
    config.eos_token_id = config.pad_token_id = None
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    measurements = []
    for prompt in map(int, args.prompts.split(",")):
        for batch in args.batches.split(","):
            torch.cuda.empty_cache()
            count = largest(model, prompt + args.new_tokens) if batch == "max" else int(batch)
            while True:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        rate, step = decode(model, prompt, args.new_tokens, args.steps, count)
                    break
                except torch.cuda.OutOfMemoryError:
                    if count == 1:
                        raise
                count -= -(-count // 20)
            measurements.append(
                {
                    "prompt": prompt,
                    "batch": count,
                    "context": prompt + args.new_tokens,
                    "decode_tokens_per_second": rate,
                    "step_seconds": step,
                    "peak_bytes": torch.cuda.max_memory_allocated(),
                }
            )
            print(
                f"transformers {prompt} + {args.new_tokens}, batch {count}: "
                f"{rate:.1f} tok/s, {step * 1e3:.3f} ms/step",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "measurements": measurements}, file)


main()
