"""One module per ``skv`` command.

Each has ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args, screen)``, which
returns what ``--json`` writes. Heavy imports belong inside ``run``: ``skv --help`` imports
every module here and must stay quick.
"""

from __future__ import annotations

#: Command names in the order ``skv --help`` shows them; each is a module of this package.
COMMANDS = (
    "demo",
    "chat",
    "generate",
    "eval",
    "calibrate",
    "explain",
    "bench",
    "tune",
    "doctor",
    "completion",
)
