"""Between Hydra and kdbench: composing, naming and checking configurations, and building objects from their nodes."""

from kdbench.configure.check import check
from kdbench.configure.compose import compose, composed_here, register
from kdbench.configure.launch import key_of, launch
from kdbench.configure.naming import NAMED, Counted, config_folders, config_hash, counted_in, flat, group_choices
from kdbench.configure.nodes import Node, check_node, construct, contents, own_options
from kdbench.configure.options import options
from kdbench.configure.sweep import point_folder

__all__ = [
    "NAMED",
    "Counted",
    "Node",
    "check",
    "check_node",
    "compose",
    "composed_here",
    "config_folders",
    "config_hash",
    "construct",
    "contents",
    "counted_in",
    "flat",
    "group_choices",
    "key_of",
    "launch",
    "options",
    "own_options",
    "point_folder",
    "register",
]
