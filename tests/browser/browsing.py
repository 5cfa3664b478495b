"""What tests of pages share: windows, and how well a page can be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Settings = dict[str, Any]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
DESKTOP: Settings = {"viewport": {"width": 1100, "height": 800}}
PHONE: Settings = {
    "viewport": {"width": 360, "height": 740},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}
CONTRAST = """(selector) => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255).map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  return [...document.querySelectorAll(selector)].filter((one) => one.checkVisibility()).map((one) => {
    const style = getComputedStyle(one), ink = one instanceof SVGElement ? style.fill : style.color;
    const disc = one.matches(".sign") && one.parentElement.querySelector(".dot");
    let behind = one;
    while (behind.parentElement && parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const ground = disc ? getComputedStyle(disc).fill : getComputedStyle(behind).backgroundColor;
    const [a, b] = [ink, ground].map((text) => light(parts(text)) + .05);
    return Math.max(a, b) / Math.min(a, b);
  });
}"""
"""Contrast of every visible text of a selector with what lies behind it: the disc of a sign in a picture, else a background."""


class Windows:
    """Pages of a browser, one kept for each kind of settings."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._pages: dict[str, Any] = {}

    @contextmanager
    def watched(self, told: list[str], asked: list[str], **settings: Any) -> Iterator[Any]:
        """A page; what it says on the console and which addresses it asks for are noted."""
        page = self._pages.get(repr(settings)) or self._browser.new_context(**settings).new_page()
        self._pages[repr(settings)] = page
        hear: dict[str, Any] = {
            "console": lambda message: told.append(message.text),
            "pageerror": lambda error: told.append(str(error)),
            "request": lambda request: asked.append(request.url),
        }
        for event, listener in hear.items():
            page.on(event, listener)
        try:
            yield page
        finally:
            for event, listener in hear.items():
                page.remove_listener(event, listener)
