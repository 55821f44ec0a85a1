"""Compiles kernels for an architecture without a GPU; prints what their code holds, as JSON.

`compile_for.py sm_90 compile_attention compile_every_row` prints one object: for each module that
is named, what its function `found` says, a list with an object for each launch. It runs in a
process without Triton's interpreter, one for all of them, as Triton takes a second to import.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(arch: str, *modules: str) -> None:
    found = {name: list(importlib.import_module(name).found(arch)) for name in modules}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
