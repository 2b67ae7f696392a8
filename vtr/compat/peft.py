"""PEFT: access to the model that adapters were put into."""

from __future__ import annotations

from typing import Any

#: The submodule of a PeftModel that holds its tuner (or the model itself, for learned prompts), and the one
#: of a tuner that holds the model.
HELD = ("base_model", "model")

#: The submodule of an adapted layer that is the layer as it was; it comes first.
ADAPTED = "base_layer"


def inside_adapters(model: Any) -> Any:
    """Return the model in a PeftModel, a PeftMixedModel or a tuner (LoraModel), or ``model`` itself."""
    while type(model).__module__.partition(".")[0] == "peft":
        held = getattr(model, "_modules", {})
        inner = next((held[name] for name in HELD if name in held), None)
        if inner is None:
            break
        model = inner
    return model
