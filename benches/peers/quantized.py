"""What independent readers make of the files that `moa quantize` writes of small checkpoints of other families than Llama:

    pip install torch transformers accelerate gguf; npm install node-llama-cpp
    python benches/peers/quantized.py target/release/moa

Files of f32 and of Q8_0: transformers widens the blocks, where it knows the architecture, llama.cpp computes in them. Printed are the largest difference of a probability of the next
token, after each of 20, from that of the checkpoint in f32, and how often the likeliest token is the same; those of the two
from each other; and those of the row before, which is what a mistake looks like.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

root = Path(__file__).parents[2]
fixtures = root / "moa-models/tests/fixtures"
TOKENS = json.loads((fixtures / "families/qwen2/golden.json").read_text())["tokens"]
# transformers reads files of these.
READ = ["families/mistral", "families/qwen2", "families/qwen3"]
OTHERS = ["families/ministral3", "gguf/smollm3", "families/granite", "families/phi3-longrope", "families/phi3-window"]


def folder_of(family, folder):
    """The checkpoint without windows, which GGUF has no word for, and a tokenizer of single letters."""
    shutil.copy(fixtures / family / "model.safetensors", folder)
    config = json.loads((fixtures / family / "config.json").read_text())
    change = dict(sliding_window=None, use_sliding_window=False, layer_types=["full_attention"] * config["num_hidden_layers"])
    config |= {key: value for key, value in change.items() if key in config} | dict(max_position_embeddings=256)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((root / "assets/moa-tiny/tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < config["vocab_size"] - 1} | {"TH": config["vocab_size"] - 1}
    model["merges"] = [["T", "H"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def probabilities(folder, **options):
    config = AutoConfig.from_pretrained(folder, **options)
    # It reads no head's width from Qwen3's files.
    if head_dim := json.loads((folder / "config.json").read_text()).get("head_dim"):
        config.head_dim = head_dim
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager", **options)
    with torch.inference_mode():
        return model.eval()(torch.tensor([TOKENS])).logits[0].softmax(-1)


def llama_cpp(file, vocabulary):
    tokens = ",".join(map(str, TOKENS))
    command = ["node", str(root / "benches/peers/llama_cpp.mjs"), "--model", str(file), "--tokens", tokens]
    rows = json.loads(run(*command).splitlines()[-1])
    return torch.tensor([[row.get(str(token), 0.0) for token in range(vocabulary)] for row in rows])


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def near(found, exact):
    worst = float((found - exact).abs().max())
    same = int((found.argmax(-1) == exact.argmax(-1)).sum())
    return f"{worst:.3f}, {same} of {len(TOKENS)}"


for family in READ + OTHERS:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder_of(family, folder)
        exact = probabilities(folder)
        for kind in ["f32", "q8_0"]:
            file = folder / f"{kind}.gguf"
            run(sys.argv[1], "quantize", "--model", name, "--type", kind, "--out", str(file))
            theirs = llama_cpp(file, exact.shape[-1])
            assert abs(float(theirs.sum()) - len(TOKENS)) < 1e-3
            found = f"llama.cpp {near(theirs, exact)}"
            if family in READ:
                widened = probabilities(folder, gguf_file=file.name)
                found += f"; transformers {near(widened, exact)}; the two {near(theirs, widened)}"
            print(f"{family} {kind}: {found}; another row {near(exact.roll(1, 0), exact)}", flush=True)
