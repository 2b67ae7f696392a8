"""Two processes of context parallelism, each run by ``test_families_parallel.py``."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.distributed as dist

import vtr
from tests.diffusion.models import CASES, Fixed
from tests.diffusion.test_matrix import METHODS

# Sizes that two processes share: 48 video tokens; 36 image tokens and 6 of text.
NAMES = ("wan", "flux", "qwen-image")


def inputs(name: str) -> dict[str, Any]:
    given = CASES[name].call()
    torch.manual_seed(5)
    if name == "wan":
        return {**given, "hidden_states": torch.randn(2, 4, 4, 6, 8)}
    given["hidden_states"] = torch.randn(2, 36, 8)
    if name == "flux":
        ids = torch.zeros(6, 6, 3)
        ids[..., 1] += torch.arange(6)[:, None]
        ids[..., 2] += torch.arange(6)
        return {**given, "img_ids": ids.view(36, 3)}
    return {**given, "img_shapes": [[(1, 6, 6)]] * 2}


@functools.cache
def mesh() -> Any:
    """One for all models: making its groups takes longer than everything else here."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))


def outputs(name: str, parallel: bool) -> dict[str, torch.Tensor]:
    """Dense, sparse, and sparse after a dense step."""
    model, given = CASES[name].build(), inputs(name)
    if parallel:
        from diffusers import ContextParallelConfig

        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh()))
    made = {}
    with torch.no_grad():
        made["dense"] = model(**given)[0]
        with vtr.apply(model, Fixed()):
            made["sparse"] = model(**given)[0]
        with vtr.apply(model, Fixed(dense_steps=1)):
            made["dense step"] = model(**given)[0]
            made["then sparse"] = model(**{**given, "timestep": given["timestep"] - 0.1})[0]
    return made


def everyone(parallel: bool) -> dict[str, Any]:
    """Every method of the matrix for three steps: what it computes, or the error."""
    made: dict[str, Any] = {}
    for name, method in METHODS.items():
        model, given = CASES["wan"].build(), inputs("wan")
        if parallel:
            from diffusers import ContextParallelConfig

            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh()))
        with torch.no_grad(), vtr.apply(model, method, steps=3):
            try:
                times = [torch.full_like(given["timestep"], t) for t in (900.0, 600.0, 300.0)]
                made[name] = torch.stack([model(**{**given, "timestep": t})[0] for t in times])
            except RuntimeError as error:
                made[name] = str(error)
    return made


def main(rank: int, port: str, folder: str) -> None:
    torch.set_num_threads(1)
    # diffusers numbers the accelerators of the machine; a CPU stands in for one.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in NAMES:
        made = outputs(name, parallel=True)
        if rank == 0:
            torch.save(made, f"{folder}/{name}.pt")
    each = everyone(parallel=True)
    if rank == 0:
        torch.save(each, f"{folder}/everyone.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
