"""The cause of a failed or hanging run in one sentence: facts of its folder, and a table of rules over them."""
