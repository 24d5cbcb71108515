"""Gates of heads, learned by gradient as DuoAttention learns them, for `moa plan import --head-scores`:

    python gates.py MODEL.gguf OUT.tsv BOOK.. [--steps 400] [--weight 0.05] [--text 0.5] [--recent 128]

Each KV head of a Llama whose weights stay as they are gives `gate * all + (1 - gate) * (sink and recent keys)`. The gates
begin at 1 and go down by `weight` times their mean, against the divergence from the dense model at the answers to
questions about numbers that stand once in a book (and, with `--text`, so many times that of running text). Needs torch,
tokenizers, and fact_questions and retype_gguf.py beside it or a folder above. Prints the seconds that it took.
"""

import argparse
import importlib.machinery
import importlib.util
import pathlib
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent


def module(name):
    for path in (HERE / name, HERE.parent / name):
        if path.exists():
            loader = importlib.machinery.SourceFileLoader(name.removesuffix(".py"), str(path))
            spec = importlib.util.spec_from_loader(loader.name, loader)
            made = importlib.util.module_from_spec(spec)
            loader.exec_module(made)
            return made
    raise SystemExit(f"{name} is missing")


retype, questions = module("retype_gguf.py"), module("fact_questions")


def tensors(path):
    """A GGUF file's tensors in f32, by name."""
    def widened(shape, kind, data):
        return torch.from_numpy(retype.widen(kind, data).astype(np.float32).reshape(shape[::-1]))

    return {label.decode(): widened(*tensor) for label, *tensor in retype.read(path)[1]}


class Model:
    def __init__(self, path, sink, recent):
        known = questions.metadata(path)
        of = lambda name: known["llama." + name]
        self.layers, self.eps = of("block_count"), of("attention.layer_norm_rms_epsilon")
        self.heads, self.kv_heads = of("attention.head_count"), of("attention.head_count_kv")
        self.w = {name: tensor.to("cuda", torch.bfloat16) for name, tensor in tensors(path).items()}
        self.dim = self.w["blk.0.attn_q.weight"].shape[0] // self.heads
        self.frequencies = of("rope.freq_base") ** (-torch.arange(0, self.dim, 2, device="cuda") / self.dim)
        self.sink, self.recent = sink, recent

    def rotate(self, x):
        angles = torch.arange(x.shape[1], device="cuda")[:, None] * self.frequencies
        sin, cos = angles.sin(), angles.cos()
        even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)

    def norm(self, x, name):
        return F.rms_norm(x, (x.shape[-1],), self.w[name + ".weight"], self.eps)

    def logits(self, ids, gates, rows):
        """Of rows of one sequence; dense without gates `[layers, kv_heads]`."""
        n, group = len(ids), self.heads // self.kv_heads
        x = self.w["token_embd.weight"][ids]
        at = torch.arange(n, device="cuda")
        far = at[:, None] - at
        seen = (far >= 0) & ((far < self.recent) | (at < self.sink))
        for layer in range(self.layers):
            def part(name, x):
                return F.linear(x, self.w[f"blk.{layer}.{name}.weight"])

            def block(x, gate):
                y = self.norm(x, f"blk.{layer}.attn_norm")
                q, k, v = (
                    part("attn_" + name, y).view(n, heads, self.dim).transpose(0, 1)
                    for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
                )
                q, k = self.rotate(q), self.rotate(k)
                k, v = (each.repeat_interleave(group, 0) for each in (k, v))
                out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
                if gate is not None:
                    near = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen)[0]
                    gate = gate.repeat_interleave(group)[:, None, None].to(out.dtype)
                    out = gate * out + (1 - gate) * near
                x = x + part("attn_output", out.transpose(0, 1).reshape(n, -1))
                y = self.norm(x, f"blk.{layer}.ffn_norm")
                return x + part("ffn_down", F.silu(part("ffn_gate", y)) * part("ffn_up", y))

            x = block(x, None if gates is None else gates[layer])
        x = self.norm(x[rows], "output_norm")
        return F.linear(x, self.w.get("output.weight", self.w["token_embd.weight"])).float()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("books", nargs="+")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--weight", type=float, default=0.05)
    parser.add_argument("--text", type=float, default=0.0)
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, own = Model(args.model, args.sink, args.recent), questions.tokenizer(args.model)
    known = questions.metadata(args.model)
    special = {token: index for index, token in enumerate(known["tokenizer.ggml.tokens"])}
    books = [open(path, encoding="utf8").read()[20_000:] for path in args.books]
    rng = random.Random(args.seed)

    def ids(text):
        return own.encode(text).ids

    def turn(role, text):
        start, end = special["<|im_start|>"], special["<|im_end|>"]
        return [start] + ids(f"{role}\n{text}") + [end] + ids("\n")

    def item():
        length = rng.choice([512, 1024, 1024, 2048])
        made = questions.question(rng, books, length, rng.choice([1, 1, 2, 4]), lambda text: len(ids(text)))
        prompt = turn("user", made["prompt"]) + [special["<|im_start|>"]] + ids("assistant\n")
        answer = ids(f"{made['expected_number']}.") + [special["<|im_end|>"]]
        return prompt + answer, len(prompt) - 1

    def text():
        book = rng.choice(books)
        start = rng.randrange(len(book) - 8000)
        return ids(book[start : start + 8000])[:1024], 64

    begin = time.time()
    gates = torch.ones(model.layers, model.kv_heads, device="cuda", requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=args.rate)

    def divergence(sequence, first):
        sequence = torch.tensor(sequence, device="cuda")
        rows = slice(first, len(sequence) - 1)
        with torch.no_grad():
            dense = model.logits(sequence, None, rows).log_softmax(-1)
        gated = model.logits(sequence, gates, rows).log_softmax(-1)
        return (dense.exp() * (dense - gated)).sum(-1).mean()

    sequence, first = item()
    with torch.no_grad():
        said = model.logits(torch.tensor(sequence, device="cuda"), None, slice(first, len(sequence) - 1))
    print(f"dense cross entropy of an answer: {F.cross_entropy(said, torch.tensor(sequence[first + 1 :], device='cuda')).item():.3f}")
    for step in range(args.steps):
        loss = divergence(*item())
        if args.text:
            loss = loss + args.text * divergence(*text())
        (loss + args.weight * gates.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            gates.clamp_(0, 1)
        if step % 50 == 49:
            print(f"step {step + 1}: divergence {loss.item():.4f}, mean gate {gates.mean().item():.3f}, {time.time() - begin:.0f} s", flush=True)
    with open(args.out, "w", encoding="utf8") as file:
        file.writelines("\t".join(f"{gate:.5f}" for gate in layer) + "\n" for layer in gates.tolist())


if __name__ == "__main__":
    main()
