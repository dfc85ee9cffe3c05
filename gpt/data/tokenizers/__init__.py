"""Tokenizers, text to tokens and back: bytes, characters, and the subword tokenizers of other libraries."""
