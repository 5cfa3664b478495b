"""Half of the interpreter's time, saved: it patches triton.language anew whenever one kernel calls another.

A launch patches the language for its kernel and takes that back at its end. In between, every call of a @triton.jit function
looks through all names of the same modules again, to find that they hold their replacements already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def the_language_is_patched_once_per_launch() -> Iterator[None]:
    """Only where Triton's interpreter has the form we know; elsewhere it is left as it is."""
    from triton.runtime import interpreter

    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None or not hasattr(scope, "restore") or not hasattr(interpreter, "_patch_lang"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _once(interpreter._patch_lang, scope))
        yield


def _once(original: Callable[[Any], Any], new_scope: Callable[[], Any]) -> Callable[[Any], Any]:
    import triton.language as tl

    launch: list[set[str]] = []  # of the launch in progress: the modules that are patched

    def patch_lang(fn: Any) -> Any:
        used = {"tl" if value is tl else "core" for value in fn.__globals__.values() if value is tl or value is tl.core}
        if launch:  # a call inside it, whose scope nobody restores
            if not used <= launch[0]:
                launch[0] |= used
                return original(fn)
            return new_scope()
        scope = original(fn)
        launch.append(used)
        restore = scope.restore

        def restore_and_end() -> None:
            launch.clear()
            restore()

        scope.restore = restore_and_end
        return scope

    return patch_lang
