"""Engines in turn on the cores of one machine. Each is a program that reads lines and prints seconds:

    python turns.py ROWS.json >figures.txt

ROWS.json has {"cores": [[0, 1], [2, 3]], "rounds": 2, "steps": 24, "engines": [{"name", "command", "env", "densities",
"lengths"}]}, and may have "clock": "cpu", which counts the seconds of the engines' threads on a core, for one thread each where the
cores have other work. Prompts are read side by side, an engine to a pair of cores; then all wait, and one after the other decodes on
the first pair, every length of all engines in turn, round by round.
"""
import glob
import json
import os
import queue
import subprocess
import sys
import threading
import time


class Engine:
    by_cpu = False

    def __init__(self, name, command, env=(), densities=("1",), lengths=()):
        self.name, self.densities, self.lengths = name, densities, lengths
        self.command, self.env = command, dict(os.environ, **dict(env))

    def start(self, cores):
        self.run = subprocess.Popen(self.command, env=self.env, stdin=-1, stdout=-1, text=True,
                                    preexec_fn=lambda: os.sched_setaffinity(0, cores))

    def move(self, cores):
        for thread in os.listdir(f"/proc/{self.run.pid}/task"):
            os.sched_setaffinity(int(thread), cores)

    def ask(self, *words):
        begin = self.on_cores()
        print(*words, file=self.run.stdin, flush=True)
        seconds = float(self.run.stdout.readline())
        if not self.by_cpu:
            return seconds
        # A step of two more that come before those that are measured.
        steps = words[3] + 2 if words[0] == "decode" else 1
        return (self.on_cores() - begin) / steps

    def on_cores(self):
        """Seconds of all threads."""
        stats = glob.glob(f"/proc/{self.run.pid}/task/*/schedstat")
        return sum(int(open(stat).read().split()[0]) for stat in stats) / 1e9

    def rows(self):
        # Plans count where the context is longest.
        return [(n, d) for n in self.lengths for d in self.densities if d == "1" or n == max(self.lengths)]

    def read(self, cores, rounds):
        self.start(cores)
        self.ask("prefill", 128, 1, 1)
        for n, d in self.rows():
            turns = rounds if n <= 2048 else 1
            rates = [n / self.ask("prefill", n, d, turn) for turn in range(turns)]
            print(f"{self.name:20} {n:5} {d:5} prefill", *(f"{rate:.0f}" for rate in rates), flush=True)


def main(path):
    plan = json.load(open(path))
    Engine.by_cpu = plan.get("clock") == "cpu"
    engines = [Engine(**own) for own in plan["engines"]]
    waiting = queue.Queue()
    for engine in engines:
        waiting.put(engine)
    begin = time.time()

    def work(cores):
        while True:
            try:
                engine = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                engine.read(cores, plan["rounds"])
            except Exception as error:
                print(engine.name, "failed:", error, flush=True)
                engine.lengths = ()

    threads = [threading.Thread(target=work, args=(cores,)) for cores in plan["cores"]]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(f"# prompts: {time.time() - begin:.0f} s", flush=True)
    first = plan["cores"][0]
    for engine in engines:
        if engine.lengths:
            engine.move(first)
    for turn in range(plan["rounds"]):
        for row in sorted({row for engine in engines for row in engine.rows()}):
            for engine in engines:
                if row in engine.rows():
                    rate = 1 / engine.ask("decode", *row, plan["steps"])
                    print(f"{engine.name:20} {row[0]:5} {row[1]:5} decode {rate:.1f}", flush=True)
        print(f"# round {turn}: {time.time() - begin:.0f} s", flush=True)


main(sys.argv[1])
