"""The models and the video of the serving tests."""

from tests.serving.conftest import models, video  # noqa: F401
