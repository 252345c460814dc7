"""What a GPU has to show, in at most ten minutes: `python -m benchmarks.gpu`.

A part is a module with `run(notes, setting)`, and runs in a process of its own: one that fails,
takes too long or loses its GPU takes no other with it.
"""
