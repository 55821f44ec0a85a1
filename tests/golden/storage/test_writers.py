"""Real processes: killed at every step of a write, and several writing at once."""

from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitassay.golden.storage.files import SCRATCH
from bitassay.golden.storage.store import Store

NAME = "made-up/sm_90"

# Publishes a stream, and kills itself with SIGKILL just before its nth call that changes the disk.
# One child for each n: forked, so that imports are paid once.
KILLED = """
import os, pathlib, pickle, signal, sys
from bitassay.golden.storage import layout
from bitassay.golden.storage.store import Store
root, order = sys.argv[1], sys.argv[2]
stream, provenance = pickle.load(open(order, "rb"))
encoded = layout.encode(stream, provenance)
layout.encode = lambda stream, provenance: encoded  # zarr's threads do not live in a fork

def count(limit):
    done = 0
    def counted(call):
        def wrapper(*arguments, **keywords):
            nonlocal done
            done += 1
            if done == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)
        return wrapper
    for module, name in ((os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "replace"),
                         (os, "unlink"), (os, "rmdir"), (pathlib.Path, "open")):
        setattr(module, name, counted(getattr(module, name)))

for line in sys.stdin:
    n = int(line)
    child = os.fork()
    if child == 0:
        count(n)
        Store(root).publish(stream, provenance, accept=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

WRITER = """
import pickle, sys
from bitassay.golden.storage.store import Store
root, order = sys.argv[1], sys.argv[2]
jobs = pickle.load(open(order, "rb"))
print("ready", flush=True)
sys.stdin.readline()
for stream, provenance in jobs:
    Store(root).publish(stream, provenance, accept=True)
    Store(root).read(provenance.identity.name)
"""


def test_a_kill_at_any_point_leaves_a_whole_golden(make_stream, provenance, tmp_path):
    root, order, pristine = tmp_path / "store", tmp_path / "order", tmp_path / "pristine"
    old, new, third = make_stream(0), make_stream(1), make_stream(2)
    Store(str(pristine)).publish(old, provenance, accept=True)
    order.write_bytes(pickle.dumps((new, provenance)))
    found, littered = [], 0
    with start(KILLED, root, order) as killer:
        for n in (*range(1, 8), *range(8, 60, 13), *range(60, 1000)):  # the files are all alike
            shutil.copytree(pristine, root)
            status = ask(killer, n)
            tokens = Store(str(root)).read(NAME).stream.tokens
            found.append("old" if np.array_equal(tokens, old.tokens) else "new")
            assert np.array_equal(tokens, old.tokens if found[-1] == "old" else new.tokens)
            littered += any(root.glob(f"{SCRATCH}*"))
            Store(str(root)).publish(third, provenance, accept=True)
            assert np.array_equal(Store(str(root)).read(NAME).stream.tokens, third.tokens)
            assert_tidy(root)
            shutil.rmtree(root)
            if status == 0:
                break
            assert status == -signal.SIGKILL
    assert status == 0
    assert n > 80  # so many steps
    assert littered > 12  # so often something was left to clear away
    assert found.count("new") > 5  # killed also after the manifest was replaced
    assert found == sorted(found, reverse=True)  # and it changes over once


def test_many_writers_at_once_lose_nothing(make_stream, provenance, tmp_path):
    """Four processes publish one golden in turn with their own names; each reads what it wrote."""
    root, writers, rounds = tmp_path / "store", 4, 4
    processes = []
    for w in range(writers):
        own = replace(provenance, identity=replace(provenance.identity, suite=f"own-{w}"))
        jobs = []
        for r in range(rounds):
            stream = make_stream(100 * w + r)
            jobs += [(stream, own), (stream, provenance)]
        order = tmp_path / f"order-{w}"
        order.write_bytes(pickle.dumps(jobs))
        processes.append(start(WRITER, root, order))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in processes] == [0] * writers
    for process in processes:
        process.__exit__(None, None, None)
    kept = Store(str(root))
    assert sorted(kept.entries()) == [NAME, *(f"own-{w}/sm_90" for w in range(writers))]
    for w in range(writers):
        last = make_stream(100 * w + rounds - 1)
        assert np.array_equal(kept.read(f"own-{w}/sm_90").stream.tokens, last.tokens)
    candidates = [make_stream(100 * w + rounds - 1).tokens.tolist() for w in range(writers)]
    assert kept.read(NAME).stream.tokens.tolist() in candidates
    assert_tidy(root)


def start(script: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str], n: int) -> int:
    process.stdin.write(f"{n}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def assert_tidy(root: Path) -> None:
    """The store holds its manifest and the directories that it names, nothing else."""
    entries = Store(str(root)).entries().values()
    directories = {str(p.parent.relative_to(root)) for p in root.glob("*/*/*/SHA256SUMS")}
    assert directories == {entry.directory for entry in entries}
    assert {p.name for p in root.iterdir()} == {"manifest.jsonl", *(e.name[:-6] for e in entries)}
    for entry in entries:
        assert [p.name for p in Path(root, entry.directory).parent.iterdir()] == [entry.digest]
