"""Examples of docstrings, for mkdocstrings.

In: the docstrings of the package, which call the section "Example". Out: the same ones with the name that griffe's
parser knows, so that it is shown as code.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Calls the section "Examples"."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """See griffe's Extension."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
