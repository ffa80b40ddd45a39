"""HTML that cannot forget to escape: `tag` escapes every plain string and leaves `Html` alone."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID_ELEMENTS = frozenset({"br", "meta"})


class Html(str):
    """Markup that is already escaped."""


def text(value: str) -> Html:
    """Escape a plain string; markup passes through."""
    return value if isinstance(value, Html) else Html(html.escape(value, quote=True))


def join(parts: Iterable[str]) -> Html:
    """Concatenate, escaping what is not markup yet."""
    return Html("".join(text(part) for part in parts))


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """One element with escaped children and attributes.

    `class_` stands for `class` and `stroke_width` for `stroke-width`; numbers are written with at most one
    decimal (pixels); attributes that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value if isinstance(value, str) else _pixels(value))}"'
        for key, value in attributes.items() if value is not None
    )
    if name in VOID_ELEMENTS:
        assert not children, name
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def _pixels(value: float) -> str:
    return f"{round(value, 1):.1f}".removesuffix(".0")
