"""Files of tokens: our prepared folders, and those of nanoGPT, llm.c and Megatron."""
