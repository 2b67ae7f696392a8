"""accelerate: attributes that its hooks set on a module that they move between devices."""

from __future__ import annotations

from typing import Any

#: The hook of a module, and the forward that the hook's own forward calls.
HOOK, FORWARD = "_hf_hook", "_old_forward"


def hooked(module: Any) -> bool:
    """Tell whether the forward of a module is accelerate's, around the module's own."""
    held = vars(module)
    return HOOK in held and FORWARD in held
