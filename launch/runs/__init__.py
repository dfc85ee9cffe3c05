"""The contract on disk between launcher, ranks and reports: run folders and everything in them. Torch-free."""
