"""Which way to spread a model: what is possible, what fits, and what an estimate says of the rest. Torch-free.

``machine`` is what is assumed of the hardware, ``collectives`` what sending costs on it, ``cost`` the time of a step,
``candidates`` what there is to choose from, ``fitting`` what of it fits, and ``choice`` the choice; ``left_out`` says
why not the others, and ``refusals`` why none. The figures are there to rank layouts, not to promise a speed: nothing
here was measured on the machine in question.
"""
