"""What `tools/upstream` makes of the reports of other projects' tests: a difference must not slip through."""

import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "upstream"
sys.path.insert(0, str(TOOL))

from in_place import is_one_of, put_in_place  # noqa: E402
from run import lost, outcomes  # noqa: E402
from suites import SUITES, Suite  # noqa: E402

REPORT = """<testsuites><testsuite>
<testcase classname="a.test_b" name="passes"/>
<testcase classname="a.test_b" name="fails"><failure message="no"/></testcase>
<testcase classname="a.test_b.TestC" name="skips[1]"><skipped/></testcase>
<testcase classname="a.test_b" name="ends badly"/>
<testcase classname="a.test_b" name="ends badly"><error message="in teardown"/></testcase>
</testsuite></testsuites>"""


def test_the_outcomes_of_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    assert outcomes(path) == {
        "a.test_b::passes": "passed",
        "a.test_b::fails": "failed",
        "a.test_b.TestC::skips[1]": "skipped",
        "a.test_b::ends badly": "failed",
    }


@pytest.mark.parametrize("ours", [{"m.C::test[1]": "failed"}, {"m.C::test[1]": "skipped"}, {}])
def test_what_passes_on_stock_only_is_lost(ours: dict[str, str]) -> None:
    stock = {"m.C::test[1]": "passed", "m.C::other": "failed"}
    assert lost(stock, ours, Suite("project", tests=())) == ["m.C::test[1]"]
    assert lost(stock, {"m.C::test[1]": "passed"}, Suite("project", tests=())) == []
    assert lost(stock, ours, Suite("project", tests=(), inapplicable={"C::test": "a reason"})) == []


def test_a_test_is_named_by_its_last_two_names() -> None:
    assert is_one_of("a/test_b::TestC::test_d[x::y]", ["TestC::test_d"])
    assert not is_one_of("a/test_b::TestC::test_d2", ["TestC::test_d"])


def test_a_class_is_replaced_under_every_name_but_fastwires() -> None:
    class Stock:
        pass

    class Ours(Stock):
        pass

    module, own = type(sys)("some_module"), type(sys)("fastwire.some_module")
    module.Name = module.Other = own.Name = Stock
    modules = {"some_module": module, "fastwire.some_module": own}
    with pytest.MonkeyPatch.context() as patch:
        for name, each in modules.items():
            patch.setitem(sys.modules, name, each)
        put_in_place([(Stock, Ours)])
    assert (module.Name, module.Other, own.Name) == (Ours, Ours, Stock)


def test_every_suite_has_a_reason_for_what_it_leaves_out() -> None:
    for suite in SUITES:
        assert all(len(reason.split()) > 3 for reason in (suite.inapplicable | suite.impossible).values())
