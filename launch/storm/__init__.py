"""The chaos drill: one run under seeded faults, compared with a quiet one. Imports neither the sandbox nor torch."""
