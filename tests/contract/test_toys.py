"""The contract on methods with dense parameters, whatever the registry has."""

from collections.abc import Callable

import pytest

from cce_torchrec import METHODS
from tests.contract.apart import contract, run
from tests.toys import Thin, Waves


@pytest.mark.parametrize("method", [Waves, Thin], ids=lambda method: method.key)
@pytest.mark.parametrize("test", contract(), ids=lambda test: test.__name__)
def test_dense_parameters_meet_the_contract(
    test: Callable[..., None], method: type[Waves | Thin], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, method.key, method)
    run(test, method.key)
