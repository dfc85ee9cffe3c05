"""Checkpoints: saved whole or not at all, verified before they are loaded, loadable on any number of ranks.

``manager`` saves and loads the checkpoints of a run. A save passes ``formats`` (the files), ``part`` (their content on
this rank), ``writer`` (the process that writes them) and ``folders`` (names, manifest and commit). A login node imports
``folders``, ``target`` and ``upkeep``, which need no torch.
"""
