"""One module per sub-command: the file's name is the command's, its docstring's first line the help, main() runs it.

main() reads sys.argv[1:] and returns an exit code. Mistakes of the user are raised as UserError; kdbench.cli prints
them. Commands that take configuration overrides run under `kdbench.configure.launch` and say so, for tab completion, by
TAKES_KEYS = True; the others use argparse.
"""
