#!/usr/bin/env python3
"""Hostile clients of `moa serve`: hostile.py PORT (after `ulimit -n 12000`). Fails where an honest request beside them does."""
import json
import random
import resource
import socket
import sys
import time
import urllib.error
import urllib.request

most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
PORT = int(sys.argv[1])
A = ("127.0.0.1", PORT)
def probe(name):
    t = time.time(); b = json.dumps({"prompt": "Hi", "max_tokens": 2}).encode()
    try:
        r = urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", b), timeout=30)
    except OSError as e: raise SystemExit(f"{name}: {e!r}") from e
    print(f"{name}: {r.status} in {time.time() - t:.2f} s", flush=True)
probe("before")
idle = []
for i in range(10000):
    try: s = socket.create_connection(A, timeout=5); idle.append(s)
    except OSError as e: print("connect", i, e); break
print("idle", len(idle)); probe("10,000 idle")
slow = []
for i in range(300):
    s = socket.create_connection(A, timeout=5); s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n" + (b"content-length: 100\r\n\r\n{" if i % 2 else b"x-a: ")); slow.append(s)
probe("300 slowloris")
for _ in range(2):
    for s in slow:
        try: s.sendall(b"a")
        except OSError: pass
    time.sleep(.5)
s = socket.create_connection(A, timeout=10); s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 104857600\r\n\r\n")
sent = 0
try:
    for _ in range(100): s.sendall(b"x" * (1 << 20)); sent += 1
except OSError: pass
print("100 MB body: sent", sent, "MB", end=" ")
try: print(s.recv(40))
except OSError as e: print(e)
probe("after 100 MB")
random.seed(5); chat = json.dumps({"messages":[{"role":"user","content":"Hi"}],"max_tokens":2,"temperature":0.5,"n":1,"stream":True,"stop":["x"],"logit_bias":{"5":1},"tools":[{"type":"function","function":{"name":"f"}}],"priority":3}).encode()
response = json.dumps({"input":[{"role":"user","content":[{"type":"input_text","text":"Hi"}]},{"type":"function_call","call_id":"1","name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"1","output":"2"}],"instructions":"Be brief.","max_output_tokens":2,"stream":True,"tools":[{"type":"function","name":"f"}],"text":{"format":{"type":"text"}}}).encode()
codes = {}
for i in range(400):
    path, base = [("chat/completions", chat), ("responses", response)][i % 2]; b = bytearray(base)
    for _ in range(random.randint(1, 4)):
        k = random.randrange(len(b)); b[k:k+random.randint(0,3)] = bytes(random.choice(b'{}[]",:0-9eE.\\nulltrue\xff') for _ in range(random.randint(0,3)))
    try: c = urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/{path}", bytes(b)), timeout=30); c.read(); c = c.status
    except urllib.error.HTTPError as e: c = e.code
    except OSError as e: c = repr(e)
    codes[c] = codes.get(c, 0) + 1
print("mutated bodies", codes)
assert set(codes) <= {200, 400}, codes; probe("end")
