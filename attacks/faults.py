#!/usr/bin/env python3
"""Every call that changes a file fails once, or is the last one: of a search that replaces plans, and of an evaluation.

faults.py MOA MODEL [SECONDS]: needs a C compiler. After each fault the same command runs again, without faults: the old
plans or the new ones must be there before, and the answers of a run without faults after. Ends with the counts.
"""
import json, os, random, subprocess, sys, tempfile, time

from common import cases, plans, profile

moa, model = (os.path.abspath(path) for path in sys.argv[1:3])
end = time.time() + int((sys.argv[3:] + ["3600"])[0])
source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "faults.c")
root = tempfile.mkdtemp()
os.chdir(root)
subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", "faults.so", source, "-ldl"], check=True)
KINDS = ["ENOSPC", "EIO", "short", "kill"]


def run(args, kind=None, at=0):
    """Exit code of a run whose call number `at` fails, and its calls if it ended by itself."""
    environment = dict(os.environ)
    if kind:
        environment.update(LD_PRELOAD=os.path.join(root, "faults.so"), FAULT=kind, FAULT_AT=str(at), FAULT_COUNT="count")
    if os.path.exists("count"):
        os.remove("count")
    done = subprocess.run([moa, "--threads", "1"] + args, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert b"panicked" not in done.stderr, done.stderr
    return done.returncode, int(open("count").read()) if os.path.exists("count") else None


def search(of, out="plans"):
    return ["search", "--profile", of, "--time-limit", "1", "--max-plans", "4", "--out", out, "--force"]


def read(folder):
    """The plans, once a command that reads them has finished what was begun."""
    run(["validate", "--model", model, "--plans", folder, "--out", "none/none.json"])
    return plans(folder)


EVALUATE = ["eval", "retrieval", "--model", model, "--data", "cases.jsonl", "--max-new-tokens", "2", "--items", "items.jsonl"]


def answers():
    with open("items.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert len({line["run"] for line in lines[1:]}) == 1
    return sorted((line["case"], line["answers"]) for line in lines[1:])


profile("a", 1.0)
profile("b", 3.0)
whole = {}
for of in "ab":
    assert run(search(of, f"of-{of}"))[0] == 0
    whole[of] = plans(f"of-{of}")
cases(3)
counts = dict(search_points=0, search_faults=0, eval_points=0, eval_faults=0, refused=0, lost=0, mixed=0)

assert run(search("a"))[0] == 0
_, counts["search_points"] = run(search("b"), "none", 0)
_, counts["eval_points"] = run(EVALUATE, "none", 0)
clean = answers()
points = [("search", kind, at) for kind in KINDS for at in range(1, counts["search_points"] + 1)]
points += [("eval", kind, at) for kind in KINDS for at in range(1, counts["eval_points"] + 1)]
random.seed(1)
random.shuffle(points)
now = "b"
for what, kind, at in points:
    if time.time() > end:
        break
    if what == "search":
        new = "a" if now == "b" else "b"
        code, _ = run(search(new), kind, at)
        found = read("plans")
        counts["mixed"] += found not in whole.values()
        counts["lost"] += not found or (code == 0 and found != whole[new])
        assert run(search(new))[0] == 0 and plans("plans") == whole[new]
        now = new
    else:
        if os.path.exists("items.jsonl"):
            os.remove("items.jsonl")
        code, _ = run(EVALUATE, kind, at)
        assert run(EVALUATE)[0] == 0
        counts["lost"] += answers() != clean
    counts["refused"] += code == 2
    counts[f"{what}_faults"] += 1

print(json.dumps(counts))
sys.exit(counts["lost"] + counts["mixed"] > 0)
