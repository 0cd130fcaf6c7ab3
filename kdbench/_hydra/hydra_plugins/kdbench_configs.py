"""Whoever initialises Hydra on kdbench's configurations, in a script or a notebook, gets what `kdbench train` composes.

Asked whenever Hydra starts, for any program: nothing of kdbench is imported unless its configurations are used.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class KdbenchConfigs(SearchPathPlugin):
    """Makes `teacher=<any student network>` a choice, and lets experiments give way to what is typed."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from kdbench.paths import are_configs

        if any(are_configs(element.path or "") for element in search_path.get_path()):
            from kdbench.configure.compose import prepare

            prepare()
