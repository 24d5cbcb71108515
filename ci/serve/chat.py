#!/usr/bin/env python3
"""Time to first token: turn 10 of a chat of about 8k tokens, and of a prompt as long as the new turn alone."""
import json, sys, time, urllib.request
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
messages, chat = [], []
for turn in range(10):
    messages.append({"role": "user", "content": words(n, turn)})
    t, text, usage = ask(messages)
    d = usage["prompt_tokens_details"]["cached_tokens"]
    print(f"turn {turn + 1}: {usage['prompt_tokens']} tokens, {d} cached, first token {1e3 * t:.1f} ms")
    chat.append((t, usage["prompt_tokens"] - d)); messages.append({"role": "assistant", "content": text})
alone = sorted(ask([{"role": "user", "content": words(n, 100 + k)}])[0] for k in range(5))
print(f"alone ({n} words): median {1e3 * alone[2]:.1f} ms; turn 10 / alone = {chat[-1][0] / alone[2]:.2f}")
