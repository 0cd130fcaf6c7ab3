"""kdbench's configurations: one folder a group, one YAML a choice. Hydra takes a folder with this file as a module."""
