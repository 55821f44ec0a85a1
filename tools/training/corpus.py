"""The training text: Python's own standard library, split into trained and held-out files."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Not code, or not written by hand: topics of the help system, character tables and the build
# settings of one machine. Test data is left out because it teaches long runs of nonsense.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
)
SKIPPED_PREFIXES = ("_sysconfigdata",)
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the standard library's root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training; decided by its path alone."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def read_corpus(root: Path | None = None) -> list[SourceFile]:
    """Read the standard library's sources in the order of their paths.

    Without a root, that of the running Python is read. A file that is not UTF-8 is left out.
    Raises FileNotFoundError when the folder holds no source at all.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            files.append(SourceFile(relative.as_posix(), text))
    if not files:
        raise FileNotFoundError(
            f"expected Python sources below {root}, found none: "
            "name a standard library with --stdlib"
        )
    return files


def corpus_digest(files: list[SourceFile]) -> str:
    """The sha256 over the paths and texts, so that another corpus cannot pass for this one."""
    digest = hashlib.sha256()
    for file in files:
        for part in (file.path.encode(), file.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
