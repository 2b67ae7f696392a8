"""The contract tests say in one line what has moved: shown by moving it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vtr.compat import contract
from vtr.compat.contract import Expectation, moved
from vtr.compat.tested import installed

pytestmark = pytest.mark.contract


def of(library: str, where: str) -> list[Expectation]:
    """The expectations of a place, of which there must be some."""
    found = [e for e in contract.contract(library) if e.where == where]
    assert found, where
    return found


def test_an_argument_that_is_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.24 renamed ``past_key_values`` to ``cache``."""
    pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    def forward(
        self: Any,
        hidden_states: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        kv_cache: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> None:
        pass

    where = "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward"
    assert moved(of("transformers", where)) == []
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    assert moved(of("transformers", where)) == [
        f"transformers {installed('transformers')}: LlamaDecoderLayer.forward has no cache or "
        "past_key_values (used by vtr/vision/vlm/attention.py)"
    ]


def test_a_method_that_is_no_longer_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put in the place of ``_get_candidate_generator`` would be ignored, silently."""
    pytest.importorskip("transformers")
    from transformers import GenerationMixin

    def decode(self: Any, **kwargs: Any) -> Any:
        drafts = self.make_drafts(**kwargs)
        return drafts.get_candidates(), drafts.update_candidate_strategy()

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", decode)
    version = installed("transformers")
    line = "(used by vtr/vision/vlm/wrapping.py)"
    expected = of("transformers", "transformers:GenerationMixin")
    assert moved(expected) == [
        f"transformers {version}: GenerationMixin does not call _get_candidate_generator {line}"
    ]
    monkeypatch.delattr(GenerationMixin, "_get_candidate_generator")
    assert moved(expected)[0] == (
        f"transformers {version}: GenerationMixin has no _get_candidate_generator {line}"
    )


def test_a_function_whose_arguments_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from diffusers.models import attention_dispatch

    def dispatch(key: Any, query: Any, value: Any, **kwargs: Any) -> None:
        pass

    where = "diffusers.models.attention_dispatch:dispatch_attention_fn"
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", dispatch)
    lines = moved(of("diffusers", where))
    assert len(lines) == 3
    assert "dispatch_attention_fn has no backend (used by" in lines[0]
    assert "begins with (key, query, value, kwargs), not with query as number 1" in lines[2]


def test_a_class_and_a_module_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    version = timm.__version__
    where = "timm.models.eva:EvaBlockPostNorm"
    monkeypatch.delattr(timm.models.eva, "EvaBlockPostNorm")
    assert moved(of("timm", where)) == [
        f"timm {version}: timm.models.eva has no EvaBlockPostNorm (used by vtr/vision/encoders/timm_blocks.py)"
    ]
    gone = Expectation("timm.models.tomorrow:Block", "vtr/vision/encoders/timm.py")
    line = f"timm {version}: there is no module timm.models.tomorrow (used by vtr/vision/encoders/timm.py)"
    assert moved([gone]) == [line]


def test_a_module_that_raises_where_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As lmms-eval 0.7.3 does with filelock 4.3, whose ``_api`` has moved."""
    (tmp_path / "breaks.py").write_text("from filelock._api import nothing_of_this_name\n")
    (tmp_path / "wants.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = moved([Expectation("breaks:x", "a.py"), Expectation("wants:x", "b.py")])
    assert first.startswith("breaks None: breaks cannot be imported (")
    assert "filelock" in first and "\n" not in first
    assert second == (
        "wants None: wants cannot be imported (No module named 'not_installed_here') (used by b.py)"
    )


class Base:
    kept = 1

    def method(self, one: Any, two: Any = None) -> Any:
        return [self.inner(x=one) for _ in "12"], f"{two}"

    @property
    def view(self) -> Any:
        return self.looked_at

    @staticmethod
    def plain() -> Any:
        return plainly()  # type: ignore[name-defined]  # noqa: F821


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("toy")
    Base.__module__ = "toy"
    module.Thing = Base  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy", module)
    return "toy:Thing"


def lines(*expected: Expectation, instances: Any = None) -> list[str]:
    return [line.removeprefix("toy None: ") for line in moved(expected, instances)]


def test_what_is_expected_in_each_way(toy: str) -> None:
    method = f"{toy}.method"
    assert not lines(
        Expectation(toy, "u", has=("kept", "gone|view"), calls=("inner", "looked_at", "plainly", "x")),
        Expectation(method, "u", takes=("one", "no|two"), starts=("one", "other|two"), calls=("inner",)),
        Expectation(f"toy:Other|{toy}", "u"),
    )  # fmt: skip
    assert lines(
        Expectation(toy, "u", has=("gone", "no|neither"), calls=("outer",)),
        Expectation(method, "u", takes=("three",), starts=("two",), calls=("outer",)),
        Expectation("toy:Other|toy:Another.one", "u"),
    ) == [
        "Thing has no gone (used by u)",
        "Thing has no no or neither (used by u)",
        "Thing does not call outer (used by u)",
        "Thing.method has no three (used by u)",
        "Thing.method begins with (one), not with two as number 1 (used by u)",
        "Thing.method does not call outer (used by u)",
        "toy has no Other (used by u)",
    ]


def test_attributes_of_instances(toy: str) -> None:
    thing: Any = Base()
    thing.looked_at, thing.part = 1, Base()
    thing.part.looked_at = 2
    expected = Expectation(toy, "u", built=("kept", "part.kept", "no|part", "part.gone"))
    assert lines(expected) == []  # the import part builds nothing
    assert lines(expected, instances={Base: thing}) == ["a Thing has no part.gone (used by u)"]
    assert lines(expected, instances={}) == ["no model of the tests holds a Thing (used by u)"]


def test_the_contract_of_a_library_does_not_import_it() -> None:
    import subprocess

    code = (
        "import sys\nfrom vtr.compat import contract\n"
        "for library in contract.LIBRARIES:\n    assert contract.contract(library), library\n"
        "print([x for x in ('transformers', 'timm', 'diffusers', 'open_clip', 'lmms_eval') "
        "if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
