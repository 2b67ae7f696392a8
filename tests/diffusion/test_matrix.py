"""Every method in every situation gives what an eager calculation from outside gives.

One method of each kind is played in all situations, and every method in those that differ most. ``VTR_MATRIX=1``
plays the whole matrix, which takes minutes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from tests.diffusion import pipes
from tests.diffusion.outside import eager_attention
from tests.diffusion.situations import CACHES, SITUATIONS, Situation, Stage
from vtr.core.registry import registry
from vtr.methods.common.schedule import Scheduled
from vtr.testing import examples

pytestmark = pytest.mark.filterwarnings("ignore")

EVERYTHING = bool(os.environ.get("VTR_MATRIX"))
# A plan is for one size and number of steps: calibrated methods refuse what is not in it.
METHODS = {
    name: examples(cls).some[0]
    for name, cls in registry().items()
    if issubclass(cls, Scheduled) and not cls.calibrated
}


def representatives(situation: Situation) -> tuple[str, ...]:
    """A mask that follows from the grid, a state from step to step, and merging."""
    return ("neighborhood" if situation.image else "own-frame", "rettention", "tomesd")


def cells() -> list[Any]:
    made = []
    for situation in SITUATIONS:
        for name, method in METHODS.items():
            if not (situation.every or EVERYTHING or name in representatives(situation)):
                continue
            if situation.image and "frames" in method.needs.get("attention", ()):
                continue
            made.append(pytest.param(situation, name, id=f"{situation.name}-{name}"))
    return made


def play(situation: Situation, method: Any, real: bool, folder: Path, entries: Any = ()) -> Stage:
    with pytest.MonkeyPatch.context() as patch:
        stage = Stage(method, real, folder, patch, entries)
        torch.manual_seed(7)
        if real:
            situation.play(stage)
        else:
            with eager_attention():
                situation.play(stage)
    return stage


@functools.cache
def dense(situation: Situation) -> list[torch.Tensor]:
    """The outputs without a method."""
    with tempfile.TemporaryDirectory() as folder:
        return play(situation, None, True, Path(folder)).outputs


@pytest.mark.parametrize(("situation", "name"), cells())
def test_together(situation: Situation, name: str, tmp_path: Path) -> None:
    for module in situation.needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    found = play(situation, METHODS[name], True, tmp_path / "real")
    want = play(situation, METHODS[name], False, tmp_path / "outside", found.entries)
    near = situation.atol
    for at, (a, b) in enumerate(zip(found.outputs, want.outputs, strict=True)):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(
            a, b, atol=near, rtol=near, msg=lambda text, at=at: f"run {at}: {text}"
        )
    if name in representatives(situation) or situation is SITUATIONS[0]:
        # Others may keep all of so few tokens.
        plain = zip(found.outputs, dense(situation), strict=True)
        assert any((a - b).abs().max() > 10 * near for a, b in plain)


def test_every_cache_of_diffusers_is_in_the_matrix() -> None:
    import diffusers

    ends = ("CacheConfig", "BroadcastConfig")
    found = {name for name in dir(diffusers) if name.endswith(ends)}
    # It caches the text of one family (Nucleus), which is not supported.
    assert found - {"TextKVCacheConfig"} <= set(CACHES)


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_one_transformer_in_two_threads_at_once_is_refused(name: str) -> None:
    """The run that came first is not disturbed, and the other one works afterwards."""
    pipe = pipes.make(name)
    inside, refused = threading.Event(), threading.Event()

    def wait(module: Any, args: Any) -> None:
        inside.set()
        refused.wait(30)

    with vtr.apply(pipe, vtr.Rettention(0.4, refresh=3, block=16)), ThreadPoolExecutor(1) as pool:
        want = pipes.call(pipe, name, 4)
        model = pipe.transformer
        blocks = model.blocks if name == "wan" else model.transformer_blocks
        hook = blocks[1].register_forward_pre_hook(wait)
        running = pool.submit(pipes.call, pipe, name, 4)
        inside.wait(30)
        other = type(pipe)(
            **{**pipe.components, "scheduler": pipe.scheduler.from_config(pipe.scheduler.config)}
        )
        other.set_progress_bar_config(disable=True)
        with pytest.raises(RuntimeError, match=r"running in another thread.*copy.deepcopy"):
            pipes.call(other, name, 4)
        refused.set()
        assert torch.equal(running.result(), want)
        hook.remove()
        assert torch.equal(pipes.call(pipe, name, 4), want)


def table() -> str:
    """The situations, for the documentation."""
    rows = ["| with | every method gives the eager result |", "| --- | --- |"]
    told = SITUATIONS
    for group in dict.fromkeys(s.group for s in told):
        names = "; ".join(s.name for s in told if s.group == group)
        rows.append(f"| {group} | {names} |")
    return "\n".join(rows)


def test_the_documentation_has_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "diffusion.md"
    assert table() in page.read_text(encoding="utf-8"), textwrap.dedent(
        """docs/diffusion.md must hold what
        python -c "from tests.diffusion.test_matrix import table; print(table())" prints"""
    )
