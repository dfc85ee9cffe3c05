"""``python -m launch.project SWEEP --nodes 8,...,4096``: what a measured sweep would be at sizes that were not run.

Reads run folders only, and starts nothing. Every figure is labelled as measured or projected.
"""
