"""Training of methods that choose the tokens of a detector's encoder (:class:`vtr.SparseDETR`, :class:`vtr.FocusDETR`).

The scores are trained beside the detector's own loss, in your own loop; the detector may be frozen:

    handle = vtr.apply(model, vtr.SparseDETR(keep=0.3))
    model.train()  # new scores are used in training alone
    optimizer = torch.optim.AdamW(handle.modules.parameters(), lr=1e-3)
    for batch in batches:  # pixel_values, pixel_mask, labels: as transformers' detectors take them
        out = model(**batch)
        terms = detectors.losses(handle)
        loss = out.loss + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detectors.save(handle, "sparse-detr.safetensors")

Afterwards ``vtr.apply(model, vtr.SparseDETR(keep=0.3, weights="sparse-detr.safetensors"))``.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vtr.api import Handle


def losses(handle: Handle) -> dict[str, Tensor]:
    """Return the terms that the applied methods add to the loss of the last call, by ``method/term``.

    Each is a scalar with gradients that has the paper's weight already. SparseDETR compares its scores with the
    attention of the decoder, which the call has recorded; FocusDETR with the boxes of the call's ``labels``.

    Raises:
        RuntimeError: the model has not been called in training mode since ``vtr.apply``.
        ValueError: the call did not show what a method learns from; the message says what is missing.
    """
    trace = handle.trace
    found: dict[str, Tensor] = {}
    modules = iter(handle.modules)
    for method in handle.methods:
        own = next(modules) if method.learned else None
        if method.learned and method.name not in trace.notes:
            raise RuntimeError(
                f"{method.name} has scored nothing: call the wrapped model in training mode (model.train()) before "
                "losses(handle)"
            )
        terms = method.training_losses(trace, own)
        found |= {f"{method.name}/{name}": term for name, term in terms.items()}
    return found


def save(handle: Handle, path: str | Path) -> None:
    """Write the learned modules of a handle to a safetensors file, for the option ``weights`` of its method.

    Raises:
        ValueError: the handle has no method that learns, or several.
    """
    from safetensors.torch import save_file

    if len(handle.modules) != 1:
        raise ValueError(
            f"the handle must have one method that learns, it has {len(handle.modules)}"
        )
    state = handle.modules[0].state_dict()
    save_file({name: x.detach().cpu().contiguous() for name, x in state.items()}, str(path))
