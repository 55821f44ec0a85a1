"""Compiles kernels for an architecture without a GPU; prints what their code holds, as JSON.

`python -m compile sm_90 attention rows` prints one object: for each module that is named, what its
function `found` says, a list with an object for each launch. It runs in a process without Triton's
interpreter, one for all modules, as Triton takes a second to import.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(arch: str, *modules: str) -> None:
    named = {name: importlib.import_module(f"compile.{name}") for name in modules}
    print(json.dumps({name: list(module.found(arch)) for name, module in named.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
