"""Conversion of weights between this project and other formats: folders of the transformers library, and one torch
file.

``adapter`` defines the state-dict adapter of an architecture; ``gpt2``, ``llama`` and ``mixtral`` are adapters, and
``registry`` chooses one. ``source`` inspects files without torch, for the login node. ``state_dict`` converts tensors
and loads trained models. ``hf_folder`` writes folders. The package never imports transformers: it reads and writes its
files, and does not use its code.
"""
