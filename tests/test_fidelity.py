"""docs/fidelity.md is what its data says, and its data says something of every method."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vtr
from vtr.core.registry import registry

pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fidelity():
    path = list(sys.path)
    yield script("fidelity")
    sys.path[:] = path


@pytest.fixture(scope="module")
def authors():
    return script("fidelity_authors")


def test_every_method_has_a_row(fidelity):
    assert {row.name for row in fidelity.rows()} == set(registry())


def test_rows_say_with_what_and_how(fidelity, authors):
    for row in fidelity.rows():
        if row.verdict == "not comparable":
            assert not row.authors and row.name not in authors.COMPARISONS, row.name
            continue
        assert row.authors.count("/") == 1 and len(row.commit) == 7, row.name
        by_code = row.name in authors.COMPARISONS
        assert by_code != bool(row.found), f"{row.name}: one result, by code or by hand"
        assert not by_code or authors.COMPARISONS[row.name][0] == row.authors
        assert row.differs if row.verdict == "explained" else row.compared


def test_the_tests_that_rows_name_are_there(fidelity):
    for row in fidelity.rows():
        assert row.tests, row.name
        for node in row.tests:
            file, _, function = node.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {function}(" in text if function else True, node


def test_published_settings_are_configurations_of_the_method(fidelity):
    for row in fidelity.rows():
        for name, text in row.settings:
            made = eval(text, {}, vars(vtr) | {n: getattr(vtr, n) for n in vtr.__all__})
            assert type(made) is registry()[row.name], (row.name, name)


def test_the_page_is_up_to_date(fidelity):
    made = fidelity.page(fidelity.rows(), json.loads(fidelity.RESULTS.read_text()))
    assert made == fidelity.PAGE.read_text(encoding="utf-8"), (
        "docs/fidelity.md is not what its data gives: python benchmarks/fidelity.py --page"
    )


def test_every_row_was_measured(fidelity, authors):
    results = json.loads(fidelity.RESULTS.read_text())["methods"]
    for row in fidelity.rows():
        assert results[row.name]["plain"]["tests"] > 0
        assert ("authors" in results[row.name]) == (row.name in authors.COMPARISONS)
        if row.verdict == "exact" and "authors" in results[row.name]:
            found = results[row.name]["authors"]
            assert found["differ"] == 0 and found["largest"] < 1e-5, row.name


def test_plain_measures_what_tests_compare_away(fidelity):
    row = fidelity.Row("evs", "exact", "", ("tests/methods/video/test_formulas.py::test_evs",))
    done = fidelity.plain(row)
    assert done["tests"] == 4 and done["compared"] == 4 and 0 < done["largest"] < 1e-6
    assert fidelity.cell(row, {"plain": done})[0].startswith("4 tests, ")
    seen = fidelity.Differences()
    seen.see(torch.tensor([1.0, float("inf")]), torch.tensor([1.5, float("inf")]))
    seen.see((torch.ones(2),), [torch.ones(2)])
    seen.see(torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16))
    assert (seen.largest, seen.compared) == (0.5, 2), "low precision is not counted"


def test_a_method_whose_tests_fail_is_not_recorded(fidelity, tmp_path, capsys):
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(SystemExit, match="evs: the tests fail"):
        fidelity.plain(fidelity.Row("evs", "exact", "", (str(tmp_path / "test_it.py"),)))
    capsys.readouterr()


# ---- checkouts -----------------------------------------------------------------------------------

CODE = """
import library_that_is_not_here

FIRST = 3

def noisy(x: NotKnown) -> NotKnown:
    return x + torch.rand(x.shape) * 1e-6 + OFFSET

class Model(library_that_is_not_here.Base):
    def scale(self, x):
        return math.sqrt(4) * x

    def forward(self, x):
        if x.ndim > 1 and self.on:
            y = x.sum(1)
            y = F.relu(y)
            z = library_that_is_not_here.other(y)
        return x
"""


@pytest.mark.parametrize("folder", ["code", "them/code", "them+code"])
def test_functions_of_a_checkout_run_without_its_imports(authors, tmp_path, folder):
    root = tmp_path / folder
    (root / "models").mkdir(parents=True)
    (root / "models/model.py").write_text(CODE)
    code = authors.Checkout(tmp_path, "them/code")
    assert code.commit == "unknown"
    found = code.functions("models/model.py", "noisy", "Model.scale", OFFSET=1)
    x = torch.tensor([[1.0, -3.0]])
    assert torch.equal(found.noisy(x), x + 1), "the noise is left out"
    assert torch.equal(found.scale(None, x), 2 * x)
    space = {"x": x, "self": type("Self", (), {"on": True})}
    done = code.body("models/model.py", "x.ndim > 1 and self.on", "y", space)
    assert torch.equal(done["y"], torch.zeros(1)) and "z" not in done
    assert code.assignments("models/model.py", ["FIRST"], {})["FIRST"] == 3


def test_what_a_checkout_lacks_is_named(authors, tmp_path):
    with pytest.raises(authors.Missing, match="no checkout of them/code in"):
        authors.Checkout(tmp_path, "them/code")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text(CODE)
    code = authors.Checkout(tmp_path, "them/code")
    with pytest.raises(authors.Missing, match=r"them/code has no b\.py"):
        code.functions("b.py", "noisy")
    with pytest.raises(authors.Missing, match=r"them/code has no Model\.lost in a\.py"):
        code.functions("a.py", "Model.lost")
    with pytest.raises(authors.Missing, match="has no 'if True:' in"):
        code.body("a.py", "True", "y", {})
    with pytest.raises(authors.Missing, match="does not set q there"):
        code.body("a.py", "x.ndim > 1 and self.on", "q", {})
    with pytest.raises(authors.Missing, match="does not set LAST"):
        code.assignments("a.py", ["LAST"], {})


def test_a_repository_that_is_not_there_leaves_what_is_recorded(fidelity, tmp_path):
    rows = {row.name: row for row in fidelity.rows()}
    assert fidelity.authors(rows["tome"], tmp_path) == (
        f"no checkout of facebookresearch/ToMe in {tmp_path}"
    )
    assert fidelity.authors(rows["sparsevlm"], tmp_path) == "recorded by hand"
    assert fidelity.authors(rows["random"], tmp_path) == "nothing to compare with"


def test_findings_count_what_differs(authors):
    found = authors.Finding()
    found.choices(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
    found.numbers(torch.tensor([1.0]), torch.tensor([1.25]))
    assert (found.differ, found.of, found.largest) == (1, 3, 0.25)
    found = authors.Finding()
    rows = torch.tensor([[0.0, 1.0], [5.0, 5.0], [2.0, 2.0]])
    found.rows(rows, rows[[2, 0]] + 1e-5)
    assert found.of == 3 and found.differ == 1, "one too many, without a partner"
    assert found.largest == pytest.approx(1e-5, rel=0.1)
