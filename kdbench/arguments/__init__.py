"""Plain values as arguments: importing what a dotted path names, checking values against its signature, calling it."""

from kdbench.arguments.call import (
    accepted,
    bind,
    call,
    checked,
    fit_arguments,
    keys,
    of_keys,
    parameters,
    refuse_foreign,
    run,
    unknown_key,
)
from kdbench.arguments.code import Trust, is_own, locate, trusting
from kdbench.arguments.fit import fit

__all__ = [
    "Trust",
    "accepted",
    "bind",
    "call",
    "checked",
    "fit",
    "fit_arguments",
    "is_own",
    "keys",
    "locate",
    "of_keys",
    "parameters",
    "refuse_foreign",
    "run",
    "trusting",
    "unknown_key",
]
