"""File formats of tokens: our prepared folders, and the token files of nanoGPT, llm.c and Megatron."""
