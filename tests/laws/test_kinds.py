"""What the laws say once for all methods, or once for a kind of model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.laws.everyone import METHODS, first_that_takes
from vtr.core.registry import registry
from vtr.testing import KINDS, examples
from vtr.testing.methods import hold, life, reduces, refused, trial_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reduces_some_kind_of_model(name: str) -> None:
    """Also that every method is held to the laws somewhere: a kind that it reduces takes it."""
    settings = examples(registry()[name])
    trials = (trial_of(k, settings) for k in KINDS.values() if not refused(k, settings))
    assert any(map(reduces, trials))


@pytest.mark.parametrize("name", ["transformers-clip", "vivit", "llava-next", "wan"])
def test_torch_compile_gives_the_same(name: str) -> None:
    """One method per kind; on timm every method is held to it."""
    trial = first_that_takes(KINDS[name], ("fastv", "evit", "own-frame"))
    hold("torch.compile", life.compiles, trial)


def test_kinds_have_different_samples() -> None:
    for kind in KINDS.values():
        one, two = kind.samples
        assert str(kind) == kind.name and kind.installed
        assert any((one[k] != v).any() for k, v in two.items() if v.shape == one[k].shape) or any(
            v.shape != one[k].shape for k, v in two.items()
        )


def test_importing_the_laws_imports_no_library_of_models() -> None:
    code = (
        "import sys, vtr.testing; "
        "print({'pytest', 'timm', 'transformers', 'diffusers', 'open_clip'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
