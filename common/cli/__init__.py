"""The command line: verbs, their options and exit codes. Nothing heavy is imported before a verb needs it.

`training`, `asking`, `looking` and `writing` hold the verbs, `options` and `sampling_options` what several of them
take, `given` the command itself. `main` puts them together and turns errors into a message and an exit code.
"""

from common.cli.main import main

__all__ = ["main"]
