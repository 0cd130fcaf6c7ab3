"""Plain values as arguments: importing what a dotted path names, checking values against its signature, calling it."""

from kdbench.arguments.call import accepted, bind, call, fit_arguments, keys, parameters, run, unknown_key
from kdbench.arguments.fit import fit, show
from kdbench.arguments.locate import locate

__all__ = [
    "accepted",
    "bind",
    "call",
    "fit",
    "fit_arguments",
    "keys",
    "locate",
    "parameters",
    "run",
    "show",
    "unknown_key",
]
