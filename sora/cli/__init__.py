"""The command line. A verb parses its arguments, calls one function of Sora, and prints what that returns.

Heavy imports are inside the verb that needs them. Exit codes: 0 done; 1 the answer is no; 2 bad usage or input; 3 a
server, disk or child process failed; 130 Ctrl-C. Verbs that report take `--json`: they then print one JSON document on
standard output and nothing else.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb and ends the process with its exit code."""
    from sora.core.sandbox import hide_memory

    hide_memory()  # this process and many of its children hold tokens
    from sora.cli.failures import run_verb

    sys.exit(run_verb(sys.argv[1:] if arguments is None else arguments))
