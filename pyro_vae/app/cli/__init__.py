"""The command line: options and their help; ``commands`` does the work, imported when needed."""

# Each module adds its commands to the application, in the order of the help.
from pyro_vae.app.cli import train, evaluate, compare, sweep, baseline, use  # noqa: F401, I001
from pyro_vae.app.cli.app import app, main

__all__ = ["app", "main"]
