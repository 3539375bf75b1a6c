"""The address of a cluster, before anything is sent there."""

import pytest

from model.errors import InputError
from pipeline.jobs import Jobs


@pytest.mark.parametrize(
    "address", ["foo:bar", "http://127.0.0.1:99999", "ftp://head:8265", "http://[::1", "a..b:8265"]
)
def test_an_address_that_is_none_is_a_wrong_setting(address: str) -> None:
    with pytest.raises(InputError, match="must be http://host:port"):
        Jobs(address)
