"""The engine "docker". See `engine` for how it works; importing this package imports the library that speaks to it."""

from actbox.engines.docker.engine import DockerEngine

__all__ = ["DockerEngine"]
