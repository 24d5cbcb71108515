#!/usr/bin/env python3
"""Time to first token: ten turns of a chat of about 8k tokens, and last turns with other texts beside prompts as long alone: chat.py URL [WORDS [ROUNDS]]."""
import json, statistics, sys, time, urllib.request
url = sys.argv[1]
def ask(messages, tokens=4):
    body = json.dumps({"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True}}).encode()
    begin = time.perf_counter(); first = None; text = ""; usage = None
    with urllib.request.urlopen(urllib.request.Request(url + "/v1/chat/completions", body)) as r:
        for line in r:
            if not line.startswith(b"data: {"): continue
            c = json.loads(line[6:]); usage = c.get("usage") or usage
            piece = c["choices"] and c["choices"][0]["delta"].get("content")
            if piece:
                first = first or time.perf_counter() - begin
                text += piece
    return first, text, usage
def words(n, k): return " ".join(f"{w}{(k * 7 + i) % 97}" for i, w in zip(range(n), ("ship star map rope wind tide clock sail " * n).split()))
n = int(sys.argv[2]) if len(sys.argv) > 2 else 230
messages = []
for turn in range(10):
    messages.append({"role": "user", "content": words(n, turn)})
    t, text, usage = ask(messages)
    d = usage["prompt_tokens_details"]["cached_tokens"]
    print(f"turn {turn + 1}: {usage['prompt_tokens']} tokens, {d} cached, first token {1e3 * t:.1f} ms")
    messages.append({"role": "assistant", "content": text})
turns, texts = [], []
for k in range(int(sys.argv[3]) if len(sys.argv) > 3 else 15):
    # A last turn with another text, and that text alone.
    said = [{"role": "user", "content": f"{k} " + words(n, 200 + k)}]
    turns.append(ask(messages[:18] + said)[0]); texts.append(ask([{"role": "user", "content": f"{k} " + words(n, 500 + k)}])[0])
turn, text = statistics.median(turns), statistics.median(texts)
print(f"{len(turns)} last turns: median {1e3 * turn:.1f} ms; their texts alone ({n} words): {1e3 * text:.1f} ms; ratio {turn / text:.2f}")
