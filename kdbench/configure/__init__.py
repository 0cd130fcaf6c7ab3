"""Between Hydra and kdbench: composing, naming and checking configurations, and building objects from their nodes."""

from kdbench.configure.check import check
from kdbench.configure.compose import compose
from kdbench.configure.launch import key_of, launch
from kdbench.configure.naming import config_hash, flat
from kdbench.configure.nodes import check_node, construct
from kdbench.configure.reference import NAMED, group_choices
from kdbench.configure.register import config_folders, register

__all__ = [
    "NAMED",
    "check",
    "check_node",
    "compose",
    "config_folders",
    "config_hash",
    "construct",
    "flat",
    "group_choices",
    "key_of",
    "launch",
    "register",
]
