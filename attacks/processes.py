#!/usr/bin/env python3
"""Two processes at once, and processes that are killed at random, on one log of answers and one folder of plans.

processes.py MOA MODEL [PAIRS [KILLS [SECONDS]]]: nothing may be lost, and nothing mixed. Ends with the counts.
"""
import json, os, random, subprocess, sys, tempfile, time

from common import cases, plans, profile

moa, model = (os.path.abspath(path) for path in sys.argv[1:3])
pairs, kills, seconds = (int(arg) for arg in (sys.argv[3:] + [100, 1000, 3600][len(sys.argv) - 3 :]))
end = time.time() + seconds
root = tempfile.mkdtemp()
os.chdir(root)
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def search(of, out="plans"):
    args = [moa, "--threads", "1", "search", "--profile", of, "--time-limit", "1", "--max-plans", "4", "--out", out, "--force"]
    return subprocess.Popen(args, **quiet)


def finished(folder):
    """The plans, once a command that reads them has finished what a killed run had begun."""
    args = [moa, "validate", "--model", model, "--plans", folder, "--out", "none/none.json"]
    subprocess.run(args, **quiet)
    return plans(folder)


def evaluate(*plan, items="items.jsonl"):
    args = [moa, "--threads", "1", "eval", "retrieval", "--model", model, "--data", "cases.jsonl", "--max-new-tokens", "2", "--items", items]
    return subprocess.Popen(args + list(plan), **quiet)


def lines(items="items.jsonl"):
    with open(items) as file:
        return [json.loads(line) for line in file]


profile("a", 1.0)
profile("b", 3.0)
whole = []
for of in "ab":
    assert search(of, f"of-{of}").wait() == 0
    whole.append(plans(f"of-{of}"))
assert whole[0] != whole[1]
cases(3)
counts = dict(folder_pairs=0, log_pairs=0, search_kills=0, eval_kills=0, lost=0, mixed=0)

while counts["folder_pairs"] < pairs and time.time() < end:
    done = [search(of) for of in random.sample("ab", 2)]
    assert all(run.wait() == 0 for run in done)
    counts["mixed"] += plans("plans") not in whole
    counts["folder_pairs"] += 1

while counts["search_kills"] < kills and time.time() < end:
    run = search(random.choice("ab"))
    time.sleep(random.uniform(0, 0.4))
    run.kill()
    run.wait()
    found = finished("plans")
    counts["mixed"] += found not in whole
    counts["lost"] += not found
    counts["search_kills"] += 1

while counts["log_pairs"] < pairs and time.time() < end:
    if os.path.exists("items.jsonl"):
        os.remove("items.jsonl")
    runs = [evaluate(), evaluate("--uniform", "0.3")]
    codes = sorted(run.wait() for run in runs)
    found = lines()
    counts["lost"] += codes[0] != 0 or len(found) != 4
    counts["mixed"] += len({item["run"] for item in found[1:]}) != 1
    counts["log_pairs"] += 1

clean = None
while counts["eval_kills"] < kills and time.time() < end:
    if os.path.exists("items.jsonl"):
        os.remove("items.jsonl")
    for _ in range(random.randint(1, 3)):
        run = evaluate()
        time.sleep(random.uniform(0, 2))
        run.kill()
        run.wait()
        counts["eval_kills"] += 1
    assert evaluate().wait() == 0
    answers = [(item["case"], item["answers"]) for item in lines()[1:]]
    clean = clean or answers
    counts["lost"] += sorted(answers) != sorted(clean)

print(json.dumps(counts))
sys.exit(counts["lost"] + counts["mixed"] > 0)
