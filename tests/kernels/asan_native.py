"""A pytest plugin (-p asan_native): the module named by RAINKERNELS_ASAN_MODULE stands in for rainkernels._C.

It is put where an import finds it before any test runs, so that the package itself needs no switch for this.
"""

from __future__ import annotations

import importlib.util
import os
import sys

_PATH = os.environ["RAINKERNELS_ASAN_MODULE"]
_SPEC = importlib.util.spec_from_file_location("rainkernels._C", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
sys.modules["rainkernels._C"] = _MODULE


def pytest_report_header() -> str:
    return f"rainkernels._C: {_PATH}"
