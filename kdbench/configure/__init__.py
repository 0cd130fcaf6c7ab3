"""Between Hydra and kdbench: composing, naming and checking configurations, and building objects from their nodes."""

from kdbench.configure.check import check
from kdbench.configure.launch import launch
from kdbench.configure.naming import config_hash, flat
from kdbench.configure.nodes import check_node, construct, locate
from kdbench.configure.register import register

__all__ = ["check", "check_node", "config_hash", "construct", "flat", "launch", "locate", "register"]
