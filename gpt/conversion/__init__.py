"""Conversion of weights from and to other programs' files: folders of the transformers library, and one torch file.

``adapter`` defines the state-dict adapter of an architecture; ``gpt2``, ``llama`` and ``mixtral`` are adapters, and
``registry`` chooses. ``inspect`` and ``source`` look into files without torch, for the login node; ``state_dict`` and
``hf_folder`` move tensors; ``trained`` reads the checkpoints of a run. Never imports transformers: the formats are its
files, not its code.
"""
