"""Optional packages fail where they are used, with the line that brings them."""

from __future__ import annotations

import pytest

from drum_hf.errors import DependencyError
from drum_hf.utils import optional as _compat


def test_a_missing_package_names_its_extra():
    with pytest.raises(DependencyError, match=r'the app needs .*pip install "drum-hf\[app\]"'):
        _compat._EXTRAS["no_such_package_here"] = "app"
        try:
            _compat.require("no_such_package_here", "the app")
        finally:
            del _compat._EXTRAS["no_such_package_here"]


def test_two_faiss_packages_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(_compat, "_installed", lambda name: name in ("faiss-cpu", "faiss-gpu"))
    _compat.require_faiss.cache_clear()
    try:
        with pytest.raises(DependencyError, match="pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-gpu"):
            _compat.require_faiss()
    finally:
        _compat.require_faiss.cache_clear()


def test_one_faiss_package_is_fine(monkeypatch):
    monkeypatch.setattr(_compat, "_installed", lambda name: name == "faiss-gpu")
    _compat.require_faiss.cache_clear()
    assert _compat.require_faiss().IndexFlatIP is not None
    _compat.require_faiss.cache_clear()
