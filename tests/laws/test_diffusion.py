"""Every registered method is held to the laws on diffusion transformers: by registration alone, no test names it."""

from __future__ import annotations

import pytest

from tests.laws.everyone import METHODS, NAMES, hold_on
from vtr.core.registry import registry
from vtr.testing import examples
from vtr.testing.kinds import Diffusion
from vtr.testing.methods import hold, hold_all, laws_of, trial_of
from vtr.testing.models.diffusion_more import MORE

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", METHODS)
def test_the_laws_hold(name: str) -> None:
    hold_on(name, NAMES["Diffusion"])


@pytest.mark.parametrize("case", MORE)
def test_further_families_batch_and_number_their_tokens(case: str) -> None:
    """With a static mask, or one chosen in every call; the masks themselves are in ``tests/diffusion``."""
    kind = Diffusion(case, "diffusers", case=case, tolerance=3e-5)
    laws = {
        "keep everything is dense attention": "random-sparse",
        "a sample alone equals the sample in a batch": "rectified-sparse",
    }
    if case == "kandinsky5":  # it rounds queries to bfloat16, and differs between batches by itself
        laws.popitem()
    for law, name in laws.items():
        trial = trial_of(kind, examples(registry()[name]))
        hold(law, laws_of(trial.method)[law], trial)


def test_the_laws_hold_on_a_unet() -> None:
    """Its blocks are at several resolutions; ``tests/diffusion/test_unet.py`` has the other methods."""
    kind = Diffusion("unet-sd15", "diffusers", case="unet-sd15", tolerance=3e-5)
    hold_all(trial_of(kind, examples(registry()["tomesd"])))
