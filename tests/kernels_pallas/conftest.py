"""Puts what a kernel test saw into pytest's report (``--junitxml``)."""

import pytest
from kernel_proof import SEEN


@pytest.fixture(autouse=True)
def _seen(request):
    SEEN.clear()
    yield
    # Not by record_property, which warns for the default kind of report.
    properties = {"interpreted_runs": SEEN.runs}
    properties |= {f"worst_error_below_{bound:.0e}": e for bound, e in SEEN.errors.items()}
    request.node.user_properties.extend(properties.items())
