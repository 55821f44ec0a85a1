"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "golden"
TOOLS = ROOT / "tools"
SUPPORT = Path(__file__).resolve().parent
