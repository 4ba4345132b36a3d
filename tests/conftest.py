"""Fixtures of all tests: a throwaway S3 server."""

import os
import uuid

import pytest
from hypothesis import settings

from support.s3 import CREDENTIALS, REGION, make_bucket, moto_server

settings.register_profile("vmt", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("vmt")


@pytest.fixture(scope="session", autouse=True)
def _nobodys_environment():
    """Settings and clusters of who runs the tests are not theirs."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("VMT_")] + ["RAY_ADDRESS", "AWS_PROFILE"]:
            environment.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def s3_server():
    """URL of an S3 server that the environment of this process, and of those it starts, points at."""
    with moto_server() as url, pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name.upper(), value)
        environment.setenv("AWS_DEFAULT_REGION", REGION)
        environment.setenv("AWS_ENDPOINT_URL", url)
        yield url


@pytest.fixture
def bucket(s3_server):
    """A fresh bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, name)
    return name
