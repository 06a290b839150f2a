"""Names that people type, mapped to classes that are imported only when one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


class Registry(dict[str, str]):
    """A mapping from a name to where its class lives, `"package.module:Class"`.

    `kind` is the word for one entry in error messages, such as "transform". Nothing is imported before `load`, so
    command-line choices can be listed without torch.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]):
        super().__init__(entries)
        self.kind = kind

    def load(self, name: str) -> Any:
        """Import and return the entry called `name`; ValueError names what is available when there is none."""
        if name not in self:
            raise ValueError(f"expected the name of a {self.kind}, got {name!r}; available: {', '.join(sorted(self))}")
        module, _, attribute = self[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
