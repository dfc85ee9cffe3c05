"""Files on disk that launcher, ranks and reports share: run folders and their content. Does not import torch."""
