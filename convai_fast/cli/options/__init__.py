"""The options of each command: light to import, so that `--help` waits for nothing.

A class is a group of options, as `--help` shows it; its name in its docstring's first line. The
fields of the last base come first. `missing` names those that have to be given, and what they are.
"""
