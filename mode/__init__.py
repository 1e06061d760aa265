"""The library: Modular Domain Experts (MoDE), one training loop, evaluation, records and report.

What people import stands here under one name and is loaded when it is first used, so that `import mode` takes no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "MoDEConfig": "mode.modular.model",
    "MoDEForCausalLM": "mode.modular.model",
    "make_modular": "mode.modular.model",
    "swap_expert": "mode.modular.edit",
    "load_experts": "mode.modular.artefact",
    "save_expert": "mode.modular.artefact",
    "compose": "mode.config.compose",
    "execute": "mode.runs.execute",
    "read_records": "mode.records.record",
    "ConfigError": "mode.core.errors",
}
"""Names that people import, and where each is."""
FORMER = {
    "mode.model": ("mode.modular.model", "mode.modular.edit"),
    "mode.expert": ("mode.modular.artefact",),
}
"""Modules by the names that saved models' cards import them by, and what they hold."""

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'mode' has no attribute '{name}'")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted([*globals(), *PUBLIC])


class FormerModules(MetaPathFinder, Loader):
    """Imports a module by its former name: saved models' cards go on working."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a former name alone."""
        return ModuleSpec(fullname, self) if fullname in FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module all that its successors hold."""
        for name in FORMER[module.__name__]:
            held = vars(import_module(name))
            vars(module).update({key: value for key, value in held.items() if not key.startswith("__")})


if not any(type(finder).__name__ == FormerModules.__name__ for finder in sys.meta_path):
    sys.meta_path.append(FormerModules())
