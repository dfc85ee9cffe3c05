"""The parts of the training loop, each in a module of this folder.

``run`` sets a run up, ``execution`` its precision, compilation and timeouts. ``loop`` is the training loop with its
evaluations, and ``step`` one step. ``checkpoints`` schedules saves, and rolls a run back. ``guards`` find divergence
and slow ranks, and decide on an early stop. ``diagnostics`` measure steps, and ``harness`` evaluates tasks of lm-eval.
"""
