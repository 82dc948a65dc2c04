"""HTML from Jinja templates: the environment, the layout and the macros shared by all pages.

Templates are beside the code that fills them, and are named by their path in the package. This room knows nothing
about what pages show; it may use `system`. Every value is escaped unless the template marks it as safe.
"""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from wsi_gradcam.system.processes import format_duration

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, /, **context: object) -> str:
    """Return a template filled with values.

    File names that are not Unicode contain surrogates; their bytes are shown as well as UTF-8 allows.

    Args:
        template: its path in the package, such as "run/report.html".
        context: values by the names that the template uses; a name that is missing raises `jinja2.UndefinedError`.
    """
    text = _environment().get_template(template).render(context)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def relative_url(path: str) -> str:
    """Return the URL of a file by its path from the page's folder.

    >>> relative_url("a:b/50 %.svs")
    './a%3Ab/50%20%25.svs'
    """
    return "./" + quote(path.encode("utf-8", "surrogateescape"))  # "./": a name may look like a URL


def png_url(png: bytes) -> str:
    """Return a PNG file as a URL that contains all of it."""
    return f"data:image/png;base64,{b64encode(png).decode()}"


def thousands(number: float) -> str:
    """Return a number with commas between thousands."""
    return f"{number:,}"


def percent(share: float) -> str:
    """Return a share as a whole percentage, such as "45%"."""
    return f"{share:.0%}"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not needed by those who render nothing

    environment = Environment(
        loader=PackageLoader("wsi_gradcam", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": format_duration,
        "percent": percent,
        "png_url": png_url,
        "relative_url": relative_url,
        "thousands": thousands,
    }
    return environment
