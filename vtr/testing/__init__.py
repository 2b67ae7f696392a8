"""Laws that every method and every adapter is held to, on tiny random models of the real classes.

Call them from the tests of a package of your own:

>>> import vtr.testing
>>> vtr.testing.check_method(MyMethod)
>>> vtr.testing.check_adapter(None, my_model, images)

Nothing here needs pytest; a broken law raises ``AssertionError``.
"""

from vtr.testing.adapters import check_adapter
from vtr.testing.examples import Settings, examples
from vtr.testing.kinds import KINDS, Kind
from vtr.testing.methods import check_method, laws_of

__all__ = ["KINDS", "Kind", "Settings", "check_adapter", "check_method", "examples", "laws_of"]
