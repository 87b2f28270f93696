"""The commands: analyze (`jaxdelta`), compare, convert, merge, plot and report, each a module with a `main`.

Importing one prepares the process (signals, memory) before JAX is imported, so import them only to run them.
"""

from jaxdelta.utils import cli

cli.install()
