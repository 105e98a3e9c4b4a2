"""What every test shares: no network, one quiet process, and for those that ask, a Hub on this machine."""

from __future__ import annotations

import os

from hub_server import hub, served

__all__ = ["hub", "served"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
