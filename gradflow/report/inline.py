"""A figure as a piece of an HTML page that needs nothing from outside."""

import base64
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from markupsafe import Markup, escape

LARGEST_SVG = 1_500_000
"""Bytes above which a page shows the PNG of a figure in place of its SVG."""

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


def inline_figure(svg: Path, png: Path, name: str, alt: str) -> Markup:
    """Returns a figure as inline SVG, or as an embedded PNG when the SVG is very large.

    **Arguments:** the two files, a name that is unique on the page, and a text for those who
    cannot see the figure.
    """
    if svg.stat().st_size > LARGEST_SVG:
        data = base64.b64encode(png.read_bytes()).decode("ascii")
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(Markup(data), alt)
    return inline_svg(svg.read_text(encoding="utf-8"), name, alt)


def inline_svg(text: str, name: str, alt: str) -> Markup:
    """Returns an SVG document as an element for HTML.

    Identifiers get the name as a prefix, so that two figures on one page do not share them; the
    style sheet is confined to the figure; namespaces, metadata and the fixed size go.
    """
    root = ET.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata":
                parent.remove(child)
    prefix = f"figure-{name}"
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.tag == "style":
            element.text = (element.text or "").replace("*{", f"#{prefix} *{{")
        if "id" in element.attrib:
            element.set("id", f"{prefix}-{element.get('id')}")
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
        if element.get("href", "").startswith("#"):
            element.set("href", f"#{prefix}-{element.get('href', '')[1:]}")
        for key, value in element.attrib.items():
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"id": prefix, "role": "img"})
    body = ET.tostring(root, encoding="unicode")
    # the label goes in as text: HTML attributes allow what XML serializers escape differently
    opening = re.match(r"<svg\b", body)
    assert opening is not None, "an SVG document starts with its svg element"
    return Markup(f'<svg aria-label="{escape(alt)}"{body[opening.end() :]}')
