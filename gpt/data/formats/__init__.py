"""File formats of tokens: prepared folders, and the token files of nanoGPT, llm.c and Megatron."""
