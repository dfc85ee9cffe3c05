"""Weights from and to other programs' files: folders of the transformers library, and one torch file.

``layout`` says what a foreign format is made of; ``gpt2``, ``llama`` and ``mixtral`` are formats, ``formats`` chooses.
``header`` and ``source`` look into files without torch, for the login node; ``weights``, ``hf_folder`` and
``torch_file`` move tensors. Never imports transformers: the formats are its files, not its code. Must not know ranks,
the loop or the launcher.
"""
